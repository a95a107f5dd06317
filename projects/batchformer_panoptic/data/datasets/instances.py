"""COCO-instances data sets: a JSON file of boxes (optionally with masks) and a folder of images."""

import functools
import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..class_table import ClassTable
from ..io import read_coco_json
from ..validation import (
    SECTIONS,
    check_box_categories,
    check_instances_json,
    check_lists,
    raise_first_error,
    usable_segmentation,
)
from .catalog import check_first_file, is_registered, resolve_path

DatasetDict = dict[str, Any]


def register_instances_dataset(name: str, image_root: str, json_file: str) -> None:
    """Register a COCO-instances data set in Detectron2's catalogs; every class is a thing.

    The catalog entries are those of Detectron2's ``register_coco_instances``, but the classes are
    set at once, and mistakes in the JSON are reported in one line. Only the JSON's "categories"
    are checked now. Registering a name again with the same paths does nothing.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        image_root: folder of the images.
        json_file: the annotations. All paths may contain ``~`` and environment variables and are
            relative to the working directory.

    Raises:
        UserError: a path does not exist, the categories are not usable, or the name is taken.
    """
    paths = {"image_root": resolve_path(image_root), "json_file": resolve_path(json_file)}
    if is_registered(name, paths, "coco"):
        return
    table = _class_table(read_coco_json(paths["json_file"]), paths["json_file"])
    DatasetCatalog.register(name, functools.partial(load_instances_json, **paths))
    # Without "stuff_classes", which is how Detectron2 distinguishes boxes from panoptic data.
    MetadataCatalog.get(name).set(
        **paths,
        evaluator_type="coco",
        thing_classes=list(table.names),
        thing_colors=[list(color) for color in table.colors],
        thing_dataset_id_to_contiguous_id=table.contiguous_ids,
    )


def load_instances_json(json_file: str, image_root: str) -> list[DatasetDict]:
    """Read COCO-instances JSON into Detectron2's dataset dicts, after a check of every record.

    Detectron2's own reader leaves out boxes whose polygons have fewer than three points; evaluation
    counts them. Here they are kept, since only the boxes are learned.

    Returns:
        One dict per image, by id: file_name, image_id, height, width and annotations: dicts with
        bbox (x, y, width, height in pixels), bbox_mode, category_id (contiguous), iscrowd (0 or 1)
        and, if the JSON has a usable one, segmentation.

    Raises:
        UserError: names the first record with an error, or the first image if it does not exist.
    """
    content = read_coco_json(json_file)
    raise_first_error(check_instances_json(content), json_file)
    contiguous_ids = _class_table(content, json_file).contiguous_ids
    boxes: dict[int | str, list[DatasetDict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        segmentation = usable_segmentation(annotation)
        boxes[annotation["image_id"]].append(
            {
                "iscrowd": int(annotation.get("iscrowd", 0)),
                "bbox": list(annotation["bbox"]),
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": contiguous_ids[annotation["category_id"]],
                **({"segmentation": segmentation} if segmentation else {}),
            }
        )
    dataset_dicts = [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": boxes[image["id"]],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]
    check_first_file(dataset_dicts[0]["file_name"], "image", image_root, json_file)
    return dataset_dicts


def _class_table(content: DatasetDict, json_file: str) -> ClassTable:
    """Return the classes; this format does not distinguish things from stuff."""
    for problems in (check_lists(content, SECTIONS), check_box_categories(content)):
        raise_first_error(problems, json_file)
    return ClassTable.from_categories(
        [{**category, "isthing": 1} for category in content["categories"]]
    )
