"""Panoptic inference: from the masks of queries to the segments of an image, as pure functions.

Shapes: K kept queries, (H, W) the output image.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from .masks import ImageMasks, resize_map


class SegmentInfo(TypedDict):
    """One segment of a segment map, in Detectron2's format.

    ``category_id`` is contiguous, ``area`` counts pixels, ``score`` is in 0 to 1.
    """

    id: int
    category_id: int
    isthing: bool
    area: int
    score: float


class PanopticOptions(NamedTuple):
    """Thresholds of panoptic inference; see ``MODEL.PANOPTIC`` in the config.

    Attributes:
        score_threshold: queries must score more than this to be kept at all (0 to 1).
        min_area: segments with at most this many pixels are dropped ("strongest", "published").
        mask_threshold: minimum mask probability of a pixel that is not void ("strongest").
        duplicate_iou: of things whose IoU is larger, only the best is kept (all merges).
        overlap_threshold: minimum share of its own mask that a query must win ("mask2former").
    """

    score_threshold: float = 0.85
    min_area: int = 4
    mask_threshold: float = 0.0
    duplicate_iou: float = 1.0
    overlap_threshold: float = 0.8


PanopticSeg = tuple[Tensor, list[SegmentInfo]]


class Merge(Protocol):
    """A panoptic inference: a rule that assigns pixels to queries.

    It returns an (H, W) int32 segment map, in which 0 is void, and its segments in ascending
    order of id.
    """

    def __call__(
        self,
        masks: ImageMasks,
        scores: Tensor,
        labels: Tensor,
        *,
        thing_class_ids: Sequence[int],
        options: PanopticOptions,
    ) -> PanopticSeg:
        """Merge the kept queries of one image.

        Args:
            masks: the masks of the K kept queries.
            scores: (K,) class probabilities, on any device.
            labels: (K,) int64 contiguous class ids, on any device.
            thing_class_ids: classes whose queries are separate segments.
            options: thresholds.
        """


def segments_of_queries(
    labels: Sequence[int], thing_class_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The segment of each query, and the class of each segment.

    Queries of one stuff class share a segment; each thing query has its own.
    """
    things = set(thing_class_ids)
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


def best_scores(
    segment_of_query: Sequence[int], scores: Sequence[float], num_segments: int
) -> list[float]:
    """The best score among the queries of each segment."""
    best = [0.0] * num_segments
    for segment, score in zip(segment_of_query, scores, strict=True):
        best[segment] = max(best[segment], score)
    return best


def describe_segments(
    classes: Sequence[int],
    areas: Sequence[int],
    scores: Sequence[float],
    thing_class_ids: Sequence[int],
) -> list[SegmentInfo]:
    """List segments with the ids 1, 2, ... in order."""
    return [
        SegmentInfo(
            id=segment_id,
            category_id=label,
            isthing=label in thing_class_ids,
            area=area,
            score=score,
        )
        for segment_id, (label, area, score) in enumerate(
            zip(classes, areas, scores, strict=True), 1
        )
    ]


def merge_panoptic(
    masks: ImageMasks,
    scores: Tensor,
    labels: Tensor,
    *,
    merge: Merge,
    thing_class_ids: Sequence[int],
    options: PanopticOptions,
) -> PanopticSeg:
    """Run panoptic inference, after dropping duplicates if the options ask for it.

    Arguments and result are those of :class:`Merge`. Decisions per query are made on the host;
    scores and labels that are on the host already save a wait for the device.
    """
    if options.duplicate_iou < 1:
        things = set(thing_class_ids)
        is_thing = torch.tensor([label in things for label in labels.tolist()], dtype=torch.bool)
        kept = without_duplicates(masks, scores, is_thing, options.duplicate_iou)
        masks = masks[kept.to(masks.logits.device, non_blocking=True)]
        scores, labels = scores[kept], labels[kept]
    return merge(masks, scores, labels, thing_class_ids=thing_class_ids, options=options)


