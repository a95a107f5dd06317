"""Segment maps: as panoptic PNGs and label images on disk, and their runs and extents.

Shapes: H height, W width.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from panopticapi.utils import id2rgb
from PIL import Image

from ..errors import UserError
from .images import (
    EXIF_TRANSPOSITIONS,
    PNG_SIGNATURE,
    is_deep,
    opened,
    orientation_of,
    write_image,
)

IntArray = npt.NDArray[np.integer[Any]]

_JPEG_SIGNATURE = b"\xff\xd8\xff"
_PNG_RGB, _PNG_RGBA = 2, 6  # color types, byte 25 of the header
_PNG_COLOR_TYPES = {
    0: "grey",
    _PNG_RGB: "RGB",
    3: "palette",
    4: "grey with alpha",
    _PNG_RGBA: "RGBA",
}


def read_segment_map(path: str | Path) -> npt.NDArray[np.int32]:
    """Decode a panoptic PNG to its segment map.

    EXIF data is ignored, as in panopticapi.

    Args:
        path: a PNG in RGB or RGBA; a fourth channel is ignored.

    Returns:
        (H, W) int32, the segment id R + 256 G + 65536 B of every pixel; 0 is void.

    Raises:
        UserError: the file is missing or damaged, is not a PNG, or has another color mode.
    """
    pixels = None
    with opened(path, "panoptic PNG") as image:
        width, height = image.size
        if image.format == "PNG" and image.mode in ("RGB", "RGBA"):
            # With four bytes per pixel the buffer already holds little-endian integers.
            pixels = image.tobytes("raw", "RGBX" if image.mode == "RGB" else "RGBA")
    if pixels is None:
        fault = png_fault(path)
        assert fault is not None, path
        raise UserError(fault.message)
    return np.frombuffer(pixels, dtype="<i4").reshape(height, width) & 0xFFFFFF


def read_index_map(path: str | Path) -> npt.NDArray[np.int32]:
    """Read a label image: the value of a grey image, or the index of a palette.

    Args:
        path: an image with one channel of up to 16 bits, or of 32 signed bits.

    Returns:
        (H, W) int32.

    Raises:
        UserError: the file is missing or damaged, or has several channels.
    """
    with opened(path, "label image") as image:
        mode, pixels = image.mode, np.asarray(image)
    if pixels.ndim != 2:
        raise UserError(
            f"label image {path} is {mode}, and its values are not indices: save it with a palette "
            "or in grey"
        )
    return pixels.astype(np.int32)


def possible_segment_maps(path: str | Path) -> list[npt.NDArray[np.int32]]:
    """Decode a panoptic PNG of any color mode to the segment maps that it may stand for.

    Returns:
        (H, W) int32 each: colors as ids, with red first and with blue first, and the values of a
        grey image or the indices of a palette; of 16-bit grey only the values.

    Raises:
        UserError: the file is missing or damaged.
    """
    with opened(path, "panoptic PNG") as image:
        image.load()
        maps = []
        if not is_deep(image.mode):
            red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=np.int32), -1, 0)
            maps = [red | green << 8 | blue << 16, blue | green << 8 | red << 16]
            if (red == green).all() and (red == blue).all():
                maps.append(red)
        if is_deep(image.mode) or image.mode == "P":
            maps.append(np.asarray(image, dtype=np.int32))
    return maps


def read_png_size(path: str | Path) -> tuple[int, int]:
    """Return (H, W) of a panoptic PNG from its header.

    Raises:
        UserError: the file is missing or is not an image.
    """
    with opened(path, "panoptic PNG", check=False) as image:
        width, height = image.size
    return height, width


class PngFault(NamedTuple):
    """The difference between a panoptic PNG and one of 8-bit RGB."""

    message: str
    is_readable: bool  # `read_segment_map` reads it all the same


def png_fault(path: str | Path) -> PngFault | None:
    """Compare the header of a file with that of an 8-bit RGB PNG.

    Pillow's ``mode`` is not enough: it also reads 16-bit channels as 8 bits.
    """
    with open(path, "rb") as file:
        header = file.read(26)
    remedy = "tools/check_dataset.py --fix writes such PNGs again"
    if header.startswith(_JPEG_SIGNATURE):
        found, remedy = "not a PNG but a JPEG, which changes ids", "export the masks again as PNG"
    elif not header.startswith(PNG_SIGNATURE):
        found, remedy = "not a PNG", "export the masks again as PNG"
    elif len(header) < 26:
        found, remedy = "cut off within its header", "copy it again"
    else:
        depth, color_type = header[24], header[25]
        if (depth, color_type) == (8, _PNG_RGB):
            return None
        found = f"a PNG of {depth}-bit {_PNG_COLOR_TYPES.get(color_type, color_type)}"
        if color_type in (_PNG_RGB, _PNG_RGBA):
            read = "the fourth channel is ignored" if depth == 8 else "the upper 8 bits are read"
            return PngFault(f"panoptic PNG {path} is {found}; {read}", True)
    return PngFault(
        f"panoptic PNG {path} is {found}; segment ids need a PNG of 8-bit RGB ({remedy})", False
    )


def write_segment_map(path: str | Path, segment_map: IntArray) -> None:
    """Write an (H, W) segment map as a panoptic PNG, which `read_segment_map` reads.

    Raises:
        UserError: the file cannot be written.
    """
    write_image(path, id2rgb(segment_map))


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


def turn_by_exif(segment_map: npt.NDArray[np.int32], image: str | Path) -> npt.NDArray[np.int32]:
    """Turn a segment map made for an image as it is stored like `read_image` turns the image.

    Raises:
        UserError: the image is missing or is not readable.
    """
    with opened(image, "image", check=False) as stored:
        orientation = orientation_of(stored)
    if orientation not in EXIF_TRANSPOSITIONS:
        return segment_map
    return np.asarray(Image.fromarray(segment_map).transpose(EXIF_TRANSPOSITIONS[orientation]))
