"""The panoptic merges on masks of a few pixels, and against loops over pixels."""

import pytest
import torch
from torch.nn import functional as F

from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.postprocessing.masks import ImageMasks
from batchformer_panoptic.modeling.postprocessing.panoptic import (
    MERGES,
    PanopticOptions,
    merge_mask2former,
    merge_panoptic,
    merge_published,
    merge_strongest,
    without_duplicates,
)
from batchformer_panoptic.modeling.postprocessing.results import InferenceOptions
from helpers.tiny_model import tiny_cfg

THINGS = (0, 1)
STUFF = 2


def masks_of(*rows: str) -> torch.Tensor:
    """Mask logits of one image row: a digit is the logit of a pixel, 0 stands for -5."""
    values = torch.tensor([[float(c) if c != "0" else -5.0 for c in row] for row in rows])
    return values[:, None]


def merge(
    logits, labels, *, scores=None, merge=merge_strongest, image_size=None, size=None, **options
):
    """Merge masks that cover their image; it has their size unless another is given."""
    image_size = image_size or tuple(logits.shape[-2:])
    masks = ImageMasks(
        logits, padded_size=image_size, image_size=image_size, output_size=size or image_size
    )
    return merge_panoptic(
        masks,
        torch.full((len(labels),), 0.9) if scores is None else torch.tensor(scores),
        torch.tensor(labels, dtype=torch.int64),
        merge=merge,
        thing_class_ids=THINGS,
        options=PanopticOptions(**{"min_area": 0, **options}),
    )