def merge_strongest(
    masks: ImageMasks,
    scores: Tensor,
    labels: Tensor,
    *,
    thing_class_ids: Sequence[int],
    options: PanopticOptions,
) -> PanopticSeg:
    """Assign each pixel to the kept query with the largest mask logit.

    As in :func:`merge_published`, class scores play no part in the choice. Unlike there, the
    queries of one stuff class form one segment from the start, so that none of its pixels leak to
    other segments, and masks are resized to the output instead of segment maps. The pixels of a
    segment that is too small go to the next best mask. A pixel whose best mask is below
    ``mask_threshold`` is void.
    """
    segment_of_query, classes = segments_of_queries(labels.tolist(), thing_class_ids)
    alive = torch.ones(len(classes), dtype=torch.bool)
    query_segment = torch.tensor(segment_of_query, dtype=torch.int32)
    # The pixels of dropped segments go to the next best ones, which can then be large enough or
    # still too small: repeat until none is.
    while True:
        segment_map = _strongest(masks, query_segment, alive, options.mask_threshold)
        areas = torch.bincount(segment_map.flatten(), minlength=len(classes) + 1)[1:].cpu()
        small = alive & (areas <= options.min_area)
        if not small.any():
            break
        alive &= ~small

    best_score = best_scores(segment_of_query, scores.tolist(), len(classes))
    living = alive.nonzero()[:, 0].tolist()
    new_id = torch.zeros(len(classes) + 1, dtype=torch.int32)
    new_id[torch.tensor(living, dtype=torch.int64) + 1] = torch.arange(
        1, len(living) + 1, dtype=torch.int32
    )
    segments = describe_segments(
        [classes[segment] for segment in living],
        areas[alive].tolist(),
        [best_score[segment] for segment in living],
        thing_class_ids,
    )
    return _looked_up(new_id, segment_map), segments


def merge_published(
    masks: ImageMasks,
    scores: Tensor,
    labels: Tensor,
    *,
    thing_class_ids: Sequence[int],
    options: PanopticOptions,
) -> PanopticSeg:
    """Reproduce ``PostProcessPanoptic`` of facebookresearch/detr at one image per batch.

    Each pixel of the network's input goes to the kept query with the largest softmax over the
    queries; the map of queries is then resized by the nearest neighbour. Known defects are kept:

    * The pixels of the second and later queries of a stuff class are merged into its first query
      in the first round only. These queries are then dropped as empty, and in the next round their
      pixels go to the next best mask instead.
    * Areas are compared at the output size.
    * No pixel is void as long as there is a segment.

    Two things differ. Ids are larger by one, because 0 is void in Detectron2. The batch padding is
    cropped, so that the result does not depend on the batch.
    """
    device = masks.logits.device
    label_list, score_list = labels.tolist(), scores.tolist()
    segment_of_query, _ = segments_of_queries(label_list, thing_class_ids)
    # For each remaining query, the position of the query that receives its pixels.
    owner = [segment_of_query.index(segment) for segment in segment_of_query]
    living = list(range(len(label_list)))
    while living:
        query = torch.tensor(living, device=device)
        position_of = torch.tensor(owner, device=device, dtype=torch.int32)
        position = torch.empty(masks.image_size, dtype=torch.int32, device=device)
        for rows, logits in masks.image_bands():
            position[rows] = position_of[logits[query].softmax(dim=0).argmax(dim=0)]
        segment_map = resize_map(position, masks.output_size)
        areas = torch.bincount(segment_map.flatten(), minlength=len(living)).tolist()
        large = [position for position, area in enumerate(areas) if area > options.min_area]
        if len(large) == len(living):
            segments = describe_segments(
                [label_list[query] for query in living],
                areas,
                [score_list[query] for query in living],
                thing_class_ids,
            )
            return segment_map + 1, segments
        living = [living[position] for position in large]
        owner = list(range(len(living)))
    return torch.zeros(masks.output_size, dtype=torch.int32, device=device), []


