"""From masks of queries to the segments of an image: the panoptic merges, pure functions.

Shapes: K kept queries, (H, W) the output image.

What every panoptic merge takes and returns, and how it lists its segments.

Shapes: K kept queries, (H, W) the output image.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from ...errors import UserError
from .masks import ImageMasks, resize_map


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
    """Thresholds of the merges; see ``MODEL.PANOPTIC`` in the config.

    Attributes:
        score_threshold: queries must score more than this to be kept at all (0 to 1).
        min_area: segments of no more pixels are dropped ("strongest" and "published").
        mask_threshold: least probability of a mask that takes a pixel ("strongest").
        duplicate_iou: of things that overlap by more than this the best stays (any merge).
        overlap_threshold: least share of its own mask that a query must win ("mask2former").
    """

    score_threshold: float = 0.85
    min_area: int = 4
    mask_threshold: float = 0.0
    duplicate_iou: float = 1.0
    overlap_threshold: float = 0.8


PanopticSeg = tuple[Tensor, list[SegmentInfo]]


class Merge(Protocol):
    """A way to give pixels to queries.

    It returns an (H, W) int32 map, in which 0 is void, and its segments in ascending order of id.
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
            masks: of the K kept queries.
            scores: (K,) class probabilities, on any device.
            labels: (K,) int64 contiguous class ids, on any device.
            thing_class_ids: classes whose every query is a segment of its own.
            options: thresholds.
        """


def segments_of_queries(
    labels: Sequence[int], thing_class_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Segment of each query, and the class of each segment: stuff queries of a class share one."""
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
    """Segments with the ids 1, 2, ... from what is known of each."""
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
    """Drop duplicates if asked to, then merge; arguments and result as in :class:`Merge`.

    What is decided query by query is decided on the host: scores and labels that are there already
    spare a wait for the device.
    """
    if options.duplicate_iou < 1:
        things = set(thing_class_ids)
        is_thing = torch.tensor([label in things for label in labels.tolist()], dtype=torch.bool)
        logits = masks.at_output_size()
        kept = without_duplicates(logits, scores, is_thing, options.duplicate_iou)
        masks = masks[kept.to(logits.device, non_blocking=True)]
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
    """Give each pixel to the kept query whose mask is strongest there.

    As published (see :func:`merge_published`) the class scores play no part in that choice. Unlike
    there, queries of one stuff class form one segment together, so that none of its pixels leak
    to others, and masks and not maps of ids are resized to the output. The next best mask takes
    the pixels of a segment that is too small; a pixel whose best mask is below
    ``mask_threshold`` is void.
    """
    logits = masks.at_output_size()
    segment_of_query, classes = segments_of_queries(labels.tolist(), thing_class_ids)
    alive = torch.ones(len(classes), dtype=torch.bool)
    query_segment = torch.tensor(segment_of_query, dtype=torch.int64)
    while True:
        segment_map = _strongest(logits, query_segment, alive, options.mask_threshold)
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
    return new_id.to(segment_map.device, non_blocking=True)[segment_map], segments


def merge_published(
    masks: ImageMasks,
    scores: Tensor,
    labels: Tensor,
    *,
    thing_class_ids: Sequence[int],
    options: PanopticOptions,
) -> PanopticSeg:
    """The segments of ``PostProcessPanoptic`` of facebookresearch/detr at one image a batch.

    Each pixel of the image as the network saw it goes to the kept query with the largest softmax
    over the queries; the map of queries is then resized by the nearest neighbour. Known defects
    are kept: queries of a stuff class after its first hand over their pixels in the first round
    alone, are then dropped for having none, and in the next round their pixels go to whatever
    mask is next best; areas are compared at the output size; no pixel is void as long as there
    is a segment.

    Two things differ. Ids are one more than the published ones, for 0 is void in Detectron2. And
    the batch padding is cropped, so that the result is that of one image a batch in every batch.
    """
    logits = masks.at_image_size()
    label_list, score_list = labels.tolist(), scores.tolist()
    segment_of_query, _ = segments_of_queries(label_list, thing_class_ids)
    # Position, among the living, of the query that gets the pixels of each living query.
    owner = [segment_of_query.index(segment) for segment in segment_of_query]
    living = list(range(len(label_list)))
    while living:
        query = torch.tensor(living, device=logits.device)
        winner = logits[query].softmax(dim=0).argmax(dim=0)
        position = torch.tensor(owner, device=logits.device)[winner]
        id_map = resize_map(position, masks.output_size)
        areas = torch.bincount(id_map.flatten(), minlength=len(living)).tolist()
        large = [position for position, area in enumerate(areas) if area > options.min_area]
        if len(large) == len(living):
            segments = describe_segments(
                [label_list[query] for query in living],
                areas,
                [score_list[query] for query in living],
                thing_class_ids,
            )
            return (id_map + 1).int(), segments
        living = [living[position] for position in large]
        owner = list(range(len(living)))
    return torch.zeros(masks.output_size, dtype=torch.int32, device=logits.device), []


