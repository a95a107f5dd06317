"""Checks of COCO-instances JSON, of which boxes are read."""

from collections.abc import Container, Iterator, Sequence

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


def _is_box(value: object) -> bool:
    if not isinstance(value, Sequence) or len(value) != 4:
        return False
    return all(map(is_number, value)) and value[2] >= 0 and value[3] >= 0
