"""Checks of the JSON alone: categories, images, annotations, segments."""

from collections import Counter, defaultdict
from collections.abc import Iterator

from .problems import (
    LARGEST_SEGMENT_ID,
    Problem,
    Record,
    image_name,
    is_integer,
    records,
    segment_number,
    segments_of,
)


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