def random_masks(seed: int, num_queries: int = 9):
    """(Q, 24, 32) smooth logits with random labels and scores."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_queries, 3, 4, generator=generator) * 3
    logits = F.interpolate(coarse[:, None], size=(24, 32), mode="bilinear")[:, 0]
    labels = torch.randint(4, (num_queries,), generator=generator).tolist()
    scores = torch.rand(num_queries, generator=generator).tolist()
    return logits, labels, scores


def test_strongest_mask_takes_the_pixel_whatever_its_score():
    segment_map, segments = merge(masks_of("1120", "0031"), [0, 1], scores=[0.99, 0.5])
    assert segment_map.tolist() == [[1, 1, 2, 2]]
    assert [(s["id"], s["category_id"], s["isthing"], s["area"]) for s in segments] == [
        (1, 0, True, 2),
        (2, 1, True, 2),
    ]
    assert [s["score"] for s in segments] == pytest.approx([0.99, 0.5])


@pytest.mark.parametrize("name", ["strongest", "mask2former"])
def test_things_of_one_class_stay_apart_and_stuff_is_one_segment(name):
    masks = masks_of("900000", "090000", "009000", "000999")
    segment_map, segments = merge(
        masks, [0, 0, STUFF, STUFF], scores=[0.9, 0.8, 0.6, 0.7], merge=MERGES[name]
    )
    assert segment_map.tolist() == [[1, 2, 3, 3, 3, 3]]
    assert [s["category_id"] for s in segments] == [0, 0, STUFF]
    assert segments[-1]["area"] == 4
    assert [s["score"] for s in segments] == pytest.approx([0.9, 0.8, 0.7])


def test_merged_stuff_leaks_to_other_segments_as_published_alone():
    # Twice the same stuff; a thing of one pixel goes on, weakly, under the second.
    masks = masks_of("99990000", "00009990", "00002229")
    expected = {
        "strongest": ([[1, 1, 1, 1, 1, 1, 1, 2]], [7, 1]),
        "published": ([[1, 1, 1, 1, 2, 2, 2, 2]], [4, 4]),
        "mask2former": ([[1, 1, 1, 1, 1, 1, 1, 0]], [7]),  # most of the thing is covered
    }
    for name, (ids, areas) in expected.items():
        segment_map, segments = merge(masks, [STUFF, STUFF, 0], merge=MERGES[name])
        assert segment_map.tolist() == ids, name
        assert [s["area"] for s in segments] == areas, name


def test_small_segments_go_to_the_next_best_mask():
    masks = masks_of("55555", "00900", "44444")
    for name in ("strongest", "published"):
        segment_map, segments = merge(masks, [0, 1, STUFF], min_area=1, merge=MERGES[name])
        assert segment_map.tolist() == [[1] * 5]
        assert [(s["id"], s["area"]) for s in segments] == [(1, 5)]
    segment_map, _ = merge(masks, [0, 1, STUFF], min_area=1, merge=merge_mask2former)
    assert segment_map.tolist() == [[1, 1, 2, 1, 1]]  # Mask2Former knows no smallest area


def test_weak_pixels_are_void_when_asked():
    masks = torch.tensor([[[2.0, 2.0, -0.1, -3.0]]])
    assert merge(masks, [0])[0].tolist() == [[1, 1, 1, 1]]
    assert merge(masks, [0], mask_threshold=0.5)[0].tolist() == [[1, 1, 0, 0]]
    assert merge(masks, [0], merge=merge_published)[0].tolist() == [[1, 1, 1, 1]]
    assert merge(masks, [0], merge=merge_mask2former)[0].tolist() == [[1, 1, 0, 0]]


def test_two_things_on_one_object_split_it_unless_duplicates_are_dropped():
    masks, labels, scores = masks_of("9900", "1199"), [0, 1], [0.9, 0.8]
    masks[0, 0, 2:] = masks[1, 0, :2] = 1.0  # both claim everything
    assert merge(masks, labels, scores=scores)[0].tolist() == [[1, 1, 2, 2]]
    for name in MERGES:
        segment_map, segments = merge(
            masks, labels, scores=scores, merge=MERGES[name], duplicate_iou=0.5
        )
        assert segment_map.tolist() == [[1, 1, 1, 1]], name
        assert segments[0]["category_id"] == 0, name
    better_second = merge(masks, labels, scores=[0.8, 0.9], duplicate_iou=0.5)[1]
    assert [s["category_id"] for s in better_second] == [1]
    with_stuff = merge(masks, [0, STUFF], scores=scores, duplicate_iou=0.5)[1]
    assert [s["category_id"] for s in with_stuff] == [0, STUFF]  # stuff is no duplicate
    apart = merge(masks_of("9900", "0099"), labels, scores=scores, duplicate_iou=0.5)[1]
    assert len(apart) == 2


@pytest.mark.parametrize("name", list(MERGES))
def test_nothing_kept_is_all_void(name):
    for options in ({}, {"duplicate_iou": 0.5}):
        segment_map, segments = merge(
            torch.zeros(0, 3, 4), [], merge=MERGES[name], size=(5, 6), **options
        )
        assert segment_map.dtype == torch.int32
        assert torch.equal(segment_map, torch.zeros(5, 6, dtype=torch.int32))
        assert segments == []
    weak = torch.full((1, 1, 3), -1.0)  # too small for the one merge, too weak for the other
    segment_map, segments = merge(weak, [0], merge=MERGES[name], min_area=3)
    assert segment_map.tolist() == [[0, 0, 0]]
    assert segments == []


@pytest.mark.parametrize("name", list(MERGES))
@pytest.mark.parametrize("seed", range(5))
def test_map_and_list_agree_on_random_masks(name, seed):
    logits, labels, scores = random_masks(seed)
    before = logits.clone()
    segment_map, segments = merge(
        logits, labels, scores=scores, merge=MERGES[name], size=(30, 27), min_area=6
    )
    assert torch.equal(logits, before)
    assert segment_map.shape == (30, 27)
    assert segment_map.dtype == torch.int32
    ids, counts = segment_map.unique(return_counts=True)
    listed = {s["id"]: s["area"] for s in segments}
    found = {int(i): int(c) for i, c in zip(ids, counts, strict=True) if i > 0}
    assert found == listed
    assert list(listed) == list(range(1, len(segments) + 1))
    assert all(s["isthing"] == (s["category_id"] in THINGS) for s in segments)
    stuff = [s["category_id"] for s in segments if not s["isthing"]]
    assert len(stuff) == len(set(stuff))
    if name != "mask2former":
        assert all(area > 6 for area in listed.values())
        assert 0 not in ids


def test_published_resizes_the_map_of_segments_and_not_the_masks():
    # In between two pixels the masks would cross elsewhere than half way.
    masks = torch.tensor([[[8.0, -8.0]], [[-8.0, 0.0]]])
    found = {
        name: merge(masks, [0, 1], merge=MERGES[name], size=(1, 16))[0][0].tolist()
        for name in ("strongest", "published")
    }
    assert found["published"] == [1] * 8 + [2] * 8
    assert found["strongest"].count(1) > 8


def test_published_compares_areas_at_the_output_size():
    masks = masks_of("9900", "0099")
    assert len(merge(masks, [0, 1], merge=merge_published, min_area=2)[1]) == 0
    enlarged = merge(masks, [0, 1], merge=merge_published, min_area=2, size=(2, 4))[1]
    assert [s["area"] for s in enlarged] == [4, 4]


def test_mask2former_weighs_masks_by_scores_and_drops_what_is_mostly_covered():
    # The second mask is weaker but surer; it wins 4 of its 5 pixels, the first 1 of its 5.
    masks = torch.full((2, 1, 6), -5.0)
    masks[0, 0, :5], masks[1, 0, 1:] = 2.0, 1.5
    arguments = {"scores": [0.5, 0.99], "merge": merge_mask2former}
    segment_map, segments = merge(masks, [0, 1], overlap_threshold=0.8, **arguments)
    assert segment_map.tolist() == [[0, 1, 1, 1, 1, 1]]  # what a dropped query won stays void
    assert [(s["category_id"], s["area"]) for s in segments] == [(1, 5)]
    segment_map, _ = merge(masks, [0, 1], overlap_threshold=0.2, **arguments)
    assert segment_map.tolist() == [[1, 2, 2, 2, 2, 2]]  # exactly the threshold is enough


def test_mask2former_counts_weak_pixels_among_those_a_query_wins():
    masks = torch.full((2, 1, 7), -5.0)
    masks[0, 0, :5], masks[0, 0, 5:], masks[1, 0, 3:5] = 2.0, -1.0, 3.0
    segment_map, _ = merge(masks, [0, 1], merge=merge_mask2former, overlap_threshold=0.8)
    assert segment_map.tolist() == [[1, 1, 1, 2, 2, 0, 0]]  # wins 5 pixels, has 5, keeps 3


def mask2former_by_pixel(logits, labels, scores, overlap_threshold):
    """Mask2Former's description, one pixel and one query after the other."""
    probabilities = logits.sigmoid()
    height, width = logits.shape[1:]
    winner = [
        [
            max(range(len(labels)), key=lambda q: float(scores[q] * probabilities[q, y, x]))
            for x in range(width)
        ]
        for y in range(height)
    ]
    pixels = [(y, x) for y in range(height) for x in range(width)]
    segment_map, classes, stuff = torch.zeros(height, width, dtype=torch.int32), [], {}
    for q, label in enumerate(labels):
        won = [(y, x) for y, x in pixels if winner[y][x] == q]
        own = [(y, x) for y, x in pixels if probabilities[q, y, x] >= 0.5]
        final = set(won) & set(own)
        if not final or len(won) / len(own) < overlap_threshold:
            continue
        if label in THINGS or label not in stuff:
            classes.append(label)
            stuff[label] = len(classes)
        for y, x in final:
            segment_map[y, x] = len(classes) if label in THINGS else stuff[label]
    return segment_map, classes


