"""Perfect masks keep almost all of their panoptic quality, in any batch.

The public code gives PQ 95 with one image per batch and half of that with two, because it resizes
the padded mask to the size of the image.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from detectron2.evaluation import inference_on_dataset
from torch.nn import functional as F

from batchformer_panoptic.evaluation import PanopticEvaluator, PanopticQuality
from batchformer_panoptic.modeling.postprocessing.masks import ImageMasks
from batchformer_panoptic.modeling.postprocessing.panoptic import MERGES
from batchformer_panoptic.modeling.postprocessing.results import InferenceOptions
from helpers.panoptic_sets import CATEGORIES, registered
from helpers.perfect_masks import THING_CLASS_IDS, PerfectModel, inputs_of, shapes_image

SIZES = [(192, 288), (312, 240), (180, 180), (197, 349), (288, 192), (375, 211), (192, 288)]


class Score(NamedTuple):
    pq: float  # in percent
    counts: list[tuple[int, int, int]]  # TP, FP, FN of each class


def score(
    folder: Path,
    batch_size: int,
    *,
    merge: str = "strongest",
    pad_images: bool = True,
    size_divisibility: int = 0,
    scale: float = 1.0,
) -> Score:
    images = [shapes_image(seed, size) for seed, size in enumerate(SIZES)]
    inputs = inputs_of(images, scale)
    options = InferenceOptions(THING_CLASS_IDS, merge=MERGES[merge], pad_images=pad_images)
    model = PerfectModel(options, num_classes=len(CATEGORIES), size_divisibility=size_divisibility)
    batches = [inputs[i : i + batch_size] for i in range(0, len(inputs), batch_size)]
    with registered("perfect", folder / f"batch{batch_size}", images) as name:
        evaluator = PanopticEvaluator(name)
        results = inference_on_dataset(model, batches, evaluator)
    counts = evaluator._counts
    for _, recent in evaluator._recent:
        counts += recent
    quality = PanopticQuality.from_counts(counts.pq, {row["id"]: row for row in CATEGORIES})
    rows = [(row.tp, row.fp, row.fn) for row in quality.per_class]
    return Score(results["panoptic_seg"]["PQ"], rows)


@pytest.mark.parametrize("merge", list(MERGES))
@pytest.mark.parametrize(
    "settings",
    [
        {"pad_images": True},
        {"pad_images": True, "size_divisibility": 32},
        {"pad_images": True, "scale": 1.3},
        {"pad_images": False, "size_divisibility": 32},
    ],
    ids=["padded", "divisible", "resized", "in turn"],
)
def test_perfect_masks_score_95_in_batches_of_1_2_and_4(tmp_path, merge, settings):
    scores = [score(tmp_path, size, merge=merge, **settings) for size in (1, 2, 4)]
    assert [s.pq >= 95 for s in scores] == [True] * 3, [s.pq for s in scores]
    assert scores[0].counts == scores[1].counts == scores[2].counts
    assert sum(tp for tp, _, _ in scores[0].counts) > 4 * len(SIZES)
    assert all(fp == fn == 0 for _, fp, fn in scores[0].counts)
    # The rest is lost in the last cell of a map, which blends into the padding.
    assert scores[1].pq == pytest.approx(scores[0].pq, abs=0.5)
    assert scores[2].pq == pytest.approx(scores[0].pq, abs=0.5)


def test_images_in_turn_score_the_same_to_the_last_digit(tmp_path):
    scores = [score(tmp_path, size, pad_images=False) for size in (1, 2, 4)]
    assert scores[0] == scores[1] == scores[2]


def _uncropped(masks: ImageMasks) -> torch.Tensor:
    """Resize like the public code, which treats the padded map as that of the image."""
    return F.interpolate(masks.logits[:, None], masks.image_size, mode="bilinear")[:, 0]


@pytest.mark.parametrize("merge", list(MERGES))
def test_the_published_resizing_would_be_noticed(tmp_path, monkeypatch, merge):
    monkeypatch.setattr(ImageMasks, "at_image_size", _uncropped)
    scores = [score(tmp_path, size, merge=merge).pq for size in (1, 2, 4)]
    assert scores[0] >= 95
    assert scores[1] < 75
    assert scores[2] < scores[1]
