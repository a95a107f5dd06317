import torch
from torch.nn import functional as F

from batchformer_panoptic.modeling.postprocessing import (
    PanopticOptions,
    boxes_to_pixels,
    merge_panoptic,
    resize_masks,
)

THINGS = (0, 1)
STUFF = 2


def masks_of(*rows: str) -> torch.Tensor:
    """Mask logits of one image row: a digit is the logit of a pixel, 0 stands for -5."""
    values = torch.tensor([[float(c) if c != "0" else -5.0 for c in row] for row in rows])
    return values[:, None]


def merge(masks, labels, *, scores=None, **options):
    options = PanopticOptions(**{"min_area": 0, **options})
    scores = torch.full((len(labels),), 0.9) if scores is None else torch.tensor(scores)
    return merge_panoptic(
        masks, scores, torch.tensor(labels), thing_class_ids=THINGS, options=options
    )


def test_strongest_mask_takes_the_pixel_whatever_its_score():
    segment_map, segments = merge(masks_of("1120", "0031"), [0, 1], scores=[0.99, 0.5])
    assert segment_map.tolist() == [[1, 1, 2, 2]]
    assert [(s["id"], s["category_id"], s["isthing"], s["area"]) for s in segments] == [
        (1, 0, True, 2),
        (2, 1, True, 2),
    ]


def test_things_of_one_class_stay_apart_and_stuff_is_one_segment():
    masks = masks_of("900000", "090000", "009000", "000990")
    segment_map, segments = merge(masks, [0, 0, STUFF, STUFF])
    assert segment_map[0, :5].tolist() == [1, 2, 3, 3, 3]
    assert [s["category_id"] for s in segments] == [0, 0, STUFF]
    assert segments[-1]["area"] >= 3


def test_merged_stuff_does_not_leak_to_other_segments():
    # Twice the same stuff; a weak thing lies under the second. Published code gives it pixels.
    masks = masks_of("99990000", "00009999", "00002222")
    segment_map, segments = merge(masks, [STUFF, STUFF, 0])
    assert segment_map.tolist() == [[1] * 8]
    assert len(segments) == 1


def test_small_segments_go_to_the_next_best_mask():
    segment_map, segments = merge(masks_of("55555", "00900", "44444"), [0, 1, STUFF], min_area=1)
    assert segment_map.tolist() == [[1] * 5]
    assert [(s["id"], s["area"]) for s in segments] == [(1, 5)]


def test_weak_pixels_are_void_when_asked():
    masks = torch.tensor([[[2.0, 2.0, -0.1, -3.0]]])
    assert merge(masks, [0])[0].tolist() == [[1, 1, 1, 1]]
    assert merge(masks, [0], mask_threshold=0.5)[0].tolist() == [[1, 1, 0, 0]]


def test_two_things_on_one_object_split_it_unless_duplicates_are_dropped():
    masks, labels, scores = masks_of("9900", "1199"), [0, 1], [0.9, 0.8]
    masks[0, 0, 2:] = masks[1, 0, :2] = 1.0  # both claim everything
    assert merge(masks, labels, scores=scores)[0].tolist() == [[1, 1, 2, 2]]
    segment_map, segments = merge(masks, labels, scores=scores, duplicate_iou=0.5)
    assert segment_map.tolist() == [[1, 1, 1, 1]]
    assert segments[0]["category_id"] == 0
    better_second = merge(masks, labels, scores=[0.8, 0.9], duplicate_iou=0.5)[1]
    assert [s["category_id"] for s in better_second] == [1]
    with_stuff = merge(masks, [0, STUFF], scores=scores, duplicate_iou=0.5)[1]
    assert [s["category_id"] for s in with_stuff] == [0, STUFF]  # stuff is no duplicate
    apart = merge(masks_of("9900", "0099"), labels, scores=scores, duplicate_iou=0.5)[1]
    assert len(apart) == 2


def test_nothing_kept_is_all_void():
    segment_map, segments = merge(torch.zeros(0, 3, 4), [])
    assert segment_map.dtype == torch.int32
    assert torch.equal(segment_map, torch.zeros(3, 4, dtype=torch.int32))
    assert segments == []
    assert merge(torch.zeros(0, 3, 4), [], duplicate_iou=0.5)[1] == []
    segment_map, segments = merge(torch.ones(1, 1, 3), [0], min_area=3)
    assert segment_map.tolist() == [[0, 0, 0]]
    assert segments == []


def test_map_and_list_agree_on_random_masks():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(9, 3, 4, generator=generator) * 3
        masks = F.interpolate(coarse[:, None], size=(24, 32), mode="bilinear")[:, 0]
        labels = torch.randint(4, (9,), generator=generator)
        before = masks.clone()
        segment_map, segments = merge(masks, labels.tolist(), min_area=6, mask_threshold=0.5)
        assert torch.equal(masks, before)
        ids, counts = segment_map.unique(return_counts=True)
        listed = {s["id"]: s["area"] for s in segments}
        found = {int(i): int(c) for i, c in zip(ids, counts, strict=True) if i > 0}
        assert found == listed
        assert all(area > 6 for area in listed.values())
        assert sorted(listed) == list(range(1, len(segments) + 1))
        stuff = [s["category_id"] for s in segments if not s["isthing"]]
        assert len(stuff) == len(set(stuff))


def test_padding_is_cropped_before_resizing():
    """The defect of the published code: resizing the padded mask to the un-padded size."""
    image = torch.randn(2, 12, 16)
    padded = F.pad(image, (0, 24, 0, 12), value=-9.0)  # 24 x 40, at stride 4 of 96 x 160
    sizes = {"image_size": (48, 64), "output_size": (96, 128)}
    alone = resize_masks(image, padded_size=(48, 64), **sizes)
    batched = resize_masks(padded, padded_size=(96, 160), **sizes)
    inner = (slice(None), slice(0, 88), slice(0, 120))  # the last cells interpolate into padding
    torch.testing.assert_close(batched[inner], alone[inner])
    assert batched.shape == (2, 96, 128)


def test_perfect_masks_survive_the_resizing():
    truth = torch.zeros(1, 32, 48)
    truth[:, 8:24, 12:40] = 1
    logits = F.avg_pool2d(truth, 4) * 2 - 1
    out = resize_masks(logits, padded_size=(32, 48), image_size=(32, 48), output_size=(32, 48)) > 0
    both = (out & (truth > 0)).sum() / (out | (truth > 0)).sum()
    assert both > 0.95


def test_boxes_are_scaled_and_clipped():
    boxes = torch.tensor([[0.5, 0.5, 0.5, 1.0], [0.9, 0.1, 0.4, 0.4]])
    expected = torch.tensor([[25.0, 0.0, 75.0, 40.0], [70.0, 0.0, 100.0, 12.0]])
    torch.testing.assert_close(boxes_to_pixels(boxes, (40, 100)), expected)
