"""Panoptic quality of id maps held in memory, by panopticapi's rules and formulas.

Panoptic quality is defined in arXiv 1801.00868; what counts as a match, and how void and crowd are
forgiven, follows ``pq_compute_single_core`` of panopticapi. Counts are collected in panopticapi's
own ``PQStat`` and averaged by its ``PQStat.pq_average``. Departures: the area of a ground-truth
segment is counted in the id map instead of believed (an area that is too small in the annotation
gives an IoU above 1), and inconsistent annotations are refused.

Shape letters: H, W image size; S segments of one id map; P pairs of segments that share pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from panopticapi.evaluation import VOID, PQStat

from ..errors import UserError

_MATCH_IOU = 0.5  # an IoU above one half makes the match unique
_FORGIVEN_SHARE = 0.5  # predictions lying in void and crowd by more than this share do not count


class Segments(NamedTuple):
    """The segments of one id map, in the order of the annotation; all arrays are (S,)."""

    ids: np.ndarray  # int64, unique
    category_ids: np.ndarray  # int64, data set ids
    areas: np.ndarray  # int64, pixels; -1: not stated
    is_crowd: np.ndarray  # bool

    @classmethod
    def from_segments_info(cls, segments_info: Sequence[Mapping[str, Any]]) -> "Segments":
        """Read a COCO panoptic ``segments_info`` list; ``area`` and ``iscrowd`` may be missing."""
        return cls(
            ids=np.array([int(info["id"]) for info in segments_info], dtype=np.int64),
            category_ids=np.array(
                [int(info["category_id"]) for info in segments_info], dtype=np.int64
            ),
            areas=np.array([int(info.get("area", -1)) for info in segments_info], dtype=np.int64),
            is_crowd=np.array([info.get("iscrowd", 0) == 1 for info in segments_info], dtype=bool),
        )


class _Overlaps(NamedTuple):
    """Pairs of a ground-truth and a predicted segment, by position in their ``Segments``."""

    gt_index: np.ndarray  # (P,) int64, -1: void
    pred_index: np.ndarray  # (P,) int64, -1: void
    pixels: np.ndarray  # (P,) int64


def image_pq_counts(
    pred_map: np.ndarray,
    pred_segments: Segments,
    gt_map: np.ndarray,
    gt_segments: Segments,
    *,
    image_name: str,
) -> PQStat:
    """Count the matches of one image per category.

    A prediction and a ground-truth segment of the same category match when their IoU, without the
    prediction's pixels on void, is above 0.5. Crowd segments never match and are never missed.
    A prediction that lies by more than half on void or on the crowd of its category is not a false
    positive; where a category has several crowd segments, panopticapi looks at the last one.

    Args:
        pred_map: (H, W) integers, the predicted segment of every pixel; 0 is void
            unless a predicted segment has this id.
        pred_segments: the predicted segments. Their areas are counted, not read.
        gt_map: (H, W) integers, the true segment of every pixel; 0 is void.
        gt_segments: the true segments.
        image_name: names the image in errors.

    Returns:
        Counts of the categories (data set ids) that have any.

    Raises:
        UserError: the ground truth contradicts itself: a segment whose area is not that of the
            annotation, an id that is not annotated, 0 or repeated.
        ValueError: the prediction contradicts itself, or its size is not that of the ground truth.
    """
    if pred_map.shape != gt_map.shape:
        raise ValueError(
            f"the prediction for image {image_name} has the size {pred_map.shape}, but its ground "
            f"truth has {gt_map.shape}"
        )
    overlaps = _overlaps(pred_map, pred_segments, gt_map, gt_segments, image_name)
    gt_areas = _sum_pixels(overlaps.gt_index, overlaps.pixels, len(gt_segments.ids))
    pred_areas = _sum_pixels(overlaps.pred_index, overlaps.pixels, len(pred_segments.ids))
    _check_ground_truth_areas(gt_segments, gt_areas, image_name)
    if not pred_areas.all():
        lost = pred_segments.ids[pred_areas == 0].tolist()
        raise ValueError(f"predicted segments {lost} of image {image_name} have no pixels")

    void_pixels = _sum_pixels(
        np.where(overlaps.gt_index < 0, overlaps.pred_index, -1),
        overlaps.pixels,
        len(pred_segments.ids),
    )
    matches, ious = _match(overlaps, gt_segments, pred_segments, gt_areas, pred_areas - void_pixels)
    missed = ~gt_segments.is_crowd
    missed[matches.gt_index] = False
    crowd_pixels = _pixels_on_own_crowd(overlaps, gt_segments, pred_segments)
    spurious = ~((void_pixels + crowd_pixels) / pred_areas > _FORGIVEN_SHARE)
    spurious[matches.pred_index] = False

    counts = PQStat()
    true_categories = gt_segments.category_ids[matches.gt_index].tolist()
    for category_id, iou in zip(true_categories, ious.tolist(), strict=True):
        counts[category_id].tp += 1
        counts[category_id].iou += iou
    for category_id in gt_segments.category_ids[missed].tolist():
        counts[category_id].fn += 1
    for category_id in pred_segments.category_ids[spurious].tolist():
        counts[category_id].fp += 1
    return counts


def _overlaps(
    pred_map: np.ndarray,
    pred_segments: Segments,
    gt_map: np.ndarray,
    gt_segments: Segments,
    image_name: str,
) -> _Overlaps:
    """Intersect two (H, W) id maps; pairs come sorted by both positions."""
    if VOID in gt_segments.ids:
        raise UserError(
            f"segments_info of image {image_name} lists a segment with the id {VOID}, which means "
            "void; give it another id"
        )
    gt_ids, pred_ids, lengths = _runs(gt_map.ravel(), pred_map.ravel())
    try:
        gt_index = _look_up(gt_ids, gt_segments.ids)
    except ValueError as error:
        raise UserError(
            f"the ground truth of image {image_name} contradicts itself: {error}; mend its PNG or "
            "its segments_info"
        ) from error
    try:
        pred_index = _look_up(pred_ids, pred_segments.ids)
    except ValueError as error:
        raise ValueError(
            f"the prediction for image {image_name} contradicts itself: {error}"
        ) from error
    # a cell for each pair, void in row and column 0: 8 MB for 1000 segments in either map, where
    # sorting the runs would take longer than all the rest
    width = len(pred_segments.ids) + 1
    size = (len(gt_segments.ids) + 1) * width
    table = _sum_pixels((gt_index + 1) * width + pred_index + 1, lengths, size)
    cells = np.flatnonzero(table)
    rows, columns = np.divmod(cells, width)
    return _Overlaps(rows - 1, columns - 1, table[cells])


def _runs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut two flat id maps (N,) where either of them changes.

    Id maps consist of long runs along the rows, so that only some thousand ids have to be looked up
    and not those of every pixel.

    Returns:
        Id in the first map, id in the second map and pixels of each run.
    """
    changes = first[1:] != first[:-1]
    changes |= second[1:] != second[:-1]
    starts = np.concatenate(([0], np.flatnonzero(changes) + 1))[: first.size]  # none without pixels
    return first[starts], second[starts], np.diff(starts, append=first.size)


