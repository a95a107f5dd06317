"""From raw predictions to segments and instances: pure functions, for evaluation and demo alike.

Shapes: Q queries, K kept queries, (h, w) the mask head's map, (H, W) the output image.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers import cxcywh_to_xyxy


class SegmentInfo(TypedDict):
    """One segment of a panoptic map, in Detectron2's words.

    ``category_id`` is contiguous, ``area`` counts pixels, ``score`` is in 0 to 1.
    """

    id: int
    category_id: int
    isthing: bool
    area: int
    score: float


class PanopticOptions(NamedTuple):
    """Thresholds of the merge; see ``MODEL.PANOPTIC`` in the config."""

    score_threshold: float = 0.85
    min_area: int = 4
    mask_threshold: float = 0.0
    duplicate_iou: float = 1.0


def boxes_to_pixels(boxes_cxcywh: Tensor, output_size: tuple[int, int]) -> Tensor:
    """(..., 4) cxcywh in 0 to 1 -> (..., 4) xyxy in pixels of (height, width), clipped."""
    height, width = output_size
    scale = boxes_cxcywh.new_tensor([width, height, width, height])
    return cxcywh_to_xyxy(boxes_cxcywh).clamp(0, 1) * scale


def resize_masks(
    mask_logits: Tensor,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
) -> Tensor:
    """Bring mask logits to the output image, without its batch padding.

    The map covers the padded batch, so it is brought to that size first and cropped to the image;
    only then is it resized to the output.

    Args:
        mask_logits: (K, h, w).
        padded_size: (height, width) that the images of the batch were padded to.
        image_size: (height, width) of the image as the network saw it, before padding.
        output_size: (height, width) wanted.

    Returns:
        (K, *output_size) float32.
    """
    masks = _resize(mask_logits.float()[:, None], padded_size)
    masks = masks[..., : image_size[0], : image_size[1]]
    return _resize(masks, output_size)[:, 0]


def merge_panoptic(
    mask_logits: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    thing_class_ids: Sequence[int],
    options: PanopticOptions,
) -> tuple[Tensor, list[SegmentInfo]]:
    """Give each pixel to the kept query whose mask is strongest there.

    As published (``PostProcessPanoptic`` of facebookresearch/detr) the class scores play no part
    in that choice. Unlike there, queries of one stuff class form one segment together, so that
    none of its pixels leak to others; ids start at 1 and 0 is void.

    Args:
        mask_logits: (K, H, W) of the kept queries.
        scores: (K,) class probabilities.
        labels: (K,) int64 contiguous class ids.
        thing_class_ids: classes whose every query is a segment of its own.
        options: a segment of no more than ``min_area`` pixels is dropped, and the next best mask
            takes its pixels; a pixel whose best mask is below ``mask_threshold`` is void; of things
            that overlap by more than ``duplicate_iou`` the best one stays.

    Returns:
        (H, W) int32 map, and its segments in ascending order of id.
    """
    if options.duplicate_iou < 1:
        is_thing = torch.isin(labels, labels.new_tensor(list(thing_class_ids)))
        kept = without_duplicates(mask_logits, scores, is_thing, options.duplicate_iou)
        mask_logits, scores, labels = mask_logits[kept], scores[kept], labels[kept]
    segment_of_query, classes = _segments_of_queries(labels.tolist(), set(thing_class_ids))
    alive = torch.ones(len(classes), dtype=torch.bool)
    query_segment = torch.tensor(segment_of_query, dtype=torch.int64, device=mask_logits.device)
    while True:
        segment_map = _strongest(mask_logits, query_segment, alive, options.mask_threshold)
        areas = torch.bincount(segment_map.flatten(), minlength=len(classes) + 1)[1:].cpu()
        small = alive & (areas <= options.min_area)
        if not small.any():
            break
        alive &= ~small

    score_list = scores.tolist()
    new_id = torch.zeros(len(classes) + 1, dtype=torch.int32)
    segments: list[SegmentInfo] = []
    for segment in alive.nonzero()[:, 0].tolist():
        new_id[segment + 1] = len(segments) + 1
        members = [q for q, s in enumerate(segment_of_query) if s == segment]
        segments.append(
            SegmentInfo(
                id=len(segments) + 1,
                category_id=classes[segment],
                isthing=classes[segment] in thing_class_ids,
                area=int(areas[segment]),
                score=max(score_list[q] for q in members),
            )
        )
    return new_id.to(segment_map.device)[segment_map], segments


def without_duplicates(
    mask_logits: Tensor, scores: Tensor, is_thing: Tensor, max_iou: float
) -> Tensor:
    """Queries to keep when two things on one object shall not split it (not in DETR).

    Set prediction learns late to give an object to one query alone; a model that was trained
    briefly still has two or three on some. Greedy suppression by the overlap of the masks.

    Args:
        mask_logits: (K, H, W).
        scores: (K,).
        is_thing: (K,) bool; other queries are kept.
        max_iou: a thing is dropped when it overlaps a better one, of whatever class, by more.

    Returns:
        Indices of the queries to keep, ascending, int64.
    """
    masks = (mask_logits > 0).flatten(1).float()
    overlap = masks @ masks.T
    area = overlap.diagonal()
    iou = overlap / (area[:, None] + area[None] - overlap).clamp(min=1)
    similar = ((iou > max_iou) & is_thing[:, None] & is_thing[None]).tolist()
    kept: list[int] = []
    for query in scores.argsort(descending=True).tolist():
        if not any(similar[query][other] for other in kept):
            kept.append(query)
    return torch.tensor(sorted(kept), dtype=torch.int64, device=mask_logits.device)


def _segments_of_queries(labels: list[int], things: set[int]) -> tuple[list[int], list[int]]:
    """Segment of each query, and the class of each segment: stuff queries of a class share one."""
    segment_of_query: list[int] = []
    classes: list[int] = []
    stuff_segment: dict[int, int] = {}
    for label in labels:
        segment = len(classes) if label in things else stuff_segment.get(label, len(classes))
        if segment == len(classes):
            classes.append(label)
            if label not in things:
                stuff_segment[label] = segment
        segment_of_query.append(segment)
    return segment_of_query, classes


def _strongest(
    mask_logits: Tensor, query_segment: Tensor, alive: Tensor, threshold: float
) -> Tensor:
    """(H, W) int64: 1 + the living segment with the strongest mask, 0 for none."""
    living = alive.to(mask_logits.device)[query_segment].nonzero()[:, 0]
    if len(living) == 0:
        return torch.zeros(mask_logits.shape[-2:], dtype=torch.int64, device=mask_logits.device)
    best, query = mask_logits[living].max(dim=0)
    segment_map = query_segment[living][query] + 1
    return segment_map.masked_fill(best.sigmoid() < threshold, 0) if threshold > 0 else segment_map


def _resize(masks: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
