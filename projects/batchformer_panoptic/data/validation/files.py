"""Checks of the pictures and of the PNGs' pixels against the JSON."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from panopticapi.utils import rgb2id
from PIL import Image
from tqdm import tqdm

from .problems import Problem, Record, image_name, records, segment_number, segments_of

T = TypeVar("T")
BBOX_TOLERANCE = 1  # pixels: tools disagree about whether the last pixel counts
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_COLOR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
EXIF_ORIENTATION, EXIF_SIDEWAYS = 0x0112, (5, 6, 7, 8)


class Extent(NamedTuple):
    """What the PNG shows of a segment; ``bbox_xywh`` is tight, in pixels."""

    area: int
    bbox_xywh: tuple[int, int, int, int]


def check_files(
    content: Record,
    image_root: Path,
    panoptic_root: Path,
    max_images: int | None,
    decode_images: bool,
) -> Iterator[Problem]:
    """Open pictures and PNGs of the first ``max_images`` annotations (None: all)."""
    images = {str(image.get("id")): image for image in records(content, "images")}
    annotations = records(content, "annotations")[:max_images]
    for annotation in tqdm(annotations, desc="checking files", disable=None):
        image = images.get(str(annotation.get("image_id")), {})
        if "file_name" in image:
            yield from check_image_file(image, image_root / str(image["file_name"]), decode_images)
        if "file_name" in annotation:
            path = panoptic_root / str(annotation["file_name"])
            yield from check_panoptic_file(annotation, image, path)


def check_image_file(image: Record, path: Path, decode: bool) -> Iterator[Problem]:
    """One picture: there, readable, as large as the JSON says."""

    def size_hw(picture: Image.Image) -> tuple[int, int]:
        if decode:
            picture.load()
        exif = Image.Image.getexif(picture)  # that of a PNG would decode all of it
        sideways = exif.get(EXIF_ORIENTATION) in EXIF_SIDEWAYS
        return picture.size if sideways else (picture.height, picture.width)

    found = read_picture(path, "image file", image_name(image), size_hw)
    if isinstance(found, Problem):
        yield found
    else:
        yield from check_size("image size", found, image)


def check_panoptic_file(annotation: Record, image: Record, path: Path) -> Iterator[Problem]:
    """One PNG: there, readable, of the right size and format, and its pixels."""
    name = image_name(annotation)
    rgb = read_picture(path, "panoptic PNG", name, lambda picture: np.array(picture))
    if isinstance(rgb, Problem):
        yield rgb
        return
    yield from check_size("panoptic PNG size", (rgb.shape[0], rgb.shape[1]), image)
    fault = png_format_fault(path)
    if fault is not None:
        message = f"{path} is {fault}; segment ids need a PNG of 8 bit RGB"
        yield Problem("wrong PNG format", message, name)
    elif isinstance(annotation.get("segments_info"), list):
        yield from check_pixels(annotation, rgb)


def read_picture(path: Path, what: str, name: str, read: Callable[[Image.Image], T]) -> T | Problem:
    """Apply ``read`` to the opened file; a file that is missing or broken gives a problem."""
    if not path.is_file():
        others = (path.with_suffix(suffix) for suffix in (".jpg", ".jpeg", ".png"))
        hint = next((f"; {other.name} is there" for other in others if other.is_file()), "")
        return Problem(f"missing {what}", f"{path} not found{hint}", name)
    try:
        with Image.open(path) as picture:
            return read(picture)
    except UNREADABLE as error:
        return Problem(f"unreadable {what}", f"{path}: {error}", name)


def check_size(kind: str, size_hw: tuple[int, int], image: Record) -> Iterator[Problem]:
    """Compare with the JSON; pictures count as Detectron2 loads them, turned as EXIF says."""
    if "height" in image and "width" in image and size_hw != (image["height"], image["width"]):
        height, width = size_hw
        message = f"file is {width}x{height}, the JSON says {image['width']}x{image['height']}"
        yield Problem(f"wrong {kind}", message, image_name(image))


def png_format_fault(path: Path) -> str | None:
    """What a file is instead of a PNG of 8 bit RGB, by its header; None when it is one.

    Pillow shows 16 bit RGB as 8 bit, so that its ``mode`` does not tell.
    """
    with path.open("rb") as file:
        header = file.read(26)
    if not header.startswith(PNG_SIGNATURE):
        return "no PNG"
    depth, color_type = header[24], header[25]
    if (depth, color_type) == (8, 2):
        return None
    return f"{depth} bit {PNG_COLOR_TYPES.get(color_type, color_type)}"


def check_pixels(annotation: Record, rgb: np.ndarray) -> Iterator[Problem]:
    """Compare ``segments_info`` with the PNG's (H, W, 3) uint8 pixels."""
    name = image_name(annotation)
    extents = segment_extents(rgb2id(rgb))
    listed = {segment_number(segment) for segment in segments_of(annotation)}
    if (
        listed
        and listed.isdisjoint(extents)
        and listed & set(segment_extents(rgb2id(rgb[..., ::-1])))
    ):
        yield Problem("PNG red and blue swapped", "ids match once R and B change places", name)
        return
    for unlisted in sorted(extents.keys() - listed):
        message = f"{extents[unlisted].area} pixels of an id that segments_info does not list"
        yield Problem("PNG id not in JSON", message, name, unlisted)
    for segment in segments_of(annotation):
        segment_id = segment_number(segment)
        if segment_id is None:
            continue
        if segment_id not in extents:
            message = f"segments_info lists id {segment_id}, which no pixel has"
            yield Problem("JSON id not in PNG", message, name, segment_id)
        else:
            yield from check_area(segment, extents[segment_id].area, name)
            yield from check_bbox(segment, extents[segment_id].bbox_xywh, name)


