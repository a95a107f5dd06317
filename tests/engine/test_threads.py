import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from batchformer_panoptic.command_line import scripts
from batchformer_panoptic.engine import load_config, threads
from batchformer_panoptic.engine.threads import available_cores, limit_threads
from helpers.commands import REPO_ROOT

QUICKSTARTS = sorted((REPO_ROOT / "configs" / "quickstart").glob("*.yaml"))
DETR = REPO_ROOT / "configs" / "coco" / "panoptic" / "detr_R50_joint_300ep.yaml"
DIGITS = REPO_ROOT / "configs" / "classification" / "digits_vit.yaml"


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def chosen(
    config: Path,
    parameters: int,
    images: int,
    cores: int,
    workers: int = 0,
    opts: Sequence[str] = (),
) -> int:
    """The number of training threads of a model of so many parameters on so many cores."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(parameters, device="meta"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "available_cores", lambda: cores)
        cfg = load_config(str(config), ["MODEL.DEVICE", "cpu", *opts])
        limit_threads(cfg, model, images, training=True, workers=workers)
    return torch.get_num_threads()


@pytest.mark.parametrize("config", QUICKSTARTS, ids=lambda path: path.stem)
def test_a_small_model_has_one_thread(config: Path) -> None:
    assert chosen(config, 1_400_000, 16, 8) == 1
    assert chosen(DIGITS, 200_000, 50, 8) == 1


def test_more_work_has_more_threads_up_to_the_cores() -> None:
    assert chosen(QUICKSTARTS[0], 1_400_000, 32, 8) == 2
    assert chosen(QUICKSTARTS[0], 1_400_000, 64, 8) == 4
    assert chosen(DETR, 42_000_000, 2, 8) == 8
    jitter = ["INPUT.LARGE_SCALE_JITTER.ENABLED", "True", "INPUT.LARGE_SCALE_JITTER.SIZE", "1024"]
    assert chosen(QUICKSTARTS[0], 1_400_000, 1, 8, 0, jitter) == 7


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 2), (3, 3), (4, 3), (16, 15)])
def test_of_four_cores_one_is_left_to_the_loader(cores: int, expected: int) -> None:
    assert chosen(DETR, 42_000_000, 2, cores, 4) == expected
    assert chosen(DETR, 42_000_000, 2, cores, 0) == cores


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.comm, "get_local_size", lambda: 4)
    assert chosen(DETR, 42_000_000, 2, 8) == 2
    assert chosen(DETR, 42_000_000, 2, 2) == 1


def test_the_users_number_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert chosen(DETR, 42_000_000, 2, 8) == 3


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "800000 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_affinity_and_quota_limit_the_cores(
    files: Mapping[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert available_cores(tmp_path) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP runtime")
@pytest.mark.parametrize(
    ("variables", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")]
)
def test_threads_wait_passively_unless_the_user_has_chosen(
    variables: Mapping[str, str], expected: str
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": str(REPO_ROOT / "projects"), "OMP_DISPLAY_ENV": "TRUE"}
    done = subprocess.run(
        [sys.executable, "-c", "import batchformer_panoptic, torch"],
        env={**environment, **variables},
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr


# Those that run a model.
@pytest.mark.parametrize(
    "name", ["demo", "predict", "visualize-predictions", "compare-merges", "analyze-model"]
)
def test_commands_limit_their_threads_and_import_the_package_before_torch(name: str) -> None:
    source = scripts()[name].path.read_text(encoding="utf-8")
    assert "limit_threads(" in source
    imported = re.findall(
        r"^(?:import|from) (batchformer_panoptic|torch|detectron2|fvcore)\b", source, re.M
    )
    assert imported[0] == "batchformer_panoptic"
