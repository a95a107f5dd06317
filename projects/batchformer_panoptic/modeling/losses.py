"""Losses of masks and pixels as pure functions."""

from torch import Tensor
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
