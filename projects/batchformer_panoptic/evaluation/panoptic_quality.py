"""Panoptic quality of segment maps in memory, by panopticapi's rules and formulas.

Panoptic quality is defined in arXiv 1801.00868; the matching of segments and the treatment of void
and crowds follow ``pq_compute_single_core`` of panopticapi. Counts are collected in panopticapi's
``PQStat`` and averaged by its ``PQStat.pq_average``. There are two differences: the area of a
ground-truth segment is counted in the map and not read (an annotated area that is too small gives
an IoU above 1), and inconsistent annotations are refused.

Every false negative and false positive also gets a kind (see `ErrorKind`), which explains a quality
without changing it.

Shapes: H, W image size; S segments of one map; P pairs of segments that share pixels; R runs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
from panopticapi.evaluation import VOID, PQStat

from ..data.segment_maps import runs, segment_extents
from ..data.validation import (
    check_area,
    check_repeated_ids,
    check_segment_ids,
    raise_first_error,
)
from ..errors import UserError

_MATCH_IOU = 0.5  # an IoU above one half makes the match unique
_IGNORED_SHARE = 0.5  # predictions with a larger share of void and crowd do not count
_OVERLAP_IOU = 0.1  # less is no attempt at the same segment (as in TIDE, arXiv 2008.08115)

# Kinds of errors, for the false negatives and false positives of a panoptic quality:
#   confused   a false negative and a false positive of different classes with an IoU above 0.5
#   poor_mask  of the others: a false negative and a false positive of the same class with an IoU
#              from 0.1 to 0.5, one to one, the largest IoU first
#   missed     every other false negative
#   invented   every other false positive
ErrorKind = Literal["confused", "poor_mask", "missed", "invented"]


class PanopticError(NamedTuple):
    """One kind of error between two classes (data set category ids).

    Attributes:
        kind: see `ErrorKind`.
        true_class: of the false negative, or None.
        predicted_class: of the false positive, or None.
    """

    kind: ErrorKind
    true_class: int | None
    predicted_class: int | None


@dataclass
class PanopticCounts:
    """Contributions of images: panopticapi's counts per category, and the kinds of errors."""

    pq: PQStat = field(default_factory=PQStat)
    errors: Counter[PanopticError] = field(default_factory=Counter)

    def __iadd__(self, other: "PanopticCounts") -> "PanopticCounts":
        self.pq += other.pq
        self.errors.update(other.errors)
        return self

    def mean_pq(self) -> float | None:
        """Panoptic quality of these images, 0 to 1; None without any segment that counts."""
        values = [
            count.iou / (count.tp + count.fp / 2 + count.fn / 2)
            for count in self.pq.pq_per_cat.values()
            if count.tp + count.fp + count.fn
        ]
        return sum(values) / len(values) if values else None


class Segments(NamedTuple):
    """The segments of one map, in the order of the annotation; all arrays are (S,)."""

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
    """Count the matches of one image per category; see `count_image`."""
    return count_image(pred_map, pred_segments, gt_map, gt_segments, image_name=image_name).pq