@pytest.mark.parametrize("overlap_threshold", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_mask2former_equals_a_loop(seed, overlap_threshold):
    logits, labels, scores = random_masks(seed)
    scores = torch.tensor(scores) * 0.5 + 0.5
    segment_map, segments = merge(
        logits,
        labels,
        scores=scores.tolist(),
        merge=merge_mask2former,
        overlap_threshold=overlap_threshold,
    )
    expected_map, classes = mask2former_by_pixel(logits, labels, scores, overlap_threshold)
    assert torch.equal(segment_map, expected_map)
    assert [s["category_id"] for s in segments] == classes


@pytest.mark.parametrize("name", list(MERGES))
def test_the_config_names_the_merge(name):
    cfg = tiny_cfg(MODEL__PANOPTIC__MERGE_TEST=name, MODEL__PANOPTIC__OVERLAP_THRESHOLD_TEST=0.3)
    options = InferenceOptions.from_config(cfg)
    assert options.merge is MERGES[name]
    assert options.panoptic.overlap_threshold == 0.3


def test_strongest_is_the_default():
    assert InferenceOptions.from_config(tiny_cfg()).merge is merge_strongest
    assert InferenceOptions(()).merge is merge_strongest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MERGE_TEST": "best"}, "MERGE_TEST is 'best'; known: strongest, published, mask2former"),
        (
            {"MERGE_TEST": "published", "MASK_THRESHOLD_TEST": 0.5},
            "MASK_THRESHOLD_TEST is 0.5, which MODEL.PANOPTIC.MERGE_TEST published",
        ),
        ({"MERGE_TEST": "mask2former", "MASK_THRESHOLD_TEST": 0.7}, "is 0.7, .* set it to 0.0"),
    ],
)
def test_settings_that_no_merge_knows_are_refused(settings, message):
    cfg = tiny_cfg(**{f"MODEL__PANOPTIC__{key}": value for key, value in settings.items()})
    with pytest.raises(UserError, match=message):
        InferenceOptions.from_config(cfg)


def test_duplicates_are_counted_in_full_precision():
    """Areas that half precision cannot tell apart decide."""
    logits = torch.full((2, 64, 64), -1.0)
    logits[0, :, :40] = 1
    logits[1, :, 20:60] = 1  # IoU 1/3
    logits[1, 0, 0] = 1  # a little more than 1/3, lost in eight bits
    size = (64, 64)
    masks = ImageMasks(logits, padded_size=size, image_size=size, output_size=size)
    arguments = (masks, torch.tensor([0.9, 0.8]), torch.tensor([True, True]))
    exact = 1281 / (2560 + 2561 - 1281)
    with torch.autocast("cpu", torch.bfloat16):
        assert without_duplicates(*arguments, exact - 1e-5).tolist() == [0]
        assert without_duplicates(*arguments, exact + 1e-5).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [("MIN_AREA_TEST", -1), ("SCORE_THRESHOLD_TEST", 1.5), ("DUPLICATE_IOU_TEST", -0.1)],
)
def test_thresholds_have_ranges(key, value):
    cfg = tiny_cfg(**{f"MODEL__PANOPTIC__{key}": value})
    with pytest.raises(UserError, match=f"MODEL.PANOPTIC.{key} is {value}"):
        InferenceOptions.from_config(cfg)
