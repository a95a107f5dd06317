import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks
from PIL import Image
from torch.nn import functional as F

from batchformer_panoptic.modeling.postprocessing.masks import (
    ImageMasks,
    boxes_to_pixels,
    mask_boxes,
    mask_scores,
    resize_map,
    semantic_map,
)
from helpers.commands import load_script


def test_padding_is_cropped_before_resizing():
    """The defect of the published code: resizing the padded mask to the un-padded size."""
    image = torch.randn(2, 12, 16)
    padded = F.pad(image, (0, 24, 0, 12), value=-9.0)  # 24 x 40, at stride 4 of 96 x 160
    sizes = {"image_size": (48, 64), "output_size": (96, 128)}
    single = ImageMasks(image, padded_size=(48, 64), **sizes)
    batched = ImageMasks(padded, padded_size=(96, 160), **sizes)
    # The last cells interpolate into the padding.
    torch.testing.assert_close(
        batched.at_image_size()[:, :44, :60], single.at_image_size()[:, :44, :60]
    )
    torch.testing.assert_close(
        batched.at_output_size()[:, :88, :120], single.at_output_size()[:, :88, :120]
    )
    assert batched.at_image_size().shape == (2, 48, 64)
    assert batched.at_output_size().shape == (2, 96, 128)


@pytest.mark.parametrize("resized_before", [False, True])
@pytest.mark.parametrize(
    "index", [torch.tensor([True, False, True]), torch.tensor([2, 0]), torch.tensor([False] * 3)]
)
def test_some_masks_are_those_of_all(index, resized_before):
    masks = ImageMasks(
        torch.randn(3, 5, 6).half(), padded_size=(20, 24), image_size=(18, 20), output_size=(9, 30)
    )
    expected = masks.at_output_size()[index]
    if not resized_before:
        masks._at_output = None
    chosen = masks[index]
    assert len(chosen) == len(expected)
    assert torch.equal(chosen.at_output_size(), expected)
    assert torch.equal(chosen.at_image_size(), masks.at_image_size()[index])
    assert chosen.at_output_size().dtype == torch.float32


def test_perfect_masks_survive_the_resizing():
    truth = torch.zeros(1, 32, 48)
    truth[:, 8:24, 12:40] = 1
    logits = F.avg_pool2d(truth, 4) * 2 - 1
    sizes = {"padded_size": (32, 48), "image_size": (32, 48), "output_size": (32, 48)}
    out = ImageMasks(logits, **sizes).at_output_size() > 0
    both = (out & (truth > 0)).sum() / (out | (truth > 0)).sum()
    assert both > 0.95


@pytest.mark.parametrize("count", [0, 1, 16, 40])
def test_a_semantic_map_is_the_sum_over_queries(count):
    sizes = {"padded_size": (32, 48), "image_size": (30, 40), "output_size": (45, 60)}
    masks, probabilities = ImageMasks(torch.randn(count, 8, 12), **sizes), torch.rand(count, 5)
    found = semantic_map(masks, probabilities)
    expected = torch.einsum("qc,qhw->chw", probabilities, masks.at_output_size().sigmoid())
    torch.testing.assert_close(found, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(semantic_map(masks, probabilities), found)


def test_memory_of_a_semantic_map_does_not_grow_with_the_queries():
    peak_bytes = load_script("benchmarks/measure.py").peak_bytes
    sizes = {"padded_size": (256, 256), "image_size": (256, 256), "output_size": (256, 256)}
    peaks = [
        peak_bytes(
            lambda count=count: semantic_map(
                ImageMasks(torch.randn(count, 64, 64), **sizes), torch.rand(count, 5)
            )
        )
        for count in (32, 128)
    ]
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 70 * 256**2 * 4  # of 128 masks and more


def test_the_score_of_a_mask_is_its_mean_probability_inside():
    masks = torch.randn(20, 6, 7)
    masks[3] = -1
    expected = [m[m > 0].sigmoid().mean() if (m > 0).any() else torch.tensor(0.0) for m in masks]
    size = (6, 7)
    found = ImageMasks(masks, padded_size=size, image_size=size, output_size=size)
    torch.testing.assert_close(mask_scores(found), torch.stack(expected))
    assert mask_scores(found[:0]).shape == (0,)


@pytest.mark.parametrize("count", [0, 1, 30])
def test_boxes_of_masks_are_those_of_detectron2(count):
    masks = torch.rand(count, 9, 13) > torch.linspace(0.9, 1, count)[:, None, None]
    masks[:1] = True
    masks[1:2] = False
    boxes = mask_boxes(masks)
    assert torch.equal(boxes, BitMasks(masks).get_bounding_boxes().tensor)
    assert boxes.shape == (count, 4)
    assert count < 30 or not masks.flatten(1).any(1).all()


def test_maps_are_resized_as_pillow_does():
    lengths = [1, 2, 3, 7, 10, 15, 33, 48, 96, 100]
    for length in lengths:
        for new_length in lengths:
            values = torch.arange(3 * length).view(length, 3)
            expected = Image.fromarray(values.numpy().astype(np.int32)).resize(
                (5, new_length), Image.Resampling.NEAREST
            )
            found = resize_map(values, (new_length, 5))
            assert found.dtype == values.dtype
            assert found.tolist() == np.asarray(expected).tolist(), (length, new_length)


def test_boxes_are_scaled_and_clipped():
    boxes = torch.tensor([[0.5, 0.5, 0.5, 1.0], [0.9, 0.1, 0.4, 0.4]])
    expected = torch.tensor([[25.0, 0.0, 75.0, 40.0], [70.0, 0.0, 100.0, 12.0]])
    torch.testing.assert_close(boxes_to_pixels(boxes, (40, 100)), expected)
