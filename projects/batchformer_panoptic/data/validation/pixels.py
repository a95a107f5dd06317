"""Checks of the pixels of a panoptic PNG against the JSON.

H, W: height and width of the PNG; S: segments with pixels; R: runs of pixels.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from ..segment_maps import Extent, IntArray, runs, segment_extents
from .problems import Problem, Record, image_name, is_integer, segment_number, segments_of

BBOX_TOLERANCE = 1  # pixels: tools disagree on whether a box includes the last pixel
_SPECK = 9  # pixels; a smaller segment is usually a slip of the annotator
# Two parts of a thing are far apart if nothing is in this share of its box between them.
_FAR_SHARE, _FAR_PIXELS = 0.5, 8
# More unlisted ids than this, and than four for each listed one, are no ids at all.
_MANY_IDS = 32


def check_pixels(
    annotation: Record, segment_map: IntArray, things: Collection[int] = ()
) -> Iterator[Problem]:
    """Compare ``segments_info`` with the (H, W) segment map of the PNG.

    Args:
        annotation: the annotation record.
        segment_map: the segment ids of its PNG.
        things: ids of the categories of which a segment should be one object.
    """
    image = image_name(annotation)
    segments = segments_of(annotation)
    ids = [segment_number(segment) for segment in segments]
    extents = segment_extents(segment_map)
    problems = list(check_segment_ids(extents, ids, image))
    yield from problems
    if any(problem.kind in _OTHER_IDS for problem in problems):
        return  # every other check would fail as well
    single = set()
    for segment, segment_id in zip(segments, ids, strict=True):
        if segment_id is None or segment_id not in extents:
            continue
        extent = extents[segment_id]
        if "area" in segment:
            yield from check_area(segment_id, segment["area"], extent.area, image)
        yield from check_bbox(segment, extent, image)
        if segment.get("iscrowd") == 1:
            continue
        if extent.area < _SPECK:
            message = f"a speck of {extent.area} pixels"
            yield Problem("speck", message, image, segment_id, "warning")
        category_id = segment.get("category_id")
        if is_integer(category_id) and category_id in things:
            single.add(segment_id)
    yield from check_pieces(segment_map, {key: extents[key] for key in single}, image)


# ---------------------------------------------------------------------------
# Ids
# ---------------------------------------------------------------------------

# Kinds of PNGs whose pixels are no ids of this JSON.
_SWAPPED, _GREY, _NO_IDS = "PNG red and blue swapped", "PNG of grey values", "PNG without ids"
_OTHER_IDS = {_SWAPPED, _GREY, _NO_IDS}


def check_segment_ids(
    extents: Mapping[int, Extent], ids: Sequence[int | None], image: str
) -> Iterator[Problem]:
    """Check that the ids with pixels are the listed ones.

    Args:
        extents: the segments with pixels, by id.
        ids: the ids in ``segments_info``; None is ignored.
        image: names the image or the PNG.
    """
    listed = {segment_id for segment_id in ids if segment_id is not None}
    unlisted = sorted(extents.keys() - listed)
    if other := _other_ids(extents.keys(), listed):
        yield Problem(*other, image)
        return
    for segment_id in unlisted:
        message = f"not listed in segments_info (pixels: {extents[segment_id].area})"
        yield Problem("PNG id not in JSON", message, image, segment_id)
    for missing in ids:
        if missing is not None and missing not in extents:
            yield segment_without_pixels(missing, image)


def _other_ids(found: Collection[int], listed: Collection[int]) -> tuple[str, str] | None:
    """Return kind and sentence if the pixels hold something other than the listed ids."""
    found, listed = set(found), set(listed)
    unlisted = found - listed
    if not listed or not unlisted:
        return None
    swapped = {swap_red_and_blue(value) for value in found}
    if swapped == listed or (listed.isdisjoint(found) and listed & swapped):
        return _SWAPPED, "the ids match if red and blue change places"
    if {grey_value(value) for value in found} == listed:
        message = (
            "the PNG has grey values in all three channels; write an id as R + 256 G + 65536 B"
        )
        return _GREY, message
    if len(unlisted) > max(_MANY_IDS, 4 * len(listed)):
        message = f"the PNG has {len(unlisted)} ids that segments_info does not list: it was saved "
        message += "as JPEG or resized with smoothing, or it is a photograph (are the folders of "
        return _NO_IDS, message + "images and PNGs swapped?)"
    if listed.isdisjoint(found) and len(unlisted) > 1:
        red, green, blue = (min(found) >> shift & 255 for shift in (0, 8, 16))
        message = f"the PNG has none of the ids in segments_info, but colors such as ({red}, "
        message += f"{green}, {blue}): it shows classes, or belongs to another image"
        return _NO_IDS, message
    return None


def swap_red_and_blue(segment_id: int) -> int:
    """Return the id of a pixel after red and blue have changed places."""
    return (segment_id & 255) << 16 | segment_id & 0xFF00 | segment_id >> 16


def grey_value(segment_id: int) -> int | None:
    """Return the value that all three channels of an id have, or None."""
    value = segment_id & 255
    return value if segment_id == value * 0x010101 else None


def segment_without_pixels(segment_id: int, image: str) -> Problem:
    """Return the problem of a listed id that no pixel has."""
    message = "listed in segments_info, but no pixel has this id"
    return Problem("JSON id not in PNG", message, image, segment_id)


# ---------------------------------------------------------------------------
# Areas, boxes and pieces
# ---------------------------------------------------------------------------


def check_area(segment_id: int, stated: object, pixels: int, image: str) -> Iterator[Problem]:
    """Check that the stated area is the number of pixels."""
    if stated != pixels:
        message = f"area is {stated!r}, but the PNG has {pixels} pixels; panopticapi divides by the"
        message += " stated area, and a wrong one gives a wrong IoU, even above 1"
        yield Problem("wrong area", message, image, segment_id)


def check_bbox(segment: Record, extent: Extent, image: str) -> Iterator[Problem]:
    """Check that the stated box, which this package does not read, is tight."""
    found = segment.get("bbox")
    if found is None:
        yield Problem("no bbox", "segment without 'bbox'", image, segment["id"], "warning")
        return
    is_box = isinstance(found, list) and len(found) == 4
    try:
        offset = np.abs(np.array(found, float) - extent.bbox_xywh).max() if is_box else np.inf
    except (TypeError, ValueError):
        offset = np.inf
    if not offset <= BBOX_TOLERANCE:
        box = list(extent.bbox_xywh)
        message = f"bbox is {found!r}, but in the PNG it is {box} (x, y, width, height)"
        yield Problem("wrong bbox", message, image, segment["id"], "warning")


def check_pieces(
    segment_map: IntArray, extents: Mapping[int, Extent], image: str
) -> Iterator[Problem]:
    """Report segments in two parts with wide empty space between them.

    Args:
        segment_map: (H, W) integers.
        extents: of the segments to check.
        image: names the image.
    """
    if not extents:
        return
    ids = np.array(sorted(extents))
    width = segment_map.shape[1]
    starts, lengths = runs(segment_map, within_rows=True)
    run_ids = segment_map.ravel()[starts]
    index = np.minimum(np.searchsorted(ids, run_ids), len(ids) - 1)
    known = ids[index] == run_ids
    index, (rows, columns), lengths = index[known], np.divmod(starts[known], width), lengths[known]
    # +1 where a run begins and -1 behind its end: the sum along a row is the number of runs that
    # cover a column.
    size = len(ids) * (width + 1)
    begins = np.bincount(index * (width + 1) + columns, minlength=size)
    ends = np.bincount(index * (width + 1) + columns + lengths, minlength=size)
    covered = (begins - ends).reshape(len(ids), width + 1).cumsum(axis=1) > 0
    order = np.argsort(index, kind="stable")
    rows_of = np.split(rows[order], np.cumsum(np.bincount(index, minlength=len(ids)))[:-1])
    for segment_id, used_columns, used_rows in zip(ids.tolist(), covered, rows_of, strict=True):
        _, _, box_width, box_height = extents[segment_id].bbox_xywh
        for positions, side in ((np.flatnonzero(used_columns), box_width), (used_rows, box_height)):
            gap = int(np.diff(positions).max(initial=1)) - 1
            if gap >= max(_FAR_PIXELS, _FAR_SHARE * side):
                message = f"in two parts that are {gap} pixels apart: is it one object?"
                yield Problem("parts far apart", message, image, segment_id, "warning")
                break
