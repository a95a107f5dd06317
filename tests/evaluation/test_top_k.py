"""Top-1 and top-5 against handmade numbers and timm's accuracy."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from timm.utils import accuracy
from torch import Tensor

from batchformer_panoptic.engine.processes import launch_processes
from batchformer_panoptic.errors import NonFiniteError, UserError
from batchformer_panoptic.evaluation import TopKEvaluator
from batchformer_panoptic.evaluation.top_k import true_class_ranks
from helpers.image_folders import unique_name


def register(labels: list[int], num_classes: int, name: str | None = None) -> str:
    """A data set of images 0, 1, ... with these labels."""
    name = name or unique_name()
    records = [{"image_id": i, "label": label} for i, label in enumerate(labels)]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).classes = [f"class {k}" for k in range(num_classes)]
    return name


def process(evaluator: TopKEvaluator, logits: Tensor, ids: list[int]) -> None:
    evaluator.process([{"image_id": i} for i in ids], [{"class_logits": logits[i]} for i in ids])


def test_hand_made_numbers(tmp_path: Path) -> None:
    # Ranks of the true class: 0, 1, 4, 5.
    logits = torch.arange(7.0).flip(0).repeat(4, 1)
    name = register([0, 1, 4, 5], 7)
    evaluator = TopKEvaluator(name, str(tmp_path / "out"))
    process(evaluator, logits, [0, 1, 2])
    process(evaluator, logits, [3])
    assert evaluator.evaluate() == {"classification": {"top1": 25.0, "top5": 75.0}}
    content = json.loads((tmp_path / "out" / "classification_results.json").read_text())
    assert (content["dataset"], content["num_images"], content["top5"]) == (name, 4, 75.0)
    assert content["per_class"][:2] == [
        {"name": "class 0", "num_images": 1, "num_top1": 1},
        {"name": "class 1", "num_images": 1, "num_top1": 0},
    ]
    evaluator.reset()
    with pytest.raises(UserError, match="4 of the 4 images"):
        evaluator.evaluate()


def test_numbers_are_those_of_timm() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(60, 11), torch.randint(11, (60,))
    evaluator = TopKEvaluator(register(labels.tolist(), 11))
    for start in range(0, 60, 7):
        process(evaluator, logits, list(range(60))[start : start + 7])
    result = evaluator.evaluate()["classification"]
    expected = accuracy(logits, labels, topk=(1, 5))
    assert [result["top1"], result["top5"]] == pytest.approx([float(x) for x in expected])


@pytest.mark.parametrize(("num_classes", "names"), [(5, {"top1"}), (6, {"top1", "top5"})])
def test_top5_needs_a_sixth_class(
    num_classes: int, names: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    evaluator = TopKEvaluator(register([0], num_classes))
    process(evaluator, torch.eye(num_classes), [0])
    with caplog.at_level(logging.INFO):
        assert set(evaluator.evaluate()["classification"]) == names
    assert ("top-5 n/a" in caplog.text) == (num_classes == 5)


def test_an_image_counts_once() -> None:
    logits = torch.eye(3)[[0, 1, 1]]
    evaluator = TopKEvaluator(register([0, 1, 2], 3))
    process(evaluator, logits, [0, 1, 2])
    process(evaluator, logits, [0, 0, 1])
    assert evaluator.evaluate()["classification"]["top1"] == pytest.approx(200 / 3)


def test_equal_scores_and_scores_that_are_no_numbers_do_not_help() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[1.0, 1, 1], [1, 1, 1], [nan, nan, nan], [0, nan, 0], [inf, 0, inf], [3, 2, 1]]
    )
    labels = torch.tensor([0, 2, 0, 0, 2, 1])
    assert true_class_ranks(logits, labels).tolist() == [0, 2, 3, 1, 1, 1]


def test_logits_that_are_no_numbers_are_refused() -> None:
    logits = torch.ones(3, 4)
    logits[1] = float("nan")
    evaluator = TopKEvaluator(register([0, 1, 2], 4))
    with pytest.raises(NonFiniteError, match="the class logits of images 1 are NaN"):
        process(evaluator, logits, [0, 1, 2])


def test_half_precision_logits_are_compared_in_full() -> None:
    evaluator = TopKEvaluator(register([1], 3))
    process(evaluator, torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.bfloat16), [0])
    assert evaluator.evaluate()["classification"]["top1"] == 100.0


@pytest.mark.parametrize(
    ("ids", "output", "message"),
    [
        ([9], {"class_logits": torch.zeros(3)}, "image 9 is not in the data set"),
        ([0], {"panoptic_seg": None}, "does not classify images"),
        ([0], {"class_logits": torch.zeros(4)}, r"shape \(4,\), but the data set .* has 3 classes"),
    ],
)
def test_unusable_outputs_are_reported(ids: list[int], output: dict, message: str) -> None:
    evaluator = TopKEvaluator(register([0, 1], 3))
    with pytest.raises(UserError, match=message):
        evaluator.process([{"image_id": i} for i in ids], [output])


def test_a_part_of_the_data_set_needs_permission(caplog: pytest.LogCaptureFixture) -> None:
    name = register([0, 1], 3)
    evaluator = TopKEvaluator(name)
    process(evaluator, torch.eye(3), [1])
    with pytest.raises(UserError, match=r"1 of the 2 images of .* with the id 0"):
        evaluator.evaluate()
    evaluator = TopKEvaluator(name, allow_subset=True)
    process(evaluator, torch.eye(3), [1])
    assert evaluator.evaluate()["classification"]["top1"] == 100.0
    assert "that of a subset" in caplog.text


def _evaluate_a_share(folder: Path) -> None:
    """Evaluate every other image; the second process repeats the first image at its end."""
    rank = comm.get_rank()
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 6)))
    evaluator = TopKEvaluator(register([0, 1, 2, 3, 4], 6, "shared_set"))
    process(evaluator, logits, [*range(rank, 5, 2), *([0] if rank else [])])
    (folder / f"{rank}.json").write_text(json.dumps(evaluator.evaluate()))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    launch_processes(_evaluate_a_share, 2, args=(tmp_path,))
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 6)))
    expected = accuracy(logits, torch.arange(5), topk=(1, 5))
    assert json.loads((tmp_path / "1.json").read_text()) == {}
    result = json.loads((tmp_path / "0.json").read_text())["classification"]
    assert list(result.values()) == pytest.approx([float(x) for x in expected])
    assert result["top1"] < 100
