"""Panoptic segments equal recorded ones of the public code (PostProcessPanoptic of DETR)."""

from typing import Any

import pytest
import torch

from batchformer_panoptic.modeling.postprocessing.masks import resize_map
from batchformer_panoptic.modeling.postprocessing.panoptic import MERGES, PanopticOptions
from batchformer_panoptic.modeling.postprocessing.results import (
    ChosenQueries,
    InferenceOptions,
    select_queries,
    to_result,
)
from batchformer_panoptic.modeling.set_prediction.scoring import Decoded, SoftmaxScoring
from helpers.golden_models import load_golden

GOLDEN = load_golden("detr_postprocess_panoptic.pt")
CASES = GOLDEN["cases"]
# The images of every case, as (case, number of the image).
IMAGES = [(name, i) for name, case in CASES.items() for i in range(len(case["results"]))]


def sizes_of(case: dict[str, Any]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(height, width) of the images as the network saw them, and of the outputs."""
    processed = [tuple(size) for size in case["processed_sizes"]]
    target = case["target_sizes"]
    return processed, processed if target is None else [tuple(size) for size in target]


def padded_size_of(case: dict[str, Any]) -> tuple[int, int]:
    """(height, width) that the images of a case were padded to: no more than the largest."""
    processed, _ = sizes_of(case)
    return max(size[0] for size in processed), max(size[1] for size in processed)


def is_padded(case: dict[str, Any], image: int) -> bool:
    """Whether the public code has its batch defect here: it does not crop the padding."""
    return sizes_of(case)[0][image] != padded_size_of(case)


PADDED = [(name, i) for name, i in IMAGES if is_padded(CASES[name], i)]
UNPADDED = [(name, i) for name, i in IMAGES if not is_padded(CASES[name], i)]


def choose(case: dict[str, Any], merge: str) -> tuple[Decoded, ChosenQueries, InferenceOptions]:
    options = InferenceOptions(
        tuple(label for label, is_thing in case["is_thing_map"].items() if is_thing),
        PanopticOptions(score_threshold=case["threshold"]),
        MERGES[merge],
        instances=False,
    )
    logits = case["pred_logits"].float()
    decoded = SoftmaxScoring(logits.shape[-1] - 1).decode(logits)
    return decoded, select_queries(decoded, options, has_masks=True), options


def segment(name: str, image: int, merge: str, padded_size: tuple[int, int] | None = None):
    """Map and segments of one image, from recorded logits through the model's own path."""
    case = CASES[name]
    decoded, chosen, options = choose(case, merge)
    processed, target = sizes_of(case)
    result = to_result(
        chosen.of_image(image),
        decoded.scores[image],
        decoded.labels[image],
        case["pred_boxes"][image].float(),
        case["pred_masks"][image][chosen.any_use[image]].float(),
        padded_size=padded_size or padded_size_of(case),
        image_size=processed[image],
        output_size=target[image],
        options=options,
    )
    assert set(result) == {"panoptic_seg"}
    return result["panoptic_seg"]


def recorded(name: str, image: int) -> tuple[torch.Tensor, list[tuple[int, int, bool, int]]]:
    """The published map and segments, with ids from 1; there is no void unless nothing is found."""
    result = CASES[name]["results"][image]
    infos = result["segments_info"]
    segment_map = result["segment_ids"].int() + 1
    return segment_map if infos else torch.zeros_like(segment_map), [
        (info["id"] + 1, info["category_id"], info["isthing"], info["area"]) for info in infos
    ]


def listed(segments: list[dict[str, Any]]) -> list[tuple[int, int, bool, int]]:
    return [(s["id"], s["category_id"], s["isthing"], s["area"]) for s in segments]


def test_the_file_has_images_that_the_batch_defect_does_not_touch():
    assert len(UNPADDED) >= 1


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if len(case["results"]) == 1]
)
def test_kept_queries_are_the_recorded_ones(name):
    chosen = choose(CASES[name], "published")[1]
    assert chosen.panoptic[0].nonzero()[:, 0].tolist() == CASES[name]["kept_queries"].tolist()


