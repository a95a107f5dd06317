"""Checks of the JSON only: lists, categories, images, annotations, segments."""

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from .problems import (
    LARGEST_SEGMENT_ID,
    Problem,
    Record,
    check_crowd,
    check_stated_area,
    image_name,
    is_integer,
    is_size,
    records,
    segment_number,
    segments_of,
    text_hint,
)

SECTIONS = ("images", "annotations", "categories")


def check_panoptic_json(content: Record) -> Iterator[Problem]:
    """Check the whole JSON, without the files that it names."""
    yield from check_lists(content, SECTIONS)
    for section in SECTIONS:
        yield from check_entries(content, section)
    yield from check_categories(content)
    yield from check_images(content)
    yield from check_annotations(content)
    yield from check_targets(content)


# ---------------------------------------------------------------------------
# Lists and ids, as in all of COCO's formats
# ---------------------------------------------------------------------------


def check_lists(content: Record, sections: Sequence[str]) -> Iterator[Problem]:
    """Check that the lists of the JSON exist; they may be empty."""
    for section in sections:
        if not isinstance(content.get(section), list):
            yield Problem("missing section", f"the JSON has no list '{section}'")


def check_entries(content: Record, section: str) -> Iterator[Problem]:
    """Check that an existing list is not empty and holds only objects."""
    found = content.get(section)
    if found == []:
        yield Problem("missing section", f"the list '{section}' is empty")
    elif isinstance(found, list) and len(records(content, section)) < len(found):
        yield Problem("bad record", f"'{section}' holds entries that are not JSON objects")


def check_unique(kind: str, what: str, found: Iterable[Record], key: str) -> Iterator[Problem]:
    """Report each value of ``key`` that several records share."""
    # repr distinguishes 1 from "1" and makes malformed values, such as lists, hashable.
    counts = Counter(repr(record[key]) for record in found if key in record)
    for value, count in counts.items():
        if count > 1:
            yield Problem(kind, f"{count} {what} {value}")


# ---------------------------------------------------------------------------
# Categories
# ---------------------------------------------------------------------------


def check_categories(content: Record) -> Iterator[Problem]:
    """Check ids and names of the classes, and the split into things and stuff."""
    categories = records(content, "categories")
    for category in categories:
        yield from check_category(category)
    for field in ("id", "name"):
        kind = f"duplicate category {field}"
        yield from check_unique(kind, f"categories have the {field}", categories, field)
    is_thing = [category.get("isthing") for category in categories]
    if is_thing and all(value == 1 for value in is_thing):
        yield Problem("no stuff", "every category is a thing; PQ of stuff is n/a", severity="note")
    if is_thing and all(value == 0 for value in is_thing):
        yield Problem("no things", "every category is stuff; PQ of things is n/a", severity="note")


def check_category(category: Record) -> Iterator[Problem]:
    """Check the fields of one class."""
    label = f"category {category.get('id', category)}"
    if not is_integer(category.get("id")):
        hint = text_hint(category.get("id"))
        yield Problem("category without id", f"{label} has no integer 'id'{hint}")
    if not isinstance(category.get("name"), str) or not category["name"]:
        yield Problem("category without name", f"{label} has no 'name'")
    if category.get("isthing") not in (0, 1):
        message = f"{label}: 'isthing' is {category.get('isthing')!r}; write 1 (thing) or 0 (stuff)"
        yield Problem("category without isthing", message)
    yield from check_color(category.get("color"), label)


def check_color(color: object, label: str) -> Iterator[Problem]:
    """Check a color, which may be absent (None); ``label`` names its class."""
    if color is None:
        return
    in_range = isinstance(color, list | tuple) and all(
        is_integer(value) and 0 <= value <= 255 for value in color
    )
    if not in_range or len(color) != 3:  # type: ignore[arg-type]
        yield Problem("bad category color", f"{label}: color {color!r} is not [R, G, B] in 0..255")


# ---------------------------------------------------------------------------
# Images and annotations
# ---------------------------------------------------------------------------


def check_images(content: Record) -> Iterator[Problem]:
    """Check fields and ids of the image records."""
    images = records(content, "images")
    annotated = {repr(annotation.get("image_id")) for annotation in records(content, "annotations")}
    for image in images:
        unusable = [*_without_id(image, "id"), *_without_file_name(image)]
        if unusable:
            message = f"image record without {', '.join(unusable)}"
            yield Problem("bad image record", message, image_name(image))
        elif repr(image["id"]) not in annotated:
            message = f"image id {image['id']!r} has no annotation and is left out"
            yield Problem("image without annotation", message, image_name(image), None, "warning")
        for key in ("height", "width"):
            if key not in image:  # training takes the size from the file
                message = f"image record without {key}"
                yield Problem("image without size", message, image_name(image), None, "warning")
            elif not is_size(image[key]):
                yield bad_size(image, key)
    yield from check_image_ids(images)


def bad_size(image: Record, key: str) -> Problem:
    """Return the problem of a height or width that is not a number of pixels."""
    found = image.get(key)
    message = f"the image record has the {key} {found!r}{text_hint(found)}"
    return Problem("bad image size", message, image_name(image))


def check_image_ids(images: Sequence[Record]) -> Iterator[Problem]:
    """Check that ids are unique and of one type, and that no file has two."""
    yield from check_unique("duplicate image id", "image records have the id", images, "id")
    texts = sum(isinstance(image.get("id"), str) for image in images)
    if 0 < texts < len(images):
        message = f"image ids are texts ({texts}) and numbers ({len(images) - texts}); use one type"
        yield Problem("mixed image ids", message)
    for problem in check_unique("", "image records have the file_name", images, "file_name"):
        yield replace(problem, kind="one image under two ids", severity="warning")


