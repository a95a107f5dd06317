"""Focal and Dice losses of masks, and the cross entropy of pixels.

Shapes: K masks, (h, w) as predicted, (H, W) of the targets, P pixels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .targets import pixels_at_once


def mask_focal_loss(logits: Tensor, masks: Tensor, *, alpha: float = 0.25) -> Tensor:
    """Focal loss (gamma 2) averaged over the pixels of each mask.

    Args:
        logits: (K, P) over P pixels.
        masks: (K, P) in 0 to 1, same dtype.
        alpha: weight of the pixels inside.

    Returns:
        (K,), non-negative.
    """
    return _focal_loss(logits, logits.sigmoid(), masks, alpha)


def mask_dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice loss of each mask (Milletari et al. 2016), smoothed by one pixel as in DETR.

    Args:
        logits: (K, P) over P pixels.
        masks: (K, P) in 0 to 1, same dtype.

    Returns:
        (K,) in 0 to 1.
    """
    return _dice_loss(logits.sigmoid(), masks)


def focal_and_dice_losses(logits: Tensor, masks: Tensor, *, alpha: float = 0.25) -> Tensor:
    """(2, K): :func:`mask_focal_loss` and :func:`mask_dice_loss` with one sigmoid for both."""
    probabilities = logits.sigmoid()
    focal = _focal_loss(logits, probabilities, masks, alpha)
    return torch.stack([focal, _dice_loss(probabilities, masks)])


def _focal_loss(logits: Tensor, probabilities: Tensor, masks: Tensor, alpha: float) -> Tensor:
    # The weights of both sides and the probability of the wrong side, at every pixel.
    weight = masks * (2 * alpha - 1) + (1 - alpha)
    wrong = torch.lerp(probabilities, 1 - probabilities, masks)
    entropy = F.binary_cross_entropy_with_logits(logits, masks, weight, reduction="none")
    return (entropy * wrong.square()).mean(dim=1)


def _dice_loss(probabilities: Tensor, masks: Tensor) -> Tensor:
    overlap = (probabilities * masks).sum(dim=1)
    return 1 - (2 * overlap + 1) / (probabilities.sum(dim=1) + masks.sum(dim=1) + 1)


def pixel_class_loss(
    logits: Sequence[Tensor], class_map: Tensor, num_pixels: Tensor | None = None
) -> Tensor:
    """Cross entropy averaged over the pixels that have a class, summed over predictions.

    Args:
        logits: (B, K, h, w) each, resized to ``class_map`` bilinearly.
        class_map: (B, H, W) int64 in [0, K), -1 where a pixel has no class.
        num_pixels: 0-d, a normaliser in place of the number of these pixels.

    Returns:
        0-d, non-negative; 0 without such pixels.
    """
    large = [
        F.interpolate(x.float(), size=class_map.shape[-2:], mode="bilinear", align_corners=False)
        for x in logits
    ]
    totals = [F.cross_entropy(x, class_map, ignore_index=-1, reduction="sum") for x in large]
    if num_pixels is None:
        num_pixels = (class_map >= 0).sum()
    return torch.stack(totals).sum() / num_pixels.clamp(min=1)


def upsampled_mask_losses(
    logits: Tensor,
    size: tuple[int, int],
    masks_of: Callable[[slice], Tensor],
    *,
    alpha: float = 0.25,
) -> Tensor:
    """:func:`mask_focal_loss` and :func:`mask_dice_loss` of predictions resized to their targets.

    The masks are processed a few at a time with activation checkpointing. Without it autograd would
    keep a dozen tensors that are each as large as all target masks together.

    Args:
        logits: (K, h, w), resized to ``size`` bilinearly.
        size: (H, W) of the targets.
        masks_of: returns the targets (k, H, W) bool of a slice of the K masks.
        alpha: weight of the pixels inside in the focal loss.

    Returns:
        (2, K), Focal and Dice losses.
    """

    def losses_of(part: slice) -> Tensor:
        large = F.interpolate(logits[part, None], size=size, mode="bilinear", align_corners=False)
        large, masks = large.flatten(1), masks_of(part).flatten(1).to(large.dtype)
        return focal_and_dice_losses(large, masks, alpha=alpha)

    step = max(1, pixels_at_once(logits.device) // (size[0] * size[1]))
    starts = range(0, max(1, len(logits)), step)  # without masks one empty part keeps the graph
    parts = [
        checkpoint(
            losses_of, slice(start, start + step), use_reentrant=False, preserve_rng_state=False
        )
        for start in starts
    ]
    return torch.cat(parts, dim=1)
