"""COCO-instances data sets: a JSON file of boxes (perhaps with masks) and a folder of images."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from ...errors import UserError
from ..class_table import ClassTable
from .panoptic import check_paths, read_coco_json, records_by_id, resolve_path

DatasetDict = dict[str, Any]

_FORMAT = "COCO-instances"


def register_instances_dataset(name: str, image_root: str, json_file: str) -> None:
    """Make a COCO-instances data set known to Detectron2 under a name; every class is a thing.

    The catalog entries are those of Detectron2's ``register_coco_instances``, but the classes are
    known at once, and mistakes in the JSON are told in one line. Only the JSON's "categories" are
    read now. Registering a name again with the same paths does nothing.

    Args:
        name: what DATASETS.TRAIN and DATASETS.TEST will call the data set.
        image_root: folder of the images.
        json_file: the annotations. Paths may hold ``~`` and environment variables and are relative
            to the working directory.

    Raises:
        UserError: a path does not exist, the categories are not usable, or the name is taken.
    """
    paths = {"image_root": resolve_path(image_root), "json_file": resolve_path(json_file)}
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog:
        if any(metadata.get(key) != path for key, path in paths.items()):
            raise UserError(
                f"data set {name!r} is already registered with other paths: choose another name"
            )
        return
    check_paths(name, paths)
    table = _class_table(read_coco_json(paths["json_file"], _FORMAT), paths["json_file"])
    DatasetCatalog.register(name, functools.partial(load_instances_json, name=name, **paths))
    # Without "stuff_classes", that is how Detectron2 tells boxes from panoptic data.
    metadata.set(
        **paths,
        evaluator_type="coco",
        thing_classes=list(table.names),
        thing_colors=[list(color) for color in table.colors],
        thing_dataset_id_to_contiguous_id=table.contiguous_ids,
    )


def load_instances_json(json_file: str, image_root: str, name: str) -> list[DatasetDict]:
    """Read a COCO-instances JSON with Detectron2's reader, after a check of every record.

    Returns:
        Detectron2's dataset dicts, one per image: file_name, image_id, height, width and
        annotations: dicts with bbox (x, y, width, height in pixels), bbox_mode, category_id
        (contiguous), iscrowd and, if the JSON has it, segmentation.

    Raises:
        UserError: naming the record that is wrong, or the first image if it does not exist.
    """
    content = read_coco_json(json_file, _FORMAT)
    table = _class_table(content, json_file)
    try:
        _check_records(content, set(table.dataset_ids))
        dataset_dicts: list[DatasetDict] = load_coco_json(json_file, image_root, name)
        if not dataset_dicts:
            raise UserError('"images" is empty')
        first = dataset_dicts[0]
        if not PathManager.isfile(first["file_name"]):
            raise UserError(
                f"image {first['image_id']!r}: {first['file_name']} does not exist; "
                f"is {image_root} the right folder?"
            )
    except UserError as error:
        raise UserError(f"{json_file}: {error}") from error
    return dataset_dicts


def _class_table(content: DatasetDict, json_file: str) -> ClassTable:
    """The classes of "categories", which say nothing of things and stuff in this format."""
    try:
        return ClassTable.from_categories(
            [
                {**category, "isthing": 1} if isinstance(category, dict) else category
                for category in content["categories"]
            ]
        )
    except UserError as error:
        raise UserError(f"{json_file}: {error}") from error


def _check_records(content: DatasetDict, category_ids: set[int]) -> None:
    images = records_by_id(content["images"], "id", "image")
    for image_id, image in images.items():
        if not isinstance(image.get("file_name"), str):
            raise UserError(f"image {image_id!r} has no 'file_name'")
        for key in ("height", "width"):
            if not isinstance(image.get(key), int) or image[key] < 1:
                raise UserError(f"image {image_id!r} has the {key} {image.get(key)!r}")
    annotations = records_by_id(content["annotations"], "id", "annotation")
    for annotation_id, annotation in annotations.items():
        if annotation.get("image_id") not in images:
            raise UserError(
                f"annotation {annotation_id!r} has image_id {annotation.get('image_id')!r}, "
                "which is not among the images"
            )
        if annotation.get("category_id") not in category_ids:
            raise UserError(
                f"annotation {annotation_id!r} has category_id {annotation.get('category_id')!r}, "
                "which is not among the categories"
            )
        if not _is_box(annotation.get("bbox")):
            raise UserError(
                f"annotation {annotation_id!r} has the bbox {annotation.get('bbox')!r}: give "
                "[x, y, width, height] in pixels"
            )


def _is_box(value: Any) -> bool:
    if not isinstance(value, Sequence) or len(value) != 4:
        return False
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in value):
        return False
    return bool(value[2] >= 0 and value[3] >= 0)
