"""Class rows of other projects are mapped to the contiguous classes of a data set."""

import pytest
import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from batchformer_panoptic.checkpoint.conversion import SOURCES, Request
from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.errors import UserError
from helpers.conversion_models import official_boxes

CLASS_WEIGHT = "box_head.class_embed.weight"
PANOPTIC = ClassTable.from_categories(COCO_CATEGORIES)
DETECTION = ClassTable.from_categories([c for c in COCO_CATEGORIES if c["isthing"]])


def with_classes(num_rows: int) -> dict[str, Tensor]:
    """A DETR whose class row i holds nothing but i."""
    rows = torch.arange(num_rows + 1.0)
    weight = rows[:, None].expand(-1, 32).clone()
    return {**official_boxes(), "class_embed.weight": weight, "class_embed.bias": rows}


@pytest.mark.parametrize(("classes", "num_rows"), [(DETECTION, 91), (PANOPTIC, 250)])
def test_class_rows_become_contiguous(classes: ClassTable, num_rows: int) -> None:
    state = with_classes(num_rows)
    converted = SOURCES["detr"].convert(state, Request(classes))
    expected = torch.tensor([*classes.dataset_ids, num_rows], dtype=torch.float32)
    assert torch.equal(converted.model[CLASS_WEIGHT], expected[:, None].expand(-1, 32))
    assert torch.equal(converted.model["box_head.class_embed.bias"], expected)
    assert state["class_embed.bias"].shape == (num_rows + 1,)
    (note,) = [note for note in converted.notes if "class rows" in note]
    assert f"{classes.num_classes} of {num_rows} class rows are kept" in note
    assert "dropped are 0, 12, 26, 29-30, 45" in note


def test_every_class_row_may_be_kept() -> None:
    converted = SOURCES["detr"].convert(with_classes(91), Request(None))
    assert converted.model[CLASS_WEIGHT].shape == (92, 32)
    assert any("MODEL.DETR.NUM_CLASSES 91" in note for note in converted.notes)


def test_contiguous_rows_stay() -> None:
    converted = SOURCES["detr"].convert(with_classes(133), Request(PANOPTIC))
    assert torch.equal(converted.model["box_head.class_embed.bias"], torch.arange(134.0))


def test_too_few_class_rows_are_refused() -> None:
    with pytest.raises(
        UserError, match="91 class rows, which match neither the number of classes, 133, nor"
    ):
        SOURCES["detr"].convert(with_classes(91), Request(PANOPTIC))


def test_what_dropping_rows_does_to_the_softmax() -> None:
    """Every kept probability is divided by the probability of all that is kept."""
    state = official_boxes()
    generator = torch.Generator().manual_seed(1)
    state["class_embed.weight"] = torch.randn(92, 32, generator=generator)
    state["class_embed.bias"] = torch.randn(92, generator=generator)
    queries = torch.randn(50, 32, generator=generator)
    before = queries @ state["class_embed.weight"].T + state["class_embed.bias"]
    model = SOURCES["detr"].convert(state, Request(DETECTION)).model
    after = queries @ model[CLASS_WEIGHT].T + model["box_head.class_embed.bias"]
    kept = before.softmax(-1)[:, [*DETECTION.dataset_ids, 91]]
    torch.testing.assert_close(after.softmax(-1), kept / kept.sum(-1, keepdim=True))
    assert torch.equal(after.argsort(-1), kept.argsort(-1))
    assert (after.softmax(-1) >= kept).all()