@pytest.mark.parametrize(("name", "image"), UNPADDED)
def test_published_segments_are_identical(name, image):
    segment_map, segments = segment(name, image, "published")
    expected_map, expected_segments = recorded(name, image)
    assert listed(segments) == expected_segments
    assert torch.equal(segment_map, expected_map)


@pytest.mark.parametrize(("name", "image"), PADDED)
def test_padded_images_differ_by_the_cropping_alone(name, image):
    expected_map, expected_segments = recorded(name, image)
    # As if the padded map were a map of the image: that is what the public code does.
    image_size = sizes_of(CASES[name])[0][image]
    segment_map, segments = segment(name, image, "published", padded_size=image_size)
    assert listed(segments) == expected_segments
    assert torch.equal(segment_map, expected_map)
    if len(expected_segments) > 1:
        cropped_map, _ = segment(name, image, "published")
        assert not torch.equal(cropped_map, expected_map)


@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_strongest_merges_stuff_and_loses_no_pixel(name, image):
    segment_map, segments = segment(name, image, "strongest")
    ids, counts = segment_map.unique(return_counts=True)
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == (
        {s["id"]: s["area"] for s in segments} or {0: segment_map.numel()}
    )
    stuff = [s["category_id"] for s in segments if not s["isthing"]]
    assert len(stuff) == len(set(stuff))


@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_strongest_leaks_no_pixel_to_another_class(name, image):
    """Each pixel has the class of its strongest mask, but for those of segments too small."""
    case = CASES[name]
    decoded, chosen, options = choose(case, "strongest")
    kept = chosen.panoptic[image]
    if not kept.any():
        return
    segment_map, segments = segment(name, image, "strongest")
    processed, target = sizes_of(case)
    masks = torch.nn.functional.interpolate(
        case["pred_masks"][image][kept].float()[None], padded_size_of(case), mode="bilinear"
    )[..., : processed[image][0], : processed[image][1]]
    if target[image] != processed[image]:
        masks = torch.nn.functional.interpolate(masks, target[image], mode="bilinear")
    winner = masks[0].argmax(0)
    labels = decoded.labels[image][kept]
    expected = labels[winner]
    areas = torch.bincount(winner.flatten(), minlength=len(labels))
    is_thing = torch.isin(labels, torch.tensor(options.thing_class_ids))
    merged_area = torch.where(is_thing, areas, (labels[:, None] == labels).float() @ areas.float())
    stays = (merged_area > options.panoptic.min_area)[winner]
    classes = torch.tensor([-1] + [s["category_id"] for s in segments])
    assert torch.equal(classes[segment_map.long()][stays], expected[stays])


def repeated_stuff(name: str, image: int) -> bool:
    """Whether several kept queries have one stuff class: the published code loses their pixels."""
    decoded, chosen, options = choose(CASES[name], "published")
    labels = decoded.labels[image][chosen.panoptic[image]].tolist()
    stuff = [label for label in labels if label not in options.thing_class_ids]
    return len(stuff) > len(set(stuff))


def test_the_recorded_leak_is_real():
    """Otherwise the tests above would not tell the merges apart."""
    candidates = [(name, image) for name, image in UNPADDED if repeated_stuff(name, image)]
    if not candidates:
        pytest.skip("no image in this file has a stuff class twice")
    ours, published = (
        sum(
            s["area"]
            for name, image in candidates
            for s in segment(name, image, merge)[1]
            if not s["isthing"]
        )
        for merge in ("strongest", "published")
    )
    assert ours > 1.1 * published


def test_maps_are_resized_as_recorded():
    check = GOLDEN["pil_nearest_check"]
    resized = resize_map(check["input"], tuple(check["size"]))
    assert torch.equal(resized, check["output"].long())
