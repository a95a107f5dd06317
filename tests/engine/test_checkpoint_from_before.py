"""A checkpoint of commit 3e03da2 loads, evaluates as it did then and resumes to the same losses.

``EXACT=1`` asks for equality in every bit, as the machine and the versions of the recording give.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.baseline_runs import options_of_data, panoptic_quality, recorded_run
from helpers.commands import REPO_ROOT
from helpers.tiny_dataset import TinyPanopticDataset

FOLDER = REPO_ROOT / "tests" / "golden" / "checkpoint_from_before"
CHECKPOINT = "model_0000199.pth"
EXACT = os.environ.get("EXACT") == "1"
PER_IMAGE = ("panoptic_seg", "segments", "boxes", "scores", "classes")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return torch.load(FOLDER / "record.pt", weights_only=True)


def assert_equal_or_near(ours: torch.Tensor, theirs: torch.Tensor, *, rtol: float = 1e-5) -> None:
    if EXACT:
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


def test_evaluates_as_before(
    tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset, recorded: dict[str, Any]
) -> None:
    """With the config file that the run left."""
    base = ["--config-file", str(FOLDER / "config.yaml"), *options_of_data(tiny_panoptic_dataset)]
    options = ["MODEL.WEIGHTS", str(FOLDER / CHECKPOINT), "OUTPUT_DIR", str(tmp_path)]
    calls = recorded_run(["--eval-only", *base, *options])
    for name, theirs in recorded["raw"].items():
        ours = torch.cat([part.flatten() for part in calls.raw[name]])
        assert_equal_or_near(ours, theirs, rtol=1e-4)
    assert len(calls.results) == len(recorded["panoptic_seg"])
    for index, result in enumerate(calls.results):
        assert_result(result, {key: recorded[key][index] for key in PER_IMAGE})
    assert_quality(panoptic_quality(tmp_path), recorded["quality"])


def assert_quality(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    assert ours.keys() == theirs.keys()
    for name, row in theirs.items():
        for key, value in row.items():
            is_share = isinstance(value, float) and not EXACT
            assert ours[name][key] == (pytest.approx(value, abs=0.02) if is_share else value)


def assert_result(result: dict[str, Any], theirs: dict[str, Any]) -> None:
    segment_map, segments = result["panoptic_seg"]
    ours = [(s["id"], s["category_id"], bool(s["isthing"])) for s in segments]
    assert ours == theirs["segments"]
    different = (segment_map != theirs["panoptic_seg"]).sum().item()
    assert different <= (0 if EXACT else 0.01 * segment_map.numel())
    instances = result["instances"]
    assert torch.equal(instances.pred_classes, theirs["classes"])
    assert_equal_or_near(instances.scores, theirs["scores"], rtol=1e-4)
    assert_equal_or_near(instances.pred_boxes.tensor, theirs["boxes"], rtol=1e-3)


def test_resumes_to_the_recorded_losses(
    tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset, recorded: dict[str, Any]
) -> None:
    """Iterations 200 to 203, equal to those of the run that was never stopped."""
    folder = tmp_path / "output"
    folder.mkdir()
    for name in (CHECKPOINT, "last_checkpoint", "config.yaml"):
        shutil.copy(FOLDER / name, folder)
    base = ["--config-file", str(folder / "config.yaml"), *options_of_data(tiny_panoptic_dataset)]
    calls = recorded_run(["--resume", *base, "OUTPUT_DIR", str(folder)])
    assert len(calls.losses) == 4
    assert all(list(step) == recorded["loss_names"] for step in calls.losses)
    losses = torch.tensor([list(step.values()) for step in calls.losses], dtype=torch.float64)
    assert_equal_or_near(losses[:1], recorded["losses"][:1])
    assert_equal_or_near(losses, recorded["losses"], rtol=1e-3)
    assert_quality(panoptic_quality(folder), recorded["quality_after_resuming"])
