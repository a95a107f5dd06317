"""Where the names of regions are written, so that they stay apart and inside the picture."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from ..data.categories import Color
from .scene import BoolMap, Box, Region

_POINTS_PER_PIXEL = 0.72  # the Visualizer draws 100 pixels an inch
_CHARACTER_WIDTH, _LINE_HEIGHT = 0.64, 1.5  # of the font size, frame included
_SMALLEST, _LARGEST = 14.0, 22.0  # font size in pixels


class Label(NamedTuple):
    """A text, its colour, its top left corner (pixels) and its size (points)."""

    text: str
    color: Color
    x: float
    y: float
    points: float


class _Rectangle(NamedTuple):
    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: "_Rectangle") -> float:
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(0.0, width) * max(0.0, height)


def place_labels(
    named: Sequence[tuple[Region, str, Color]], things: Sequence[bool], size: tuple[int, int]
) -> list[Label]:
    """Choose a place for every text.

    Small things are named above or below, large ones inside; stuff is named where it is widest
    beside the names of the things. Names overlap only where the picture is too crowded.

    Args:
        named: region, its text and colour.
        things: which of them are things.
        size: (height, width) of the picture.
    """
    pixels = float(np.clip(min(size) / 30, _SMALLEST, _LARGEST))
    placed: list[_Rectangle] = []
    labels = []
    for index in sorted(range(len(named)), key=lambda index: not things[index]):
        region, text, color = named[index]
        mask = region.mask
        if mask is not None and not mask.any():
            continue
        width, height = pixels * (_CHARACTER_WIDTH * len(text) + 0.3), pixels * _LINE_HEIGHT
        if things[index] or mask is None:
            candidates = _beside_thing(region.box, mask, width, height)
        else:
            candidates = [_widest_place(mask, placed, width, height)]
        rectangles = [_inside(x, y, width, height, size) for x, y in candidates]
        best = min(rectangles, key=lambda rectangle: sum(map(rectangle.overlap, placed)))
        placed.append(best)
        labels.append(Label(text, color, best.x0, best.y0, pixels * _POINTS_PER_PIXEL))
    return labels


def _beside_thing(
    box: Box | None, mask: BoolMap | None, width: float, height: float
) -> list[tuple[float, float]]:
    """Top left corners in the order of preference."""
    if box is not None:
        x0, y0, x1, y1 = box
        return [(x0, y0 - height), (x0, y0), (x0, y1), (x1 - width, y0), (x1 - width, y1 - height)]
    assert mask is not None
    rows, columns = np.nonzero(mask)
    x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    middle = (x0 + x1 - width) / 2
    around = [
        (middle, y0 - height),
        (middle, y1),
        (x1, (y0 + y1 - height) / 2),
        (x0 - width, (y0 + y1 - height) / 2),
    ]
    x, y, radius = _widest_point(mask)
    inside = (x - width / 2, y - height / 2)
    # A name inside has to leave most of the thing visible.
    return [inside, *around] if radius > 1.5 * height else [*around, inside]


def _widest_place(
    mask: BoolMap, placed: list[_Rectangle], width: float, height: float
) -> tuple[float, float]:
    free = mask.copy()
    for other in placed:
        rows = slice(int(max(0, other.y0)), int(other.y1) + 1)
        columns = slice(int(max(0, other.x0)), int(other.x1) + 1)
        free[rows, columns] = False
    x, y, _ = _widest_point(free if free.any() else mask)
    return x - width / 2, y - height / 2


def _widest_point(mask: BoolMap) -> tuple[float, float, float]:
    """x, y and radius of the largest circle inside; beyond the picture counts as outside."""
    distance = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(x) - 1, float(y) - 1, float(distance[y, x])


def _inside(x: float, y: float, width: float, height: float, size: tuple[int, int]) -> _Rectangle:
    x = max(1.0, min(x, size[1] - width))
    y = max(1.0, min(y, size[0] - height))
    return _Rectangle(x, y, x + width, y + height)
