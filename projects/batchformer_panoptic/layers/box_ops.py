"""Box formats and overlaps, for (..., 4) tensors: ``cxcywh`` (centre, size), ``xyxy`` (corners)."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) centre and size -> (..., 4) corners, same unit and dtype."""
    center, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) centre and size, same unit and dtype."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([0.5 * (low + high), high - low], dim=-1)


def generalized_box_iou(boxes_a_xyxy: Tensor, boxes_b_xyxy: Tensor) -> Tensor:
    """Generalised intersection over union (Rezatofighi et al. 2019, algorithm 1).

    Args:
        boxes_a_xyxy: (..., 4), float; corners with high >= low.
        boxes_b_xyxy: (..., 4), broadcast against ``boxes_a_xyxy``: (K, 4) with (K, 4) compares
            element by element, (Q, 1, 4) with (1, T, 4) compares all pairs.

    Returns:
        (...) in [-1, 1]; -1 for two degenerate boxes at the same point.
    """
    eps = torch.finfo(boxes_a_xyxy.dtype).tiny
    overlap = _area(
        torch.maximum(boxes_a_xyxy[..., :2], boxes_b_xyxy[..., :2]),
        torch.minimum(boxes_a_xyxy[..., 2:], boxes_b_xyxy[..., 2:]),
    )
    area_a = _area(boxes_a_xyxy[..., :2], boxes_a_xyxy[..., 2:])
    area_b = _area(boxes_b_xyxy[..., :2], boxes_b_xyxy[..., 2:])
    union = area_a + area_b - overlap
    hull = _area(
        torch.minimum(boxes_a_xyxy[..., :2], boxes_b_xyxy[..., :2]),
        torch.maximum(boxes_a_xyxy[..., 2:], boxes_b_xyxy[..., 2:]),
    )
    return overlap / union.clamp(min=eps) - (hull - union) / hull.clamp(min=eps)


def _area(low: Tensor, high: Tensor) -> Tensor:
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height
