"""Mask losses as pure functions."""

from torch import Tensor
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
