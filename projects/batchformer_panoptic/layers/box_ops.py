"""Box formats and overlaps, for (..., 4) tensors: ``cxcywh`` (centre, size), ``xyxy`` (corners)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) centre and size -> (..., 4) corners, same unit and dtype."""
    center, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    half = 0.5 * size
    return torch.cat([center - half, center + half], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) centre and size, same unit and dtype."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([0.5 * (low + high), high - low], dim=-1)


def generalized_box_iou(boxes_a_cxcywh: Tensor, boxes_b_cxcywh: Tensor) -> Tensor:
    """Generalised intersection over union (Rezatofighi et al. 2019, algorithm 1).

    Args:
        boxes_a_cxcywh: (..., 4), float; sizes of at least 0.
        boxes_b_cxcywh: (..., 4), broadcast against ``boxes_a_cxcywh``: (K, 4) with (K, 4) compares
            element by element, (Q, 1, 4) with (1, T, 4) compares all pairs.

    Returns:
        (...) in [-1, 1]; -1 for two degenerate boxes at the same point.
    """
    tiny = torch.finfo(boxes_a_cxcywh.dtype).tiny
    a, b = _extents(boxes_a_cxcywh), _extents(boxes_b_cxcywh)
    overlap = _area(F.relu(_sizes(torch.minimum(a, b))))
    hull = _area(_sizes(torch.maximum(a, b)))
    union = _area(_sizes(a)) + _area(_sizes(b)) - overlap
    return overlap / (union + tiny) + union / (hull + tiny) - 1


def _extents(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4): how far a box reaches to the left, up, right and down, from the origin.

    With these, the intersection of two boxes is their minimum and the hull their maximum.
    """
    center, size = boxes_cxcywh.unflatten(-1, (2, 2)).unbind(-2)
    half = 0.5 * size
    return torch.cat([half - center, half + center], dim=-1)


def _sizes(extents: Tensor) -> Tensor:
    return extents.unflatten(-1, (2, 2)).sum(-2)


def _area(sizes: Tensor) -> Tensor:
    width, height = sizes.unbind(-1)
    return width * height
