"""Masks of chosen objects are made when they are needed, a few at a time."""

import pytest
import torch
from torch.nn import functional as F

from batchformer_panoptic.modeling.set_prediction.targets import (
    ImageTarget,
    SegmentMap,
    TargetBatch,
)
from helpers.commands import load_script

OBJECTS = 1000


def crowded_targets(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [
        ImageTarget(
            torch.zeros(OBJECTS, dtype=torch.int64),
            torch.zeros(OBJECTS, 4),
            SegmentMap(torch.randint(-1, OBJECTS, s, generator=generator, dtype=torch.int16)),
        )
        for s in sizes
    ]


def pairs(number):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(2, (number,), generator=generator),
        torch.randperm(OBJECTS, generator=generator)[:number],
    )


@pytest.mark.parametrize("number", [0, 1, 16, 17, 100])
def test_masks_are_those_of_a_comparison_with_every_index(number):
    targets = crowded_targets((40, 60), (56, 48))
    image, local = pairs(number)
    masks = TargetBatch(targets).masks.gather(image, local)
    assert masks.shape == (number, 56, 60)
    assert masks.dtype == torch.bool
    expected = torch.zeros(number, 56, 60, dtype=torch.bool)
    for k, (i, j) in enumerate(zip(image.tolist(), local.tolist(), strict=True)):
        index_map = targets[i].masks.segment_map
        expected[k, : index_map.shape[0], : index_map.shape[1]] = index_map == j
    assert torch.equal(masks, expected)
    assert number == 0 or masks.any()


@pytest.mark.parametrize("number", [0, 1, 16, 17, 100])
@pytest.mark.parametrize("size", [(14, 15), (7, 11)])
def test_shares_are_those_of_the_masks_at_full_size(number, size):
    targets = crowded_targets((40, 60), (56, 48))
    image, local = pairs(number)
    shares = TargetBatch(targets).masks.gather_shares(image, local, size)
    masks = TargetBatch(targets).masks.gather(image, local)[:, None].float()
    assert torch.equal(shares, F.interpolate(masks, size=size, mode="area")[:, 0])


def test_little_memory_beside_the_result():
    targets = crowded_targets((480, 640), (480, 640))
    image, local = pairs(200)
    peak_bytes = load_script("benchmarks/measure.py").peak_bytes
    pixels = 480 * 640
    of_masks = peak_bytes(lambda: TargetBatch(targets).masks.gather(image, local))
    assert 200 * pixels <= of_masks < 250 * pixels
    of_shares = peak_bytes(
        lambda: TargetBatch(targets).masks.gather_shares(image, local, (120, 160))
    )
    assert of_shares < 170 * pixels  # one float32 mask for each pair would be 800