def segment_extents(id_map: np.ndarray) -> dict[int, Extent]:
    """Area and box of every segment of an (H, W) integer id map, void (0) left out.

    Works on horizontal runs of equal ids, which are far fewer than pixels.
    """
    height, width = id_map.shape
    starts_run = np.ones((height, width), bool)
    starts_run[:, 1:] = id_map[:, 1:] != id_map[:, :-1]
    starts = np.flatnonzero(starts_run)
    lengths = np.diff(starts, append=height * width)
    ids, which = np.unique(id_map.ravel()[starts], return_inverse=True)
    top, left = np.full(len(ids), height), np.full(len(ids), width)
    bottom, right = np.zeros(len(ids), int), np.zeros(len(ids), int)
    rows, columns = np.divmod(starts, width)
    np.minimum.at(top, which, rows)
    np.maximum.at(bottom, which, rows + 1)
    np.minimum.at(left, which, columns)
    np.maximum.at(right, which, columns + lengths)
    areas = np.bincount(which, weights=lengths).astype(int)
    boxes = np.stack([left, top, right - left, bottom - top], axis=1)
    found = zip(ids.tolist(), areas.tolist(), boxes.tolist(), strict=True)
    return {key: Extent(area, tuple(box)) for key, area, box in found if key != 0}


def check_area(segment: Record, pixels: int, image: str) -> Iterator[Problem]:
    """The stated area is the number of pixels."""
    if segment.get("area") != pixels:
        message = f"area is {segment.get('area')!r}, the PNG has {pixels} pixels; evaluation trusts"
        message += " the JSON, and a wrong area gives an IoU that is wrong, even above 1"
        yield Problem("wrong area", message, image, segment["id"])


def check_bbox(
    segment: Record, bbox_xywh: tuple[int, int, int, int], image: str
) -> Iterator[Problem]:
    """The stated box is the tight one, to within :data:`BBOX_TOLERANCE`."""
    found = segment.get("bbox")
    if found is None:
        yield Problem("no bbox", "segment without 'bbox'", image, segment["id"], "warning")
        return
    is_box = isinstance(found, list) and len(found) == 4
    try:
        offset = np.abs(np.array(found, float) - bbox_xywh).max() if is_box else np.inf
    except (TypeError, ValueError):
        offset = np.inf
    if not offset <= BBOX_TOLERANCE:
        message = f"bbox is {found!r}, the PNG says {list(bbox_xywh)} (x, y, width, height)"
        yield Problem("wrong bbox", message, image, segment["id"])
