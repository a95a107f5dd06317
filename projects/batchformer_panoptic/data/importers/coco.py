"""Readers of COCO's JSON files: instances, Roboflow's export, and panoptic with its PNGs."""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from ...errors import UserError
from ..io import read_coco_json
from ..segment_maps import read_segment_map, segment_extents
from ..validation import (
    SECTIONS,
    check_lists,
    check_panoptic_json,
    check_segment_ids,
    raise_first_error,
    records,
    segments_of,
)
from .source import (
    Category,
    ImageIndex,
    Rle,
    Sample,
    Segment,
    Size,
    Source,
    check_mask_size,
    encode,
    polygon,
    split_of,
    union,
)

Record = dict[str, Any]

ROBOFLOW_NAME = "_annotations.coco.json"


def is_instances(content: Any) -> bool:
    """Return whether parsed JSON has COCO's lists, and masks or boxes in its annotations."""
    return _has_sections(content) and any(
        {"segmentation", "bbox"} & annotation.keys()
        for annotation in records(content, "annotations")
    )


def is_panoptic(content: Any) -> bool:
    """Return whether parsed JSON has COCO's lists, and ``segments_info`` in its annotations."""
    return _has_sections(content) and any(
        "segments_info" in annotation for annotation in records(content, "annotations")
    )


def _has_sections(content: Any) -> bool:
    return isinstance(content, dict) and set(SECTIONS) <= content.keys()


# ---------------------------------------------------------------------------
# Instances
# ---------------------------------------------------------------------------


def read_coco(files: list[Path], index: ImageIndex) -> Source:
    """Read COCO instances: polygons, run lengths, crowds."""
    contents = {path: read_coco_json(path) for path in files}
    return _read_instances(contents, index)


def read_roboflow(files: list[Path], index: ImageIndex) -> Source:
    """Read Roboflow's COCO export, in which the first category only groups the others."""
    contents = {path: read_coco_json(path) for path in files}
    annotations = (
        item for content in contents.values() for item in records(content, "annotations")
    )
    used = {annotation.get("category_id") for annotation in annotations}
    for path, content in contents.items():
        categories = records(content, "categories")
        parents = {category.get("supercategory") for category in categories}
        classes = [
            category
            for category in categories
            if category["id"] in used
            or category["name"] not in parents
            or category["supercategory"] != "none"
        ]
        contents[path] = {**content, "categories": classes}
    return _read_instances(contents, index)


def _read_instances(contents: dict[Path, Record], index: ImageIndex) -> Source:
    source = Source(_categories(contents), [])
    names = {category["id"]: category["name"] for category in source.categories}
    for path, content in contents.items():
        annotations = defaultdict(list)
        for annotation in records(content, "annotations"):
            if annotation["category_id"] not in names:
                raise UserError(
                    f"{path}: annotation {annotation.get('id')!r}: category_id "
                    f"{annotation['category_id']!r} is not among the categories"
                )
            annotations[annotation["image_id"]].append(annotation)
        for image in records(content, "images"):
            size = (image["height"], image["width"])
            read = partial(_instances, annotations.pop(image["id"], []), names)
            source.samples.extend(_sample(path, image, size, read, index))
        if annotations:
            raise UserError(f"{path}: image_id {next(iter(annotations))!r} is not among the images")
    return source


def _sample(path: Path, image: Record, size: Size, read: Any, index: ImageIndex) -> list[Sample]:
    """Return the sample of an image record; [] if its file was not found."""
    split = split_of(path.stem) or split_of(path.parent.name)
    name = image["file_name"]
    # The panoptic JSON of Cityscapes' own script names images that do not exist.
    names = (name, name.replace("_gtFine_leftImg8bit", "_leftImg8bit"))
    found = index.find(*dict.fromkeys(names), near=path.parent, split=split)
    return [] if found is None else [Sample(found, read, split, size)]


def _categories(contents: dict[Path, Record]) -> list[Category]:
    """Return the categories of several JSON files, which must be the same in all of them."""
    kept: list[Category] = []
    for path, content in contents.items():
        raise_first_error(check_lists(content, SECTIONS), str(path))
        found = [
            {
                "id": category["id"],
                "name": category["name"],
                "isthing": category.get("isthing", 1),
                **({"color": category["color"]} if isinstance(category.get("color"), list) else {}),
            }
            for category in records(content, "categories")
        ]
        if kept and found != kept:
            raise UserError(
                f"{path} has other categories than {next(iter(contents))}: convert them one by one"
            )
        kept = found
    return kept


def _instances(annotations: list[Record], names: dict[int, str], size: Size) -> list[Segment]:
    return [
        Segment(
            names[annotation["category_id"]],
            _mask(annotation, size),
            is_crowd=bool(annotation.get("iscrowd", 0)),
        )
        for annotation in annotations
    ]


def _mask(annotation: Record, size: Size) -> Rle:
    found = annotation.get("segmentation")
    label = f"annotation {annotation.get('id')!r}"
    if not found:
        raise UserError(
            f"{label} has a box and no mask: panoptic segmentation needs polygons or run lengths "
            "(DATASETS.CUSTOM_INSTANCES trains on boxes)"
        )
    if isinstance(found, list):
        return union([polygon(np.reshape(part, (-1, 2)), size) for part in found])
    if tuple(found["size"]) != size:
        raise UserError(f"{label}: run lengths of the size {found['size']}, image {list(size)}")
    rle: Rle = found if isinstance(found["counts"], str) else mask_utils.frPyObjects(found, *size)
    return rle


# ---------------------------------------------------------------------------
# Panoptic
# ---------------------------------------------------------------------------


def read_panoptic(files: list[Path], index: ImageIndex) -> Source:
    """Read COCO panoptic; the PNGs are in the folder named like the JSON, here or one level up.

    Raises:
        UserError: a file has an error, in the words of tools/check_dataset.py.
    """
    contents = {path: read_coco_json(path) for path in files}
    folders = {path: png_folder(path) for path in files}
    index.leave_out(*folders.values())
    source = Source(_categories(contents), [])
    names = {category["id"]: category["name"] for category in source.categories}
    for path, content in contents.items():
        raise_first_error(check_panoptic_json(content), str(path))
        images = {image["id"]: image for image in content["images"]}
        for annotation in content["annotations"]:
            image = images[annotation["image_id"]]
            png = folders[path] / annotation["file_name"]
            read = partial(_panoptic_segments, png, segments_of(annotation), names)
            size = (image["height"], image["width"])
            source.samples.extend(_sample(path, image, size, read, index))
    return source


def png_folder(path: Path) -> Path:
    """Return the folder of the PNGs of a panoptic JSON.

    Raises:
        UserError: there is none.
    """
    folders = [path.with_suffix(""), path.parent.parent / path.stem]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise UserError(f"{path}: no folder of PNGs, neither {folders[0]} nor {folders[1]}")


def _panoptic_segments(
    png: Path, segments: list[Record], names: dict[int, str], size: Size
) -> list[Segment]:
    segment_map = read_segment_map(png)
    check_mask_size(png, segment_map.shape, size)
    ids = [info["id"] for info in segments]
    raise_first_error(check_segment_ids(segment_extents(segment_map), ids, str(png)))
    return [
        Segment(
            names[info["category_id"]],
            encode(segment_map == info["id"]),
            is_crowd=bool(info.get("iscrowd", 0)),
        )
        for info in segments
    ]