def merge_mask2former(
    masks: ImageMasks,
    scores: Tensor,
    labels: Tensor,
    *,
    thing_class_ids: Sequence[int],
    options: PanopticOptions,
) -> PanopticSeg:
    """The segments of ``panoptic_inference`` of facebookresearch/Mask2Former.

    Each pixel goes to the query with the largest score x mask probability and is void if that
    probability is below one half. A query that wins less than ``overlap_threshold`` of the pixels
    where its own mask is at least one half is dropped, and its pixels become void. Queries of one
    stuff class are one segment. There is no smallest area.
    """
    probabilities = masks.at_output_size().sigmoid()
    if len(probabilities) == 0:
        return probabilities.new_zeros(masks.output_size, dtype=torch.int32), []
    weights = scores.to(probabilities.device, non_blocking=True)
    winner = (weights[:, None, None] * probabilities).argmax(dim=0)
    claims = probabilities >= 0.5
    claimed = claims.gather(0, winner[None])[0]
    counts = torch.stack(
        [
            torch.bincount(winner.flatten(), minlength=len(claims)),
            claims.flatten(1).sum(dim=1),
            torch.bincount(winner[claimed], minlength=len(claims)),
        ]
    )
    kept = [
        query
        for query, (won, own, final) in enumerate(counts.T.tolist())
        if final > 0 and won / own >= options.overlap_threshold
    ]
    label_list, score_list, final_areas = labels.tolist(), scores.tolist(), counts[2].tolist()
    segment_of_kept, classes = segments_of_queries(
        [label_list[query] for query in kept], thing_class_ids
    )
    new_id = torch.zeros(len(claims), dtype=torch.int32)
    areas = [0] * len(classes)
    for query, segment in zip(kept, segment_of_kept, strict=True):
        new_id[query] = segment + 1
        areas[segment] += final_areas[query]
    kept_scores = [score_list[query] for query in kept]
    best_score = best_scores(segment_of_kept, kept_scores, len(classes))
    segment_map = new_id.to(winner.device, non_blocking=True)[winner].masked_fill(~claimed, 0)
    return segment_map, describe_segments(classes, areas, best_score, thing_class_ids)


MERGES: dict[str, Merge] = {
    "strongest": merge_strongest,
    "published": merge_published,
    "mask2former": merge_mask2former,
}


def find_merge(name: str) -> Merge:
    """The merge called ``name``.

    Raises:
        UserError: there is none of that name.
    """
    if name not in MERGES:
        raise UserError(f"MODEL.PANOPTIC.MERGE_TEST is {name!r}; known: {', '.join(MERGES)}")
    return MERGES[name]


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
        Indices of the queries to keep, ascending, int64, on the device of ``scores``.
    """
    masks = (mask_logits > 0).flatten(1).float()
    with torch.autocast(masks.device.type, enabled=False):  # half precision cannot count pixels
        overlap = masks @ masks.T
    area = overlap.diagonal()
    iou = overlap / (area[:, None] + area[None] - overlap).clamp(min=1)
    things = (is_thing[:, None] & is_thing[None]).to(iou.device, non_blocking=True)
    similar = ((iou > max_iou) & things).tolist()
    kept: list[int] = []
    for query in scores.argsort(descending=True).tolist():
        if not any(similar[query][other] for other in kept):
            kept.append(query)
    return torch.tensor(sorted(kept), dtype=torch.int64, device=scores.device)


def _strongest(
    mask_logits: Tensor, query_segment: Tensor, alive: Tensor, threshold: float
) -> Tensor:
    """(H, W) int64: 1 + the living segment with the strongest mask, 0 for none.

    ``query_segment`` and ``alive`` are on the host, so that nothing waits for the device.
    """
    living = alive[query_segment].nonzero()[:, 0]
    device = mask_logits.device
    if len(living) == 0:
        return torch.zeros(mask_logits.shape[-2:], dtype=torch.int64, device=device)
    best, query = mask_logits[living.to(device, non_blocking=True)].max(dim=0)
    segment_map = query_segment[living].to(device, non_blocking=True)[query] + 1
    return segment_map.masked_fill(best.sigmoid() < threshold, 0) if threshold > 0 else segment_map
