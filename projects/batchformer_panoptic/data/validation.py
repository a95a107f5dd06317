"""Find what is wrong with a data set in COCO's panoptic layout, and say it in plain words.

Every check is one small generator of :class:`Problem`. Nothing here raises for bad *content*: a
broken record becomes a problem and the rest is still checked.
"""

import json
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np
from panopticapi.utils import rgb2id
from PIL import Image
from tqdm import tqdm

from batchformer_panoptic.errors import UserError

Record = dict[str, Any]
T = TypeVar("T")
BBOX_TOLERANCE = 1  # pixels: tools disagree about whether the last pixel counts
LARGEST_SEGMENT_ID = 256**3 - 1
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_COLOR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
EXIF_ORIENTATION, EXIF_SIDEWAYS = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: short name shared by all problems of the same sort, e.g. ``"wrong area"``.
        message: what is wrong, with the offending value, and what to do where that is not plain.
        image: file name (or id, where there is no name) of the image, or None for the whole set.
        segment: segment id, or None.
        severity: ``"error"`` (training or evaluation fails or gives wrong numbers), ``"warning"``
            (works, but is seldom meant) or ``"note"``.
    """

    kind: str
    message: str
    image: str | None = None
    segment: int | None = None
    severity: str = "error"


class Extent(NamedTuple):
    """What the PNG shows of a segment; ``bbox_xywh`` is tight, in pixels."""

    area: int
    bbox_xywh: tuple[int, int, int, int]


def check_panoptic_dataset(
    panoptic_json: str | Path,
    image_root: str | Path,
    panoptic_root: str | Path,
    *,
    max_images: int | None = None,
    decode_images: bool = True,
) -> list[Problem]:
    """Check a JSON file together with its picture and segment folders.

    Args:
        panoptic_json: annotation file in COCO's panoptic format.
        image_root: folder of the pictures named by ``images[].file_name``.
        panoptic_root: folder of the PNGs named by ``annotations[].file_name``.
        max_images: open the files of that many annotations only; None opens all. The JSON itself
            is always checked whole.
        decode_images: read the pictures to their last pixel, which finds truncated files. False
            reads their headers only, several times as fast.

    Raises:
        UserError: the JSON or a folder is missing, or the file is no JSON object.
    """
    content = load_panoptic_json(panoptic_json)
    return check_panoptic_content(
        content, image_root, panoptic_root, max_images=max_images, decode_images=decode_images
    )


def load_panoptic_json(path: str | Path) -> Record:
    """Read a panoptic JSON file.

    Raises:
        UserError: it is missing or is no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read panoptic JSON {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not COCO's JSON object")
    return content


def check_panoptic_content(
    content: Record,
    image_root: str | Path,
    panoptic_root: str | Path,
    *,
    max_images: int | None = None,
    decode_images: bool = True,
) -> list[Problem]:
    """As :func:`check_panoptic_dataset`, for JSON content that is loaded already."""
    for name, root in (("image", image_root), ("panoptic", panoptic_root)):
        if not Path(root).is_dir():
            raise UserError(f"{name} folder not found: {root}")
    problems = list(check_sections(content))
    for check in (check_categories, check_images, check_annotations):
        problems.extend(check(content))
    problems.extend(
        check_files(content, Path(image_root), Path(panoptic_root), max_images, decode_images)
    )
    return problems


def records(content: Record, section: str) -> list[Record]:
    """The records of a section that are JSON objects; [] when the section is unusable."""
    found = content.get(section)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def segments_of(annotation: Record) -> list[Record]:
    """The usable records of ``segments_info``."""
    return records(annotation, "segments_info")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a whole number (``true`` and ``1.0`` are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_sections(content: Record) -> Iterator[Problem]:
    """The three lists of the JSON: there, not empty, made of objects."""
    for section in ("images", "annotations", "categories"):
        found = content.get(section)
        if not isinstance(found, list):
            yield Problem("missing section", f"the JSON has no list '{section}'")
        elif not found:
            yield Problem("missing section", f"the list '{section}' is empty")
        elif len(records(content, section)) < len(found):
            yield Problem("bad record", f"'{section}' holds entries that are not JSON objects")


# ---- categories --------------------------------------------------------------------------------


def check_categories(content: Record) -> Iterator[Problem]:
    """Ids and names of the classes, and the split into things and stuff."""
    categories = records(content, "categories")
    for category in categories:
        yield from check_category(category)
    for field in ("id", "name"):
        counts = Counter(str(category[field]) for category in categories if field in category)
        for value, count in counts.items():
            if count > 1:
                severity = "error" if field == "id" else "warning"
                message = f"{count} categories have {field} {value}"
                yield Problem(f"duplicate category {field}", message, severity=severity)
    is_thing = [category.get("isthing") for category in categories]
    if is_thing and all(value == 1 for value in is_thing):
        yield Problem("no stuff", "every category is a thing; PQ of stuff is n/a", severity="note")
    if is_thing and all(value == 0 for value in is_thing):
        yield Problem("no things", "every category is stuff; PQ of things is n/a", severity="note")


def check_category(category: Record) -> Iterator[Problem]:
    """The fields of one class."""
    label = f"category {category.get('id', category)}"
    if not is_integer(category.get("id")):
        yield Problem("category without id", f"{label} has no whole number 'id'")
    if not isinstance(category.get("name"), str) or not category["name"]:
        yield Problem("category without name", f"{label} has no 'name'")
    if category.get("isthing") not in (0, 1):
        message = f"{label}: 'isthing' is {category.get('isthing')!r}; write 1 (thing) or 0 (stuff)"
        yield Problem("category without isthing", message)
    color = category.get("color", [0, 0, 0])
    in_range = isinstance(color, list) and all(is_integer(c) and 0 <= c <= 255 for c in color)
    if not in_range or len(color) != 3:
        yield Problem("bad category color", f"{label}: color {color!r} is not [R, G, B] in 0..255")


# ---- records of images and annotations ---------------------------------------------------------


def check_images(content: Record) -> Iterator[Problem]:
    """Fields and ids of the image records."""
    images = records(content, "images")
    annotated = {str(annotation.get("image_id")) for annotation in records(content, "annotations")}
    for image in images:
        missing = [key for key in ("id", "file_name", "height", "width") if key not in image]
        if missing:
            message = f"image record without {', '.join(missing)}"
            yield Problem("bad image record", message, image_name(image))
        elif str(image["id"]) not in annotated:
            message = f"image id {image['id']} has no annotation and is left out"
            yield Problem("image without annotation", message, image_name(image), None, "warning")
    yield from check_unique("duplicate image id", "image records have id", images, "id")


def check_unique(kind: str, what: str, found: list[Record], key: str) -> Iterator[Problem]:
    """One problem for each value of ``key`` that several records share."""
    counts = Counter(str(record[key]) for record in found if key in record)
    for value, count in counts.items():
        if count > 1:
            yield Problem(kind, f"{count} {what} {value}", value)


def check_annotations(content: Record) -> Iterator[Problem]:
    """Fields and ids of the annotation records, and all their segments."""
    annotations = records(content, "annotations")
    images = {str(image.get("id")) for image in records(content, "images")}
    categories = {str(item.get("id")): item for item in records(content, "categories")}
    for annotation in annotations:
        name = image_name(annotation)
        missing = [key for key in ("image_id", "file_name") if key not in annotation]
        if missing:
            message = f"annotation record without {', '.join(missing)}"
            yield Problem("bad annotation record", message, name)
        elif str(annotation["image_id"]) not in images:
            message = f"image_id {annotation['image_id']} is not among the images"
            yield Problem("annotation without image", message, name)
        yield from check_segments(annotation, categories)
    what = "annotations have image_id"
    yield from check_unique("duplicate annotation", what, annotations, "image_id")


def check_segments(annotation: Record, categories: dict[str, Record]) -> Iterator[Problem]:
    """The records in ``segments_info`` of one annotation."""
    name = image_name(annotation)
    if not isinstance(annotation.get("segments_info"), list):
        yield Problem("no segments_info", "annotation without a list 'segments_info'", name)
        return
    if not annotation["segments_info"]:
        yield Problem("empty segments_info", "no segment: all void", name, None, "warning")
    if len(segments_of(annotation)) < len(annotation["segments_info"]):
        yield Problem("bad record", "segments_info holds entries that are not JSON objects", name)
    for segment in segments_of(annotation):
        for check in (check_segment_id, check_iscrowd):
            yield from check(segment, name)
        yield from check_category_id(segment, name, categories)
    yield from check_duplicate_segments(annotation)
    yield from check_split_stuff(annotation, categories)


def check_segment_id(segment: Record, image: str) -> Iterator[Problem]:
    """The id fits into three bytes and is not that of void."""
    if segment_number(segment) is None:
        found = segment.get("id")
        message = f"segment id {found!r} is not in 1..{LARGEST_SEGMENT_ID} (0 means void)"
        yield Problem("bad segment id", message, image)


def check_iscrowd(segment: Record, image: str) -> Iterator[Problem]:
    """The crowd flag is 0 or 1; panopticapi reads it from every segment."""
    if segment.get("iscrowd") not in (0, 1):
        message = f"iscrowd is {segment.get('iscrowd')!r}; write 0 or 1"
        yield Problem("bad iscrowd", message, image, segment_number(segment))


def check_category_id(
    segment: Record, image: str, categories: dict[str, Record]
) -> Iterator[Problem]:
    """The class of a segment exists."""
    category_id = segment.get("category_id")
    if not is_integer(category_id) or str(category_id) not in categories:
        message = f"category_id {category_id!r} is not among the categories"
        yield Problem("unknown category_id", message, image, segment_number(segment))


def check_duplicate_segments(annotation: Record) -> Iterator[Problem]:
    """No segment id occurs twice in an image."""
    counts = Counter(segment_number(segment) for segment in segments_of(annotation))
    for segment_id, count in counts.items():
        if segment_id is not None and count > 1:
            message = f"{count} entries of segments_info have id {segment_id}"
            yield Problem("duplicate segment id", message, image_name(annotation), segment_id)


def check_split_stuff(annotation: Record, categories: dict[str, Record]) -> Iterator[Problem]:
    """A stuff class is one segment per image."""
    ids: dict[str, list[int | None]] = defaultdict(list)
    for segment in segments_of(annotation):
        ids[str(segment.get("category_id"))].append(segment_number(segment))
    for category_id, found in ids.items():
        is_stuff = categories.get(category_id, {}).get("isthing") == 0
        if is_stuff and len(set(found)) > 1:
            message = f"stuff category {category_id} is split into {len(found)} segments; COCO has"
            message += " one per image, and a prediction can match only one"
            kind = "stuff in several segments"
            yield Problem(kind, message, image_name(annotation), found[0], "warning")


def image_name(record: Record) -> str:
    """What to call an image or annotation record in a message."""
    return str(record.get("file_name", record.get("image_id", record.get("id", "?"))))


def segment_number(segment: Record) -> int | None:
    """The segment's id where it is a possible one, else None."""
    found = segment.get("id")
    return found if is_integer(found) and 0 < found <= LARGEST_SEGMENT_ID else None


# ---- picture and segment files -----------------------------------------------------------------


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
