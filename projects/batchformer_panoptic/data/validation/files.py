"""Checks of the files that a panoptic JSON names, and of the PNGs' pixels against the JSON."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ...errors import UserError
from ..io import (
    Extent,
    IntArray,
    missing_file,
    png_format_fault,
    read_image_size,
    read_segment_map,
    segment_extents,
)
from .annotations import check_panoptic_json
from .problems import Problem, Record, image_name, records, segment_number, segments_of

BBOX_TOLERANCE = 1  # pixels: tools disagree on whether a box includes the last pixel

Size = tuple[int, int]  # height, width


def check_panoptic_content(
    content: Record,
    image_root: str | Path,
    panoptic_root: str | Path,
    *,
    max_images: int | None = None,
    decode_images: bool = True,
) -> list[Problem]:
    """Check a whole data set: the JSON, the images and the panoptic PNGs.

    Args:
        content: the content of the panoptic JSON, as `read_coco_json` returns it.
        image_root: folder of the images named by ``images[].file_name``.
        panoptic_root: folder of the PNGs named by ``annotations[].file_name``.
        max_images: open only the files of that many annotations; None opens all. The whole JSON
            is checked in any case.
        decode_images: decode every pixel of the images, which finds truncated files. False reads
            only their headers, which is several times faster.

    Raises:
        UserError: a folder does not exist.
    """
    for name, root in (("image", image_root), ("panoptic", panoptic_root)):
        if not Path(root).is_dir():
            raise UserError(f"{name} folder not found: {root}")
    files = _check_files(content, Path(image_root), Path(panoptic_root), max_images, decode_images)
    return list(chain(check_panoptic_json(content), files))


def _check_files(
    content: Record, image_root: Path, panoptic_root: Path, max_images: int | None, decode: bool
) -> Iterator[Problem]:
    images = {repr(image.get("id")): image for image in records(content, "images")}
    annotations = records(content, "annotations")[:max_images]
    for annotation in tqdm(annotations, desc="checking files", disable=None):
        image = images.get(repr(annotation.get("image_id")), {})
        size = (image["height"], image["width"]) if {"height", "width"} <= image.keys() else None
        if "file_name" in image:
            path = image_root / str(image["file_name"])
            yield from check_image_file(path, size, image_name(image), decode=decode)
        if "file_name" in annotation:
            path = panoptic_root / str(annotation["file_name"])
            yield from check_panoptic_file(annotation, size, path)


def check_image_file(
    path: Path, size: Size | None, image: str, *, decode: bool = True
) -> Iterator[Problem]:
    """Check that an image exists, can be read and has the size in the JSON (None: not stated)."""
    if not path.is_file():
        yield Problem("missing image file", missing_file(path, "image"), image)
        return
    try:
        found = read_image_size(path, decode=decode)
    except UserError as error:
        yield Problem("unreadable image file", str(error), image)
        return
    yield from check_image_size(path, found, size, image)


def check_panoptic_file(annotation: Record, size: Size | None, path: Path) -> Iterator[Problem]:
    """Check that a PNG exists, can be read, has size and format, and agrees with the JSON."""
    image = image_name(annotation)
    if not path.is_file():
        yield Problem("missing panoptic PNG", missing_file(path, "panoptic PNG"), image)
        return
    fault = png_format_fault(path)
    try:
        segment_map = read_segment_map(path)
    except UserError as error:
        # The reader refuses what is not a PNG of RGB or RGBA with this very sentence.
        kind = "wrong PNG format" if str(error) == fault else "unreadable panoptic PNG"
        yield Problem(kind, str(error), image)
        return
    height, width = segment_map.shape
    yield from check_png_size(path, (height, width), size, image)
    if fault is not None:
        yield Problem("wrong PNG format", fault, image, tolerated=True)
    elif isinstance(annotation.get("segments_info"), list):
        yield from check_pixels(annotation, segment_map)


def check_image_size(
    path: str | Path, found: Size, stated: Size | None, image: str | None = None
) -> Iterator[Problem]:
    """Compare the size of an image, rotated according to its EXIF data, with the JSON."""
    if stated is not None and found != stated:
        message = f"image {path} is {_format(found)}, but in the JSON {_format(stated)}"
        yield Problem("wrong image size", message, image)


def check_png_size(
    path: str | Path, found: Size, size: Size | None, image: str | None = None
) -> Iterator[Problem]:
    """Compare the size of a panoptic PNG with that of its image (None: unknown)."""
    if size is not None and found != size:
        message = f"panoptic PNG {path} is {_format(found)}, but its image is {_format(size)}"
        yield Problem("wrong panoptic PNG size", message, image)


def _format(size: Size) -> str:
    height, width = size
    return f"{width}x{height}"


# ---------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------


def check_pixels(annotation: Record, segment_map: IntArray) -> Iterator[Problem]:
    """Compare ``segments_info`` with the (H, W) segment map of the PNG."""
    image = image_name(annotation)
    ids = [segment_number(segment) for segment in segments_of(annotation)]
    problems = list(check_segment_ids(segment_map, ids, image))
    yield from problems
    if any(problem.kind == _SWAPPED for problem in problems):
        return  # every other check would fail as well
    extents = segment_extents(segment_map)
    for segment, segment_id in zip(segments_of(annotation), ids, strict=True):
        if segment_id in extents:
            extent = extents[segment_id]
            yield from check_area(segment_id, segment.get("area"), extent.area, image)
            yield from check_bbox(segment, extent, image)


_SWAPPED = "PNG red and blue swapped"


def check_segment_ids(
    segment_map: IntArray, ids: Sequence[int | None], image: str
) -> Iterator[Problem]:
    """Check that the ids with pixels are the listed ones.

    Args:
        segment_map: (H, W) integers; 0 is void.
        ids: the ids in ``segments_info``; None is ignored.
        image: names the image or the PNG.
    """
    extents = segment_extents(segment_map)
    listed = set(ids) - {None}
    if listed and listed.isdisjoint(extents):
        red, green, blue = segment_map & 255, segment_map >> 8 & 255, segment_map >> 16
        if listed & segment_extents(blue | green << 8 | red << 16).keys():
            yield Problem(_SWAPPED, "the ids match if red and blue change places", image)
            return
    for unlisted in sorted(extents.keys() - listed):
        message = f"not listed in segments_info (pixels: {extents[unlisted].area})"
        yield Problem("PNG id not in JSON", message, image, unlisted)
    for segment_id in ids:
        if segment_id is not None and segment_id not in extents:
            yield segment_without_pixels(segment_id, image)


def segment_without_pixels(segment_id: int, image: str) -> Problem:
    """Return the problem of a listed id that no pixel has."""
    message = "listed in segments_info, but no pixel has this id"
    return Problem("JSON id not in PNG", message, image, segment_id)


def check_area(segment_id: int, stated: object, pixels: int, image: str) -> Iterator[Problem]:
    """Check that the stated area is the number of pixels."""
    if stated != pixels:
        message = f"area is {stated!r}, but the PNG has {pixels} pixels; panopticapi divides by the"
        message += " stated area, and a wrong one gives a wrong IoU, even above 1"
        yield Problem("wrong area", message, image, segment_id)


def check_bbox(segment: Record, extent: Extent, image: str) -> Iterator[Problem]:
    """Check that the stated box is the tight one, to within `BBOX_TOLERANCE`."""
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
        yield Problem("wrong bbox", message, image, segment["id"])
