"""The rules of panoptic inference as tensor operations give what the rules of evaluation give."""

import pytest
import torch
from torch import Tensor

from batchformer_panoptic.deployment.merging import (
    KeptQueries,
    SegmentBatch,
    check_merge,
    enlarge,
    keep_queries,
    merge_batch,
    pixels_of_images,
)
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.postprocessing.masks import ImageMasks
from batchformer_panoptic.modeling.postprocessing.panoptic import (
    MERGES,
    PanopticOptions,
    merge_panoptic,
)

THINGS = (0, 1)
PADDED = (48, 64)
IMAGE_SIZES = [(48, 64), (31, 50), (40, 17)]
OUTPUT_SIZES = [(48, 64), (70, 45), (33, 80)]


def blobs(batch: int, queries: int) -> Tensor:
    """Smooth random mask logits, which overlap."""
    noise = torch.randn(batch, queries, 4, 5)
    size = (PADDED[0] // 4, PADDED[1] // 4)
    return 4 * torch.nn.functional.interpolate(noise, size=size, mode="bicubic") - 1


def segments_of(
    masks: Tensor, used: Tensor, scores: Tensor, labels: Tensor, name: str, options: PanopticOptions
) -> SegmentBatch:
    query, kept = keep_queries(used, scores, labels, THINGS)
    index = query[:, :, None, None].expand(-1, -1, *masks.shape[2:])
    sizes = torch.tensor(OUTPUT_SIZES)
    logits = enlarge(masks.gather(1, index), PADDED, torch.tensor(IMAGE_SIZES), sizes)
    inside = pixels_of_images(sizes, (logits.shape[2], logits.shape[3]))
    return merge_batch(logits, inside, kept, merge=MERGES[name], options=options)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("strongest", PanopticOptions(min_area=40)),
        ("strongest", PanopticOptions(min_area=120, mask_threshold=0.5, duplicate_iou=0.3)),
        ("mask2former", PanopticOptions(overlap_threshold=0.8)),
        ("mask2former", PanopticOptions(overlap_threshold=0.4, duplicate_iou=0.2)),
    ],
)
def test_a_batch_gets_the_segments_of_its_images(
    name: str, options: PanopticOptions, seed: int
) -> None:
    torch.manual_seed(seed)
    masks, scores = blobs(3, 9), torch.rand(3, 9)
    labels = torch.randint(4, (3, 9))
    used = torch.rand(3, 9) < torch.tensor([0.9, 0.5, 0.0])[:, None]
    found = segments_of(masks, used, scores, labels, name, options)
    for i, (height, width) in enumerate(OUTPUT_SIZES):
        expected_map, expected = merge_panoptic(
            ImageMasks(
                masks[i][used[i]],
                padded_size=PADDED,
                image_size=IMAGE_SIZES[i],
                output_size=(height, width),
            ),
            scores[i][used[i]],
            labels[i][used[i]],
            merge=MERGES[name],
            thing_class_ids=THINGS,
            options=options,
        )
        torch.testing.assert_close(found.segment_map[i, :height, :width], expected_map)
        assert found.segment_map[i].count_nonzero() == expected_map.count_nonzero()
        count = len(expected)
        assert found.labels[i, :count].tolist() == [s["category_id"] for s in expected]
        assert found.areas[i, :count].tolist() == [s["area"] for s in expected]
        torch.testing.assert_close(
            found.scores[i, :count], torch.tensor([s["score"] for s in expected])
        )
        for field in (found.labels, found.scores, found.areas):
            assert not field[i, count:].any()


def test_used_queries_come_first_in_their_order() -> None:
    used = torch.tensor([[False, True, False, True], [False, False, False, True]])
    query, kept = keep_queries(used, torch.rand(2, 4), torch.tensor([[0, 1, 2, 3]] * 2), THINGS)
    assert query[0].tolist() == [1, 3]
    assert query[1, 0] == 3
    assert kept.valid.tolist() == [[True, True], [True, False]]
    assert kept.is_thing[0].tolist() == [True, False]


def test_enlarged_masks_are_those_of_evaluation() -> None:
    masks = blobs(3, 4)
    enlarged = enlarge(masks, PADDED, torch.tensor(IMAGE_SIZES), torch.tensor(OUTPUT_SIZES))
    for i, (height, width) in enumerate(OUTPUT_SIZES):
        expected = ImageMasks(
            masks[i], padded_size=PADDED, image_size=IMAGE_SIZES[i], output_size=(height, width)
        ).at_output_size()
        torch.testing.assert_close(enlarged[i, :, :height, :width], expected, atol=1e-4, rtol=1e-5)


def test_a_batch_without_queries_is_void() -> None:
    kept = KeptQueries(
        torch.zeros(1, 1, dtype=torch.bool),
        torch.zeros(1, 1),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(1, 1, dtype=torch.bool),
    )
    inside = torch.ones(1, 5, 6, dtype=torch.bool)
    for name in ("strongest", "mask2former"):
        found = merge_batch(
            torch.ones(1, 1, 5, 6), inside, kept, merge=MERGES[name], options=PanopticOptions()
        )
        assert not found.segment_map.any()
        assert not found.areas.any()


def test_the_published_rule_is_refused() -> None:
    with pytest.raises(UserError, match="MERGE_TEST published cannot be exported"):
        check_merge(MERGES["published"])
