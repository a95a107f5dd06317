"""Focal and Dice loss of masks at the size of their targets, a few masks at a time.

At that size each of the dozen tensors that autograd would keep is as large as all target masks
together. Here a step of a few masks gives losses and gradients at once, and nothing of full size
outlives it: what is kept are two gradients of the size of the predictions.

Shapes: K masks, (h, w) as predicted, (H, W) of the targets, k masks of a step, P = H * W.

Losses of masks and pixels as pure functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss


def mask_focal_loss(logits: Tensor, masks: Tensor, *, alpha: float = 0.25) -> Tensor:
    """Focal loss (gamma 2) averaged over the pixels of each mask.

    Args:
        logits: (K, P) over P pixels.
        masks: (K, P) in 0 to 1, same dtype.
        alpha: weight of the pixels inside.

    Returns:
        (K,), non-negative.
    """
    return sigmoid_focal_loss(logits, masks, alpha=alpha, gamma=2.0).mean(dim=1)


def mask_dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice loss of each mask (Milletari et al. 2016), smoothed by one pixel as in DETR.

    Args:
        logits: (K, P) over P pixels.
        masks: (K, P) in 0 to 1, same dtype.

    Returns:
        (K,) in 0 to 1.
    """
    probabilities = logits.sigmoid()
    overlap = (probabilities * masks).sum(dim=1)
    return 1 - (2 * overlap + 1) / (probabilities.sum(dim=1) + masks.sum(dim=1) + 1)


def pixel_class_loss(logits: Tensor, class_map: Tensor) -> Tensor:
    """Cross entropy averaged over the pixels that have a class; 0 when none has.

    Args:
        logits: (B, K, h, w), brought to the size of ``class_map`` bilinearly.
        class_map: (B, H, W) int64 in [0, K), negative where a pixel has no class.

    Returns:
        0-d, non-negative.
    """
    large = F.interpolate(
        logits.float(), size=class_map.shape[-2:], mode="bilinear", align_corners=False
    )
    total = F.cross_entropy(large, class_map.clamp(min=-1), ignore_index=-1, reduction="sum")
    return total / (class_map >= 0).sum().clamp(min=1)


# Pixels of a step. On a CPU such tensors stay in its cache; elsewhere a step is worth a launch.
_PIXELS_AT_ONCE = {"cpu": 1 << 20}
_PIXELS_AT_ONCE_ELSEWHERE = 1 << 24


class _Losses(NamedTuple):
    """Both losses of k masks (k,), and their gradients by the logits (k, P)."""

    focal: Tensor
    dice: Tensor
    focal_gradient: Tensor | None
    dice_gradient: Tensor | None


def upsampled_mask_losses(
    logits: Tensor,
    size: tuple[int, int],
    masks_of: Callable[[slice], Tensor],
    *,
    alpha: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """``mask_focal_loss`` and ``mask_dice_loss`` of predictions resized to their targets.

    The same values and gradients, up to rounding, with a fraction of the memory. Second derivatives
    are not available.

    Args:
        logits: (K, h, w), brought to ``size`` bilinearly.
        size: (H, W) of the targets.
        masks_of: the targets (k, H, W) bool of a part of the K masks.
        alpha: weight of the pixels inside in the focal loss.

    Returns:
        Focal and Dice losses, each (K,).
    """
    focal, dice = _UpsampledMaskLosses.apply(logits, size, masks_of, alpha)
    return focal, dice


class _UpsampledMaskLosses(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        size: tuple[int, int],
        masks_of: Callable[[slice], Tensor],
        alpha: float,
    ) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        losses = logits.new_empty(2, len(logits))
        gradients = logits.new_empty(2, *logits.shape) if needs_gradient else None
        pixels = _PIXELS_AT_ONCE.get(logits.device.type, _PIXELS_AT_ONCE_ELSEWHERE)
        step = max(1, pixels // (size[0] * size[1]))
        rows, columns = (
            _shares(logits, *sides) for sides in zip(logits.shape[1:], size, strict=True)
        )
        for begin in range(0, len(logits), step):
            part = slice(begin, begin + step)
            large = F.interpolate(
                logits[part, None], size=size, mode="bilinear", align_corners=False
            )
            found = _losses(large.flatten(1), masks_of(part).flatten(1), alpha, gradients)
            losses[0, part], losses[1, part] = found.focal, found.dice
            if gradients is None:
                continue
            for index, gradient in enumerate((found.focal_gradient, found.dice_gradient)):
                assert gradient is not None
                # Autocast would make half precision of the products.
                with torch.autocast(logits.device.type, enabled=False):
                    gradients[index, part] = rows @ gradient.view(-1, *size) @ columns.T
        if gradients is not None:
            ctx.save_for_backward(gradients)
        return losses[0], losses[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        of_focal, of_dice = (x[:, None, None] for x in grad_outputs)
        return gradients[0] * of_focal + gradients[1] * of_dice, None, None, None


def _shares(like: Tensor, small: int, large: int) -> Tensor:
    """(small, large): how much of each small pixel a large one takes, along one side.

    Resizing is linear and treats the sides alike, so that its gradient is a product with two such
    matrices. Dense as they are, they are several times as fast as autograd's own on a CPU.
    """
    unit = torch.eye(small, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(unit, size=large, mode="linear", align_corners=False)[0]


def _losses(logits: Tensor, masks: Tensor, alpha: float, with_gradients: object | None) -> _Losses:
    """Losses of (k, P) logits against (k, P) bool masks.

    With w, the probability of being wrong at a pixel, both need no case for inside and outside,
    which would cost more than all else: probabilities add up to those of being wrong, plus twice
    the overlap, minus the area.
    """
    wanted = masks.to(logits.dtype)
    sign = 1 - 2 * wanted
    wrong_logits = sign * logits
    wrong = wrong_logits.sigmoid()
    right = 1 - wrong
    cross_entropy = F.softplus(wrong_logits)
    weights = wrong.square().mul_(wanted.mul(2 * alpha - 1).add_(1 - alpha))
    focal = (weights * cross_entropy).mean(dim=1)
    overlap = (right * wanted).sum(dim=1)
    total = wrong.sum(dim=1) + 2 * overlap + 1
    dice = 1 - (2 * overlap + 1) / total
    if with_gradients is None:
        return _Losses(focal, dice, None, None)
    # By the logit of being wrong, softplus(z) has the derivative w, and w has w (1 - w).
    focal_gradient = cross_entropy.mul_(right).mul_(2).add_(wrong).mul_(weights)
    focal_gradient = focal_gradient.mul_(sign).div_(logits.shape[1])
    there = ((2 * overlap + 1) / total.square())[:, None]
    dice_gradient = (wanted * (-2 / total)[:, None]).add_(there)
    return _Losses(focal, dice, focal_gradient, dice_gradient.mul_(wrong).mul_(right))