def count_image(
    pred_map: np.ndarray,
    pred_segments: Segments,
    gt_map: np.ndarray,
    gt_segments: Segments,
    *,
    image_name: str,
) -> PanopticCounts:
    """Count the matches and the errors of one image.

    A prediction and a ground-truth segment of the same category match if their IoU, without the
    prediction's pixels on void, is above 0.5. Crowd segments neither match nor count as missed. A
    prediction with more than half of its pixels on void or on the crowd of its category is not a
    false positive; if a category has several crowd segments, panopticapi uses the last one.

    Args:
        pred_map: (H, W) integers, the predicted segment map; 0 is void unless a predicted segment
            has this id.
        pred_segments: the predicted segments. Their areas are counted, not read.
        gt_map: (H, W) integers, the true segment map; 0 is void.
        gt_segments: the true segments.
        image_name: names the image in errors.

    Returns:
        Counts of the categories (data set ids) that have any, and the errors behind them.

    Raises:
        UserError: the ground truth is inconsistent: a segment whose area differs from the
            annotation, or an id that is 0, not annotated or repeated.
        ValueError: the prediction is inconsistent, or its size differs from the ground truth.
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
    pairs = _pairs(overlaps, gt_areas, pred_areas - void_pixels)
    same_class = (
        gt_segments.category_ids[pairs.gt_index] == pred_segments.category_ids[pairs.pred_index]
    )
    matches = pairs.only(
        same_class & ~gt_segments.is_crowd[pairs.gt_index] & (pairs.iou > _MATCH_IOU)
    )
    missed = ~gt_segments.is_crowd
    missed[matches.gt_index] = False
    crowd_pixels = _pixels_on_own_crowd(overlaps, gt_segments, pred_segments)
    spurious = ~((void_pixels + crowd_pixels) / pred_areas > _IGNORED_SHARE)
    spurious[matches.pred_index] = False

    counts = _counts_by_category(
        gt_segments.category_ids[matches.gt_index],
        matches.iou,
        gt_segments.category_ids[missed],
        pred_segments.category_ids[spurious],
    )
    errors = _errors(pairs, same_class, missed, spurious, gt_segments, pred_segments)
    return PanopticCounts(counts, errors)


def _errors(
    pairs: "_Pairs",
    same_class: np.ndarray,
    missed: np.ndarray,
    spurious: np.ndarray,
    gt_segments: Segments,
    pred_segments: Segments,
) -> Counter[PanopticError]:
    """Give every missed and every spurious segment its kind of error.

    Args:
        pairs: of P segments.
        same_class: (P,) bool.
        missed: (S,) bool, the false negatives.
        spurious: (S,) bool, the false positives.
        gt_segments: the true segments.
        pred_segments: the predicted segments.
    """
    true_classes = gt_segments.category_ids.tolist()
    predicted_classes = pred_segments.category_ids.tolist()
    # With an IoU above one half a pair of different classes comes before every other pair of its
    # two segments: the IoUs of these are below one half.
    related = np.where(same_class, pairs.iou >= _OVERLAP_IOU, pairs.iou > _MATCH_IOU)
    related &= missed[pairs.gt_index] & spurious[pairs.pred_index]
    candidates = pairs.only(related)
    errors: Counter[PanopticError] = Counter()
    lost, extra = set(np.flatnonzero(missed).tolist()), set(np.flatnonzero(spurious).tolist())
    for position in np.argsort(-candidates.iou, kind="stable").tolist():
        true, predicted = int(candidates.gt_index[position]), int(candidates.pred_index[position])
        if true not in lost or predicted not in extra:
            continue
        lost.remove(true)
        extra.remove(predicted)
        true_class, predicted_class = true_classes[true], predicted_classes[predicted]
        kind: ErrorKind = "poor_mask" if true_class == predicted_class else "confused"
        errors[PanopticError(kind, true_class, predicted_class)] += 1
    for true in lost:
        errors[PanopticError("missed", true_classes[true], None)] += 1
    for predicted in extra:
        errors[PanopticError("invented", None, predicted_classes[predicted])] += 1
    return errors


def _counts_by_category(
    matched: np.ndarray, ious: np.ndarray, missed: np.ndarray, spurious: np.ndarray
) -> PQStat:
    """Count category ids of true positives with their IoU, false negatives, false positives."""
    counts = PQStat()
    for category_id, iou in zip(matched.tolist(), ious.tolist(), strict=True):
        counts[category_id].tp += 1
        counts[category_id].iou += iou
    for category_id in missed.tolist():
        counts[category_id].fn += 1
    for category_id in spurious.tolist():
        counts[category_id].fp += 1
    return counts


def _overlaps(
    pred_map: np.ndarray,
    pred_segments: Segments,
    gt_map: np.ndarray,
    gt_segments: Segments,
    image_name: str,
) -> _Overlaps:
    """Intersect two (H, W) segment maps; pairs are sorted by both positions."""
    if VOID in gt_segments.ids:
        raise UserError(
            f"{image_name}: segments_info lists a segment with the id {VOID}, which is void; give "
            "it another id"
        )
    starts, lengths = runs(gt_map, pred_map)
    try:
        gt_index = _look_up(gt_map.ravel()[starts], gt_segments.ids)
    except ValueError as error:
        gt_ids = gt_segments.ids.tolist()
        problems = chain(
            check_repeated_ids(gt_ids, image_name),
            check_segment_ids(segment_extents(gt_map), gt_ids, image_name),
        )
        raise UserError(str(next(problems))) from error
    try:
        pred_index = _look_up(pred_map.ravel()[starts], pred_segments.ids)
    except ValueError as error:
        raise ValueError(
            f"the prediction for image {image_name} is inconsistent: {error}"
        ) from error
    # Count in a table with a cell for each pair, void in row and column 0. It takes 8 MB for 1000
    # segments in either map; sorting the runs would take longer than everything else.
    width = len(pred_segments.ids) + 1
    size = (len(gt_segments.ids) + 1) * width
    table = _sum_pixels((gt_index + 1) * width + pred_index + 1, lengths, size)
    cells = np.flatnonzero(table)
    rows, columns = np.divmod(cells, width)
    return _Overlaps(rows - 1, columns - 1, table[cells])


def _look_up(ids: np.ndarray, known_ids: np.ndarray) -> np.ndarray:
    """Find the position of each id (R,) among the known ones, -1 for void.

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
    """Sum ``pixels`` (P,) by ``index`` (P,), ignoring index -1; returns (size,) int64."""
    # bincount sums in float64, which is exact up to 2**53 pixels.
    return np.bincount(index + 1, weights=pixels, minlength=size + 1)[1:].astype(np.int64)


def _check_ground_truth_areas(segments: Segments, areas: np.ndarray, image_name: str) -> None:
    # No formula contains the area of a crowd, so a wrong one is harmless.
    wrong = (segments.areas >= 0) & (segments.areas != areas) & ~segments.is_crowd
    for position in np.flatnonzero(wrong).tolist():
        segment_id, stated = int(segments.ids[position]), int(segments.areas[position])
        raise_first_error(check_area(segment_id, stated, int(areas[position]), image_name))


class _Pairs(NamedTuple):
    """A true and a predicted segment that share pixels, by position; (P,) each."""

    gt_index: np.ndarray  # int64
    pred_index: np.ndarray  # int64
    iou: np.ndarray  # float64, without the prediction's pixels on void

    def only(self, chosen: np.ndarray) -> "_Pairs":
        """Return the pairs where ``chosen`` (P,) is True."""
        return _Pairs(*(column[chosen] for column in self))


def _pairs(overlaps: _Overlaps, gt_areas: np.ndarray, pred_areas_off_void: np.ndarray) -> _Pairs:
    both = (overlaps.gt_index >= 0) & (overlaps.pred_index >= 0)
    gt_index, pred_index, pixels = (column[both] for column in overlaps)
    unions = pred_areas_off_void[pred_index] + gt_areas[gt_index] - pixels
    return _Pairs(gt_index, pred_index, pixels / unions)


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