def _look_up(ids: np.ndarray, known_ids: np.ndarray) -> np.ndarray:
    """Find the position of each id among the known ones, -1 for void.

    Raises:
        ValueError: an id is neither known nor void, or is known twice.
    """
    with_void = known_ids if VOID in known_ids else np.append(known_ids, VOID)
    order = np.argsort(with_void, kind="stable")
    ordered = with_void[order]
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise ValueError(f"segments_info lists the segment {repeated[0]} more than once")
    place = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
    unknown = ids[ordered[place] != ids]
    if len(unknown):
        raise ValueError(f"the segment {unknown[0]} has pixels but is not in segments_info")
    return np.where(order < len(known_ids), order, -1)[place]


def _sum_pixels(index: np.ndarray, pixels: np.ndarray, size: int) -> np.ndarray:
    """Sum ``pixels`` (P,) by ``index`` (P,), without those of index -1, to (size,) int64."""
    # bincount sums in float64, which is exact far beyond the pixels of any image
    return np.bincount(index + 1, weights=pixels, minlength=size + 1)[1:].astype(np.int64)


def _check_ground_truth_areas(segments: Segments, areas: np.ndarray, image_name: str) -> None:
    # the area of a crowd enters no formula, so that a wrong one does no harm
    wrong = (segments.areas >= 0) & (segments.areas != areas) & ~segments.is_crowd
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"segment {segments.ids[first]} of image {image_name} has the area "
            f"{segments.areas[first]} in the annotation but {areas[first]} pixels in the PNG; "
            "correct the annotation (a wrong area would give a wrong panoptic quality)"
        )


def _match(
    overlaps: _Overlaps,
    gt_segments: Segments,
    pred_segments: Segments,
    gt_areas: np.ndarray,
    pred_areas_off_void: np.ndarray,
) -> tuple[_Overlaps, np.ndarray]:
    """Select the pairs that match; also returns their IoU (float64)."""
    both = (overlaps.gt_index >= 0) & (overlaps.pred_index >= 0)
    gt_index, pred_index, pixels = (column[both] for column in overlaps)
    unions = pred_areas_off_void[pred_index] + gt_areas[gt_index] - pixels
    ious = pixels / unions
    matched = (
        (gt_segments.category_ids[gt_index] == pred_segments.category_ids[pred_index])
        & ~gt_segments.is_crowd[gt_index]
        & (ious > _MATCH_IOU)
    )
    return _Overlaps(gt_index[matched], pred_index[matched], pixels[matched]), ious[matched]


def _pixels_on_own_crowd(
    overlaps: _Overlaps, gt_segments: Segments, pred_segments: Segments
) -> np.ndarray:
    """Count each prediction's pixels on the crowd segment of its category; (S,) int64."""
    last_crowd: dict[int, int] = {}
    for position in np.flatnonzero(gt_segments.is_crowd).tolist():
        last_crowd[int(gt_segments.category_ids[position])] = position
    on_crowd = np.isin(overlaps.gt_index, list(last_crowd.values())) & (overlaps.pred_index >= 0)
    gt_index, pred_index, pixels = (column[on_crowd] for column in overlaps)
    own = gt_segments.category_ids[gt_index] == pred_segments.category_ids[pred_index]
    return _sum_pixels(pred_index[own], pixels[own], len(pred_segments.ids))