def merge_mask2former(
    masks: ImageMasks,
    scores: Tensor,
    labels: Tensor,
    *,
    thing_class_ids: Sequence[int],
    options: PanopticOptions,
) -> PanopticSeg:
    """Reproduce ``panoptic_inference`` of facebookresearch/Mask2Former.

    Each pixel goes to the query with the largest product of score and mask probability, and is void
    if that mask probability is below one half. A query that wins less than ``overlap_threshold`` of
    the pixels where its own mask is at least one half is dropped, and its pixels become void.
    Queries of one stuff class form one segment. There is no minimum area.
    """
    num_queries, device = len(masks), masks.logits.device
    # 1 + the query that gets each pixel; 0: void.
    final = torch.zeros(masks.output_size, dtype=torch.int32, device=device)
    if num_queries == 0:
        return final, []
    weights = scores.to(device, non_blocking=True)[:, None, None]
    # Per query: pixels won, pixels of its own mask, pixels won inside its own mask.
    counts = torch.zeros(3, num_queries, dtype=torch.int64, device=device)
    for rows, logits in masks.bands():
        probabilities = logits.sigmoid()
        claims = probabilities >= 0.5
        winner = probabilities.mul_(weights).argmax(dim=0)
        claimed = claims.gather(0, winner[None])[0]
        counts[0] += torch.bincount(winner.flatten(), minlength=num_queries)
        counts[1] += claims.flatten(1).sum(dim=1)
        final[rows] = (winner + 1).masked_fill(~claimed, 0)
    counts[2] = torch.bincount(final.flatten(), minlength=num_queries + 1)[1:]
    kept = [
        query
        for query, (won, own, inside) in enumerate(counts.T.tolist())
        if inside > 0 and won / own >= options.overlap_threshold
    ]
    label_list, score_list, final_areas = labels.tolist(), scores.tolist(), counts[2].tolist()
    segment_of_kept, classes = segments_of_queries(
        [label_list[query] for query in kept], thing_class_ids
    )
    new_id = torch.zeros(num_queries + 1, dtype=torch.int32)
    areas = [0] * len(classes)
    for query, segment in zip(kept, segment_of_kept, strict=True):
        new_id[query + 1] = segment + 1
        areas[segment] += final_areas[query]
    kept_scores = [score_list[query] for query in kept]
    best_score = best_scores(segment_of_kept, kept_scores, len(classes))
    segments = describe_segments(classes, areas, best_score, thing_class_ids)
    return _looked_up(new_id, final), segments


MERGES: dict[str, Merge] = {
    "strongest": merge_strongest,
    "published": merge_published,
    "mask2former": merge_mask2former,
}


def without_duplicates(
    masks: ImageMasks, scores: Tensor, is_thing: Tensor, max_iou: float
) -> Tensor:
    """Suppress things that overlap a better one, greedily by mask IoU (not in DETR).

    A model that was trained briefly often predicts one object with two or three queries, which
    would then share its pixels.

    Args:
        masks: of the K queries.
        scores: (K,).
        is_thing: (K,) bool; stuff is always kept.
        max_iou: a thing is dropped when its IoU with a better one of any class is larger.

    Returns:
        Indices of the queries to keep, ascending, int64, on the device of ``scores``.
    """
    device = masks.logits.device
    overlap = torch.zeros(len(masks), len(masks), dtype=torch.float64, device=device)
    for _, logits in masks.bands():
        inside = (logits > 0).flatten(1).float()
        with torch.autocast(device.type, enabled=False):  # half precision cannot count pixels
            overlap += inside @ inside.T
    overlap = overlap.float()
    area = overlap.diagonal()
    iou = overlap / (area[:, None] + area[None] - overlap).clamp(min=1)
    things = (is_thing[:, None] & is_thing[None]).to(iou.device, non_blocking=True)
    similar = ((iou > max_iou) & things).tolist()
    kept: list[int] = []
    for query in scores.argsort(descending=True).tolist():
        if not any(similar[query][other] for other in kept):
            kept.append(query)
    return torch.tensor(sorted(kept), dtype=torch.int64, device=scores.device)


def _strongest(masks: ImageMasks, query_segment: Tensor, alive: Tensor, threshold: float) -> Tensor:
    """(H, W) int32: 1 + the remaining segment with the largest mask logit, 0 for none.

    ``query_segment`` and ``alive`` are on the host, so that no step waits for the device.
    """
    living = alive[query_segment].nonzero()[:, 0]
    device = masks.logits.device
    segment_map = torch.zeros(masks.output_size, dtype=torch.int32, device=device)
    if len(living) == 0:
        return segment_map
    segment_of = (query_segment[living] + 1).to(device, non_blocking=True)
    if len(living) < len(masks):
        masks = masks[living.to(device, non_blocking=True)]
    for rows, logits in masks.bands():
        best, query = logits.max(dim=0)
        found = segment_of[query]
        if threshold > 0:
            found = found.masked_fill(best.sigmoid() < threshold, 0)
        segment_map[rows] = found
    return segment_map


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """(H, W) int32 entries of a (N,) table on the host, without an int64 copy of the index."""
    table = table.to(index.device, non_blocking=True)
    return table.index_select(0, index.flatten()).view(index.shape)
