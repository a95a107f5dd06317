"""The digits experiment: training runs and the table of results."""

import argparse
import importlib
from types import ModuleType

import pytest

from helpers.commands import add_benchmarks_to_path

pytest.importorskip("sklearn", reason="the extra [digits]")


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    add_benchmarks_to_path(monkeypatch)
    return importlib.import_module("benchmarks.digits_accuracy")


def result_of(plain: list[float], block: list[float]) -> dict:
    row = {"labels": 5, "plain_top1": plain, "block_top1": block, "self_top1": plain}
    return {"rows": [row]}


def test_the_table_compares_the_seeds_in_pairs(digits: ModuleType) -> None:
    table = digits.table(result_of([50.0, 60.0, 70.0], [53.0, 60.0, 76.0]))
    cells = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    means = ["60.0 ± 10.0", "63.0 ± 11.8", "60.0 ± 10.0"]
    # differences 3, 0, 6 with the block, none with "self"
    assert cells == ["5", *means, "+3.0 ± 3.0", "2 of 3", "+0.0 ± 0.0", "0 of 3"]


def test_a_loss_is_shown_as_one(digits: ModuleType) -> None:
    assert "| -2.0 " in digits.table(result_of([50.0], [48.0]))


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_all_arms_are_trained(digits: ModuleType, jobs: int) -> None:
    opts = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "0"]
    args = argparse.Namespace(rounds=1, labels=[1, 2], jobs=jobs, opts=opts)
    result = digits.run(args)
    assert [row["labels"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        for arm in digits.ARMS:
            (top1,) = row[f"{arm}_top1"]
            assert 0 < top1 < 100
        assert len({row[f"{arm}_top1"][0] for arm in digits.ARMS}) > 1
    assert result["config"] == {"steps": 2, "images": 4}
    assert "1 seeds, 2 steps of 4 pictures" in digits.how_taken(result)
