"""Text in pictures: fonts for any script, labels, titles and legends."""

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from ..data.class_table import ClassTable, Color
from ..data.images import ImageArray

logger = logging.getLogger(__name__)

Font = ImageFont.FreeTypeFont

_INK: Color = (40, 40, 40)
_PAPER: Color = (255, 255, 255)
# Behind the names of regions: black, with this opacity (0 to 255).
_SHADOW_OPACITY = 190
_FONT_SUFFIXES = {".otf", ".ttc", ".ttf"}


class Label(NamedTuple):
    """A text on a dark box.

    Attributes:
        text: one line.
        color: RGB of the text, lightened for contrast if it is dark.
        x0: left edge of the box in pixels.
        y0: upper edge.
        x1: right edge.
        y1: lower edge.
        pixels: size of the font.
    """

    text: str
    color: Color
    x0: float
    y0: float
    x1: float
    y1: float
    pixels: int


def class_names(table: ClassTable) -> list[str]:
    """Return a drawable name of every class.

    A name with characters that no font on this machine has becomes ``#`` and the id of the class in
    the data set's files. A warning says so once.
    """
    return [
        name if all(map(_font_path, name.split())) else f"#{dataset_id}"
        for name, dataset_id in zip(table.names, table.dataset_ids, strict=True)
    ]


def legend_entries(
    table: ClassTable, class_ids: Iterable[int] | None = None
) -> list[tuple[str, Color]]:
    """Return name and color of classes, given by contiguous ids (None: all of them)."""
    names = class_names(table)
    chosen = range(table.num_classes) if class_ids is None else sorted(set(class_ids))
    return [(names[class_id], table.colors[class_id]) for class_id in chosen]


def label_size(text: str, pixels: int) -> tuple[float, float]:
    """Return (width, height) in pixels of the box around a text."""
    return _width(text, pixels) + 0.4 * pixels, 1.3 * pixels


def draw_labels(picture_rgb: ImageArray, labels: Sequence[Label]) -> ImageArray:
    """Return a copy of an RGB picture (H, W, 3) with labels, the first one on top."""
    image = Image.fromarray(picture_rgb)
    canvas = ImageDraw.Draw(image, "RGBA")
    for label in reversed(labels):
        edges = (label.x0, label.y0, label.x1, label.y1)
        canvas.rectangle(edges, fill=(0, 0, 0, _SHADOW_OPACITY))
        start = label.x0 + 0.2 * label.pixels, (label.y0 + label.y1) / 2
        _write(canvas, start, label.text, _light(label.color), label.pixels)
    return np.asarray(image)


def title_bar(text: str, width: int, pixels: int) -> ImageArray:
    """Return a white bar (1.7 * pixels, width, 3) with a title on the left."""
    image = Image.new("RGB", (width, round(1.7 * pixels)), _PAPER)
    _write(ImageDraw.Draw(image), (2, image.height / 2), text, _INK, pixels)
    return np.asarray(image)


def legend(entries: Sequence[tuple[str, Color]], width: int, pixels: int) -> ImageArray:
    """Return a white strip (h, width, 3) with a colored square and a text for each entry.

    Args:
        entries: at least one text and its RGB color; they fill as many lines as they need.
        width: in pixels.
        pixels: size of the font.
    """
    gap, line = round(0.8 * pixels), round(1.6 * pixels)
    places: list[tuple[int, int]] = []
    x, y = gap, 0
    for text, _ in entries:
        needed = round(_width(text, pixels)) + pixels + 2 * gap
        if x > gap and x + needed > width:
            x, y = gap, y + line
        places.append((x, y))
        x += needed
    image = Image.new("RGB", (width, y + line), _PAPER)
    canvas = ImageDraw.Draw(image)
    for (x, y), (text, color) in zip(places, entries, strict=True):
        top = y + (line - pixels) // 2
        canvas.rectangle((x, top, x + pixels, top + pixels), fill=color, outline=_INK)
        _write(canvas, (x + pixels + gap // 2, y + line / 2), text, _INK, pixels)
    return np.asarray(image)


def _write(
    canvas: ImageDraw.ImageDraw, start: tuple[float, float], text: str, color: Color, pixels: int
) -> None:
    """Write one line; ``start`` is the middle of its left edge."""
    x, y = start
    for part, font in _parts(text, pixels):
        canvas.text((x, y), part, fill=color, font=font, anchor="lm")
        x += font.getlength(part)


def _width(text: str, pixels: int) -> float:
    return sum(font.getlength(part) for part, font in _parts(text, pixels))


def _parts(text: str, pixels: int) -> list[tuple[str, Font]]:
    """Split a text where the font changes: those of some scripts have no Latin letters."""
    words = text.split()
    spaced = [f"{word} " for word in words[:-1]] + words[-1:]
    runs = groupby(spaced, lambda word: _font_path(word.strip()) or _default_font())
    return [("".join(part), _font(path, pixels)) for path, part in runs]


def _light(color: Color) -> Color:
    red, green, blue = (round(0.5 * (channel + 255)) for channel in color)
    return red, green, blue


@cache
def _font(path: str, pixels: int) -> Font:
    return ImageFont.truetype(path, pixels)


def _default_font() -> str:
    """Path of DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew."""
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@cache
def _font_path(word: str) -> str | None:
    """Return the first font with all characters of a word; None, after a warning: there is none."""
    # Spaces, joiners and marks of direction need no glyph.
    needed = {ord(c) for c in word if unicodedata.category(c)[0] not in "ZC"}
    for path in (_default_font(), *_system_fonts()):
        if needed <= _characters(path):
            return path
    logger.warning(
        f"no font on this machine can write {word!r}: pictures show the id of the class instead; "
        "install a font for this script, such as Noto Sans"
    )
    return None


@cache
def _system_fonts() -> list[str]:
    return sorted(p for p in findSystemFonts() if Path(p).suffix.lower() in _FONT_SUFFIXES)


@cache
def _characters(path: str) -> frozenset[int]:
    """Code points of a font; none for a file that cannot be read or has no scalable outlines."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
