"""Pictures beside each other."""

from collections.abc import Sequence

import cv2
import numpy as np

from .images import ImageArray

_MARGIN, _TITLE_HEIGHT = 8, 34  # pixels
_BACKGROUND, _INK = 255, (40, 40, 40)


def side_by_side(panels: Sequence[ImageArray], titles: Sequence[str]) -> ImageArray:
    """Pictures in one row on white, each under its title.

    Args:
        panels: RGB pictures (H_i, W_i, 3); smaller ones are enlarged to the height of the highest.
        titles: one for each, ASCII.

    Returns:
        uint8 RGB.
    """
    height = max(panel.shape[0] for panel in panels)
    columns = []
    for panel, title in zip(panels, titles, strict=True):
        scaled = _scaled(panel, height / panel.shape[0])
        bar = np.full((_TITLE_HEIGHT, scaled.shape[1], 3), _BACKGROUND, dtype=np.uint8)
        cv2.putText(bar, title, (2, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.7, _INK, 1, cv2.LINE_AA)
        columns.append(_framed(np.vstack([bar, scaled])))
    return np.hstack(columns)


def contact_sheet(
    pictures: Sequence[ImageArray], *, columns: int = 2, max_width: int = 1250
) -> ImageArray:
    """Pictures in a grid on white, row by row.

    Args:
        pictures: at least one, RGB.
        columns: how many in a row.
        max_width: wider pictures are shrunk to this many pixels.

    Returns:
        uint8 RGB.
    """
    cells = [_scaled(picture, min(1.0, max_width / picture.shape[1])) for picture in pictures]
    width = max(cell.shape[1] for cell in cells)
    rows = []
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        height = max(cell.shape[0] for cell in row)
        padded = [_padded(cell, height, width) for cell in row]
        missing = min(columns, len(cells)) - len(row)
        padded += [_padded(row[0][:0], height, width)] * missing
        rows.append(np.hstack(padded))
    return np.vstack(rows)


def _scaled(picture: ImageArray, factor: float) -> ImageArray:
    if factor == 1.0:
        return picture
    size = max(1, round(factor * picture.shape[1])), max(1, round(factor * picture.shape[0]))
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, size, interpolation=method), dtype=np.uint8)


def _framed(picture: ImageArray) -> ImageArray:
    return np.pad(picture, ((0, _MARGIN), (_MARGIN, _MARGIN), (0, 0)), constant_values=_BACKGROUND)


def _padded(picture: ImageArray, height: int, width: int) -> ImageArray:
    below, beside = height - picture.shape[0], width - picture.shape[1]
    return np.pad(picture, ((0, below), (0, beside), (0, 0)), constant_values=_BACKGROUND)