def check_annotations(content: Record) -> Iterator[Problem]:
    """Check fields and ids of the annotation records, and all their segments.

    That images exist is checked only if the JSON has a list of them.
    """
    annotations = records(content, "annotations")
    images = {repr(image.get("id")) for image in records(content, "images")}
    categories = {repr(item.get("id")): item for item in records(content, "categories")}
    for annotation in annotations:
        name = image_name(annotation)
        missing = [*_without_id(annotation, "image_id"), *_without_file_name(annotation)]
        if missing:
            message = f"annotation record without {', '.join(missing)}"
            yield Problem("bad annotation record", message, name)
        elif "images" in content and repr(annotation["image_id"]) not in images:
            hint = text_hint(annotation["image_id"])
            message = f"image_id {annotation['image_id']!r} is not among the images{hint}"
            yield Problem("annotation without image", message, name)
        yield from check_segments(annotation, categories)
    what = "annotations have the image_id"
    yield from check_unique("duplicate annotation", what, annotations, "image_id")


def _without_id(record: Record, key: str) -> list[str]:
    return [] if is_integer(record.get(key)) or isinstance(record.get(key), str) else [key]


def _without_file_name(record: Record) -> list[str]:
    return [] if isinstance(record.get("file_name"), str) else ["file_name"]


# ---------------------------------------------------------------------------
# Segments
# ---------------------------------------------------------------------------


def check_segments(annotation: Record, categories: Mapping[str, Record]) -> Iterator[Problem]:
    """Check the records in ``segments_info`` of one annotation.

    Args:
        annotation: the annotation.
        categories: the categories by ``repr`` of their ids.
    """
    name = image_name(annotation)
    if not isinstance(annotation.get("segments_info"), list):
        message = "annotation without a list 'segments_info'; an image without segments has an"
        message += " empty one, and instances JSON has none"
        yield Problem("no segments_info", message, name)
        return
    if not annotation["segments_info"]:
        yield Problem("empty segments_info", "no segment: all void", name, None, "warning")
    segments = segments_of(annotation)
    if len(segments) < len(annotation["segments_info"]):
        yield Problem("bad record", "segments_info holds entries that are not JSON objects", name)
    for segment in segments:
        yield from check_segment(segment, name, categories)
    yield from check_repeated_ids(map(segment_number, segments), name)
    yield from _check_split_stuff(segments, name, categories)


def check_segment(segment: Record, image: str, categories: Container[str]) -> Iterator[Problem]:
    """Check id, crowd flag and class of one segment."""
    segment_id, found = segment_number(segment), segment.get("id")
    if segment_id is None:
        message = f"segment id {found!r} is not in 1..{LARGEST_SEGMENT_ID} (0 is void)"
        yield Problem("bad segment id", message + text_hint(found), image)
    if "iscrowd" not in segment:
        message = "segment without 'iscrowd', which panopticapi needs; it counts as 0"
        yield Problem("no iscrowd", message, image, segment_id, "warning")
    elif fault := check_crowd(segment):
        yield Problem("bad iscrowd", fault, image, segment_id)
    if "area" not in segment:
        message = "segment without 'area', which panopticapi needs"
        yield Problem("no area", message, image, segment_id, "warning")
    elif fault := check_stated_area(segment):
        yield Problem("bad area", fault, image, segment_id)
    elif segment["area"] % 1:
        message = f"area is {segment['area']!r}; the area of a segment is a whole number of pixels"
        yield Problem("bad area", message, image, segment_id)
    category_id = segment.get("category_id")
    if not is_integer(category_id) or repr(category_id) not in categories:
        hint = text_hint(category_id)
        message = f"category_id {category_id!r} is not among the categories{hint}"
        yield Problem("unknown category_id", message, image, segment_id)


def check_repeated_ids(ids: Iterable[int | None], image: str) -> Iterator[Problem]:
    """Check that no segment id occurs twice in an image; None is left out."""
    for segment_id, count in Counter(ids).items():
        if segment_id is not None and count > 1:
            message = f"{count} entries of segments_info have the id {segment_id}"
            yield Problem("duplicate segment id", message, image, segment_id)


def _check_split_stuff(
    segments: Sequence[Record], image: str, categories: Mapping[str, Record]
) -> Iterator[Problem]:
    """Check that a stuff class is one segment per image."""
    ids: dict[str, list[int | None]] = defaultdict(list)
    for segment in segments:
        ids[repr(segment.get("category_id"))].append(segment_number(segment))
    for category_id, found in ids.items():
        is_stuff = categories.get(category_id, {}).get("isthing") == 0
        if is_stuff and len(set(found)) > 1:
            message = f"stuff category {category_id} is split into {len(found)} segments; COCO has"
            message += " one per image, and a prediction can match only one"
            kind = "stuff in several segments"
            yield Problem(kind, message, image, found[0], "warning")


def check_targets(content: Record) -> Iterator[Problem]:
    """Check that there is something to learn: segments that are not crowds, of every class."""
    segments: Counter[str] = Counter()
    crowds: Counter[str] = Counter()
    for annotation in records(content, "annotations"):
        for segment in segments_of(annotation):
            key = repr(segment.get("category_id"))
            segments[key] += 1
            crowds[key] += segment.get("iscrowd") == 1
    if segments.total() == crowds.total():
        what = "every segment is a crowd" if segments else "there are no segments"
        message = f"{what}, so training has no targets and panoptic quality is n/a"
        yield Problem("no targets", message, severity="warning")
        return
    for category in records(content, "categories"):
        key = repr(category.get("id"))
        if 0 < segments[key] == crowds[key]:
            message = f"all {segments[key]} segments of category {key} are crowds, not targets"
            yield Problem("only crowds", message, severity="warning")
