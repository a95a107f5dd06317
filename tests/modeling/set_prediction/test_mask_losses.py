"""Mask losses of a few masks at a time are those of all masks at once."""

import pytest
import torch
from torch.nn import functional as F

from batchformer_panoptic.modeling.set_prediction import targets as targets_module
from batchformer_panoptic.modeling.set_prediction.mask_losses import (
    mask_dice_loss,
    mask_focal_loss,
    upsampled_mask_losses,
)
from batchformer_panoptic.modeling.set_prediction.targets import (
    ImageTarget,
    SegmentMap,
    TargetBatch,
)

SIZE = (17, 22)


def at_once(logits, masks, size=SIZE):
    large = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)
    large, wanted = large.flatten(1), masks.flatten(1).to(logits.dtype)
    return mask_focal_loss(large, wanted), mask_dice_loss(large, wanted)


@pytest.mark.parametrize("number", [0, 1, 7])
@pytest.mark.parametrize("pixels", [1, 3 * SIZE[0] * SIZE[1], 1 << 20])
def test_values_and_gradients_are_those_of_all_masks_at_once(monkeypatch, number, pixels):
    monkeypatch.setitem(targets_module.PIXELS_AT_ONCE, "cpu", pixels)
    torch.manual_seed(0)
    logits = (4 * torch.randn(number, 5, 6, dtype=torch.float64)).requires_grad_()
    masks = torch.rand(number, *SIZE) < 0.4
    factors = torch.rand(2, number, dtype=torch.float64)
    found = upsampled_mask_losses(logits, SIZE, lambda part: masks[part])
    expected = at_once(logits, masks)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    gradients = [
        torch.autograd.grad(sum((f * x).sum() for f, x in zip(factors, pair, strict=True)), logits)
        for pair in (found, expected)
    ]
    torch.testing.assert_close(*gradients)
    assert number == 0 or gradients[0][0].abs().max() > 1e-4


def test_autocast_takes_no_digits_from_gradients():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 6, requires_grad=True)
    masks = torch.rand(3, *SIZE) < 0.4
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            focal, dice = upsampled_mask_losses(logits, SIZE, lambda part: masks[part])
        gradients += torch.autograd.grad((focal + dice).sum(), logits)
    assert torch.equal(*gradients)


def test_certain_predictions_have_finite_losses_and_gradients():
    logits = torch.tensor([[[200.0, -200.0], [40.0, -40.0]]]).requires_grad_()
    for inside in (True, False):
        masks = torch.full((1, 2, 2), inside)
        focal, dice = upsampled_mask_losses(logits, (2, 2), lambda part, m=masks: m[part])
        (gradient,) = torch.autograd.grad((focal + dice).sum(), logits)
        assert focal.isfinite().all()
        assert dice.isfinite().all()
        assert gradient.isfinite().all()
        assert focal > 10  # sure and wrong on half of the pixels


def test_nothing_of_the_size_of_the_targets_is_kept():
    logits = torch.randn(4, 3, 3, requires_grad=True)
    masks = torch.rand(4, 32, 32) < 0.5
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        at_once(logits, masks, (32, 32))
    assert max(kept) >= masks.numel(), "the plain losses keep tensors of that size"
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        upsampled_mask_losses(logits, (32, 32), lambda part: masks[part])
    assert max(kept, default=0) <= 2 * logits.numel()


def test_streams_share_the_masks_of_their_images(monkeypatch):
    maps = [torch.randint(-1, 3, (6, 5)), torch.randint(-1, 3, (4, 7))]
    targets = [ImageTarget(torch.zeros(3), torch.zeros(3, 4), SegmentMap(m)) for m in maps]
    stored = []

    def count(masks, size, lookup=SegmentMap.lookup):
        stored.append((len(masks), size))
        return lookup(masks, size)

    monkeypatch.setattr(SegmentMap, "lookup", staticmethod(count))
    both = TargetBatch(targets * 2).masks
    image, local = torch.tensor([3, 1, 2, 0]), torch.tensor([1, 1, 2, 2])
    gathered = both.gather(image, local)
    both.gather(image, local)
    assert stored == [(2, (6, 7))]
    assert torch.equal(gathered[0], gathered[1])
    assert torch.equal(gathered[2], gathered[3])
    assert torch.equal(gathered[0, :4], maps[1] == 1)
    assert torch.equal(gathered[2, :, :5], maps[0] == 2)
