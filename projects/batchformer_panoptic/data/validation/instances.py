"""Checks of COCO-instances JSON, of which boxes are read."""

from collections.abc import Container, Iterator, Sequence
from typing import Any

from .annotations import (
    SECTIONS,
    bad_size,
    check_categories,
    check_entries,
    check_image_ids,
    check_lists,
    check_unique,
)
from .problems import (
    Problem,
    Record,
    check_crowd,
    check_stated_area,
    image_name,
    is_integer,
    is_number,
    is_size,
    records,
    text_hint,
)


def check_instances_json(content: Record) -> Iterator[Problem]:
    """Check the whole JSON, without the images that it names."""
    yield from check_lists(content, SECTIONS)
    yield from check_box_categories(content)
    yield from check_entries(content, "images")
    yield from check_boxes(content)
    yield from _check_unused(content)


def check_box_categories(content: Record) -> Iterator[Problem]:
    """Check the classes; this format does not distinguish things from stuff."""
    yield from check_entries(content, "categories")
    categories = [{**category, "isthing": 1} for category in records(content, "categories")]
    for problem in check_categories({"categories": categories}):
        if problem.severity == "error":
            yield problem


def check_boxes(content: Record) -> Iterator[Problem]:
    """Check the records of images and annotations; a set without annotations may lack the list."""
    images, annotations = records(content, "images"), records(content, "annotations")
    for section in ("images", "annotations"):
        found = content.get(section)
        for number, record in enumerate(found if isinstance(found, list) else ()):
            if not isinstance(record, dict) or not _is_id(record.get("id")):
                message = f"entry {number} of the list '{section}' has no 'id'"
                yield Problem("record without id", message)
    for image in images:
        yield from _check_image(f"image {image.get('id')!r}", image)
    yield from check_image_ids(images)
    what = "annotations have the id"
    yield from check_unique("duplicate annotation id", what, annotations, "id")
    image_ids = {repr(image.get("id")) for image in images}
    category_ids = {repr(category.get("id")) for category in records(content, "categories")}
    for annotation in annotations:
        yield from _check_annotation(annotation, image_ids, category_ids)


def _is_id(value: object) -> bool:
    return is_integer(value) or isinstance(value, str)


def _check_image(where: str, image: Record) -> Iterator[Problem]:
    if not isinstance(image.get("file_name"), str):
        yield Problem("bad image record", f"{where} has no 'file_name'")
    for key in ("height", "width"):
        if not is_size(image.get(key)):
            yield bad_size(image, key)


def _check_annotation(
    annotation: Record, image_ids: Container[str], category_ids: Container[str]
) -> Iterator[Problem]:
    where = f"annotation {annotation.get('id')!r}"
    for key, known, what in (
        ("image_id", image_ids, "images"),
        ("category_id", category_ids, "categories"),
    ):
        found = annotation.get(key)
        if repr(found) not in known:
            message = f"{where}: {key} {found!r} is not among the {what}{text_hint(found)}"
            yield Problem(f"unknown {key}", message)
    if not _is_box(annotation.get("bbox")):
        message = f"{where}: bbox is {annotation.get('bbox')!r}; give [x, y, width, height] in"
        yield Problem("wrong bbox", f"{message} pixels")
    for kind, fault in (
        ("bad iscrowd", check_crowd(annotation)),
        ("bad area", check_stated_area(annotation)),
    ):
        if fault:
            yield Problem(kind, f"{where}: {fault}")

    if annotation.get("ignore"):
        message = (
            f"{where}: ignore is {annotation['ignore']!r}, which COCO's evaluation overlooks; "
        )
        yield Problem("ignored annotation", message + "write iscrowd 1, or remove the annotation")


def _check_unused(content: Record) -> Iterator[Problem]:
    """Check boxes that training leaves out and evaluation counts, and masks that are not drawn."""
    sizes = {repr(image.get("id")): image for image in records(content, "images")}
    annotations = records(content, "annotations")
    if all(annotation.get("iscrowd", 0) == 1 for annotation in annotations):
        what = "every box is a crowd" if annotations else "there are no boxes"
        message = f"{what}, so training has no targets and AP is n/a"
        yield Problem("no targets", message, severity="warning")
    for annotation in annotations:
        where = f"annotation {annotation.get('id')!r}"
        image = sizes.get(repr(annotation.get("image_id")), {})
        box: Any = annotation.get("bbox")
        if _is_box(box) and not _has_pixels(box, image):
            message = f"{where}: bbox {box} covers nothing of the image: training leaves it out, "
            message += "and evaluation counts it as not found"
            yield Problem("box without pixels", message, image_name(image), severity="warning")
        if annotation.get("segmentation") and not usable_segmentation(annotation):
            message = f"{where}: its segmentation is neither a polygon of three points or more nor "
            message += "a run-length code; its box is used"
            yield Problem("bad segmentation", message, image_name(image), severity="warning")


def usable_segmentation(annotation: Record) -> list[list[float]] | Record | None:
    """Return the polygons of three points or more, or the run-length code, or None.

    Only drawings of the annotations use it.
    """
    found = annotation.get("segmentation")
    if isinstance(found, dict):
        size = found.get("size")
        is_code = isinstance(size, list) and len(size) == 2 and all(map(is_size, size))
        return found if is_code and isinstance(found.get("counts"), str | list) else None
    polygons = [item for item in found if _is_polygon(item)] if isinstance(found, list) else []
    return polygons or None


def _is_polygon(value: object) -> bool:
    if not isinstance(value, list) or len(value) < 6 or len(value) % 2:
        return False
    return set(map(type, value)) <= {int, float}


def _has_pixels(box: Sequence[float], image: Record) -> bool:
    left, top, width, height = box
    for start, length, key in ((left, width, "width"), (top, height, "height")):
        limit = image.get(key)
        end = min(start + length, limit) if is_size(limit) else start + length
        if end <= max(start, 0):
            return False
    return True


def _is_box(value: object) -> bool:
    if not isinstance(value, Sequence) or len(value) != 4:
        return False
    return all(map(is_number, value)) and value[2] >= 0 and value[3] >= 0
