"""What every panoptic merge takes and returns, and how it lists its segments.

Shapes: K kept queries, (H, W) the output image.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypedDict

from torch import Tensor

from .postprocessing import ImageMasks


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
