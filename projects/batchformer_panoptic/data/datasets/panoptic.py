"""COCO-panoptic data sets: one JSON file, one folder of images, one folder of PNGs."""

import copy
import functools
import logging
import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..class_table import ClassTable
from ..io import read_coco_json
from ..validation import (
    SECTIONS,
    check_categories,
    check_entries,
    check_lists,
    check_panoptic_json,
    raise_first_error,
)
from .catalog import check_first_file, is_registered, resolve_path

logger = logging.getLogger(__name__)

DatasetDict = dict[str, Any]


def register_panoptic_dataset(
    name: str, image_root: str, panoptic_root: str, panoptic_json: str
) -> None:
    """Register a COCO-panoptic data set in Detectron2's catalogs.

    Only the JSON's "categories" are checked now; the annotations are checked when the data set is
    used. Registering a name again with the same paths does nothing.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        image_root: folder of the images.
        panoptic_root: folder of the PNGs.
        panoptic_json: the annotations. All paths may contain ``~`` and environment variables and
            are relative to the working directory.

    Raises:
        UserError: a path does not exist, the categories are not usable, or the name is taken.
    """
    paths = {
        "image_root": resolve_path(image_root),
        "panoptic_root": resolve_path(panoptic_root),
        "panoptic_json": resolve_path(panoptic_json),
    }
    if is_registered(name, paths, "coco_panoptic_seg"):
        return
    content = read_coco_json(paths["panoptic_json"])
    for check in (
        check_lists(content, SECTIONS),
        check_entries(content, "categories"),
        check_categories(content),
    ):
        raise_first_error(check, paths["panoptic_json"])
    table = ClassTable.from_categories(content["categories"])
    DatasetCatalog.register(name, functools.partial(load_panoptic_json, **paths))
    MetadataCatalog.get(name).set(**paths, **panoptic_metadata(table))


def panoptic_metadata(table: ClassTable) -> dict[str, Any]:
    """Return metadata in the form of Detectron2's ``coco_2017_*_panoptic``, for any classes.

    Things and stuff both list all classes, so that one id space serves Detectron2's visualizer
    and evaluator.
    """
    names = list(table.names)
    colors = [list(color) for color in table.colors]
    contiguous_ids = table.contiguous_ids
    things = set(table.thing_class_ids)
    return {
        "thing_classes": names,
        "stuff_classes": names,
        "thing_colors": colors,
        "stuff_colors": colors,
        "thing_dataset_id_to_contiguous_id": {
            dataset_id: class_id
            for dataset_id, class_id in contiguous_ids.items()
            if class_id in things
        },
        "stuff_dataset_id_to_contiguous_id": contiguous_ids,
        "evaluator_type": "coco_panoptic_seg",
        "ignore_label": 255,
        "label_divisor": 1000,
    }


def load_panoptic_json(
    panoptic_json: str, image_root: str, panoptic_root: str
) -> list[DatasetDict]:
    """Read COCO-panoptic JSON into Detectron2's dataset dicts, one per annotation record.

    Returns:
        Dicts with file_name, image_id, height, width (if the JSON has them), pan_seg_file_name and
        segments_info: dicts with id (the PNG's), category_id (contiguous), isthing (bool),
        iscrowd (0 or 1) and, as in the JSON, area and bbox.

    Raises:
        UserError: the first error in the JSON, in the words of `check_panoptic_json`, or the first
            image or PNG if it does not exist.
    """
    content = read_coco_json(panoptic_json)
    raise_first_error(check_panoptic_json(content), panoptic_json)
    table = ClassTable.from_categories(content["categories"])
    contiguous_ids = table.contiguous_ids
    images = {image["id"]: image for image in content["images"]}
    dataset_dicts = []
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        dataset_dicts.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "image_id": annotation["image_id"],
                **{key: image[key] for key in ("height", "width") if key in image},
                "pan_seg_file_name": os.path.join(panoptic_root, annotation["file_name"]),
                "segments_info": [
                    _segment_info(segment, contiguous_ids[segment["category_id"]], table)
                    for segment in annotation["segments_info"]
                ],
            }
        )
    for key, role, root in (
        ("file_name", "image", image_root),
        ("pan_seg_file_name", "panoptic PNG", panoptic_root),
    ):
        check_first_file(dataset_dicts[0][key], role, root, panoptic_json)
    if len(images) > len(dataset_dicts):
        logger.warning(
            "%s: %d of %d images have no annotation record and are not used",
            panoptic_json,
            len(images) - len(dataset_dicts),
            len(images),
        )
    return dataset_dicts


def _segment_info(segment: DatasetDict, class_id: int, table: ClassTable) -> DatasetDict:
    # New objects throughout: the JSON's content is shared with other readers.
    copied: DatasetDict = {}
    if "area" in segment:
        copied["area"] = segment["area"]
    if "bbox" in segment:
        copied["bbox"] = copy.copy(segment["bbox"])
    return {
        **copied,
        "id": segment["id"],
        "category_id": class_id,
        "isthing": table.is_thing[class_id],
        "iscrowd": int(segment.get("iscrowd", 0)),
    }
