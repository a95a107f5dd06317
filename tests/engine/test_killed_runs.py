"""A run that is killed anywhere and resumed leaves the files of an undisturbed one."""

import json
import random
from pathlib import Path

import pytest

from helpers.killed_runs import PLACES, assert_same_run, calls_of, metrics, run


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.distributed)])
def processes(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, processes: int) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "undisturbed"
    assert run(folder, processes=processes) == [0] * processes
    logged = [record["iteration"] for record in metrics(folder)]
    assert logged == [0, 1, 3, 5, 7, 9, 11, 12]
    best = json.loads((folder / "model_best.json").read_text())
    assert best["iteration"] in (3, 7)  # not the last evaluation
    assert sum("panoptic_seg/PQ" in record for record in metrics(folder)) == 3
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_killed_inside_a_write(
    tmp_path: Path, undisturbed: Path, processes: int, place: str
) -> None:
    folder = tmp_path / "run"
    if place == "half of config.yaml":  # written again by the resumed run
        _kill(folder, processes, place="after model_0000003.pth")
    _kill(folder, processes, place=place)
    assert run(folder, processes=processes, resume=True) == [0] * processes
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_killed_at_a_random_place(
    tmp_path: Path, undisturbed: Path, processes: int, number: int
) -> None:
    folder = tmp_path / "run"
    _kill(folder, processes, call=random.Random(number).randrange(1, calls_of(undisturbed)))
    assert run(folder, processes=processes, resume=True) == [0] * processes
    assert_same_run(folder, undisturbed)


def _kill(folder: Path, processes: int, *, place: str = "", call: int = 0) -> None:
    resume = folder.exists()
    status = run(folder, processes=processes, resume=resume, place=place, call=call)
    assert status[0] == -9, status
