"""Runs of equal pixels in segment maps, and the extents of their segments.

A segment map is an (H, W) integer array that holds the segment of every pixel. In a map read from a
panoptic PNG the values are segment ids, and 0 is void.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .io import IntArray


class Extent(NamedTuple):
    """Pixels of a segment; ``bbox_xywh`` is tight, in pixels."""

    area: int
    bbox_xywh: tuple[int, int, int, int]


def runs(
    *segment_maps: IntArray, within_rows: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find the runs of pixels, read row by row, over which none of the maps changes.

    There are far fewer runs than pixels, so that work per run is much cheaper than per pixel.

    Args:
        *segment_maps: (H, W) integers, all of one shape.
        within_rows: also end a run at the end of its row.

    Returns:
        First pixel of every run, as a position in the flattened map, and its length in pixels.
    """
    first = segment_maps[0].ravel()
    is_start = np.ones(first.size, dtype=bool)
    np.not_equal(first[1:], first[:-1], out=is_start[1:])
    for segment_map in segment_maps[1:]:
        flat = segment_map.ravel()
        is_start[1:] |= flat[1:] != flat[:-1]
    if within_rows:
        is_start.reshape(segment_maps[0].shape)[:, :1] = True
    starts = np.flatnonzero(is_start)
    return starts, np.diff(starts, append=first.size)


def segment_extents(segment_map: IntArray) -> dict[int, Extent]:
    """Return area and box of every id in a segment map, except void (0)."""
    height, width = segment_map.shape
    starts, lengths = runs(segment_map, within_rows=True)
    ids, index = np.unique(segment_map.ravel()[starts], return_inverse=True)
    top, left = np.full(len(ids), height), np.full(len(ids), width)
    bottom, right = np.zeros(len(ids), int), np.zeros(len(ids), int)
    rows, columns = np.divmod(starts, width)
    np.minimum.at(top, index, rows)
    np.maximum.at(bottom, index, rows + 1)
    np.minimum.at(left, index, columns)
    np.maximum.at(right, index, columns + lengths)
    areas = np.bincount(index, weights=lengths).astype(int)
    boxes = np.stack([left, top, right - left, bottom - top], axis=1)
    found = zip(ids.tolist(), areas.tolist(), boxes.tolist(), strict=True)
    return {key: Extent(area, tuple(box)) for key, area, box in found if key != 0}
