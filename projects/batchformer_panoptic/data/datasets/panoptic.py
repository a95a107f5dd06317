"""COCO-panoptic data sets: one JSON file, one folder of images, one folder of PNGs."""

import functools
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ...errors import UserError
from ..class_table import ClassTable

logger = logging.getLogger(__name__)

DatasetDict = dict[str, Any]

# A PNG stores an id as red + 256 * green + 65536 * blue; 0 is void.
_LARGEST_SEGMENT_ID = 256**3 - 1


def register_panoptic_dataset(
    name: str, image_root: str, panoptic_root: str, panoptic_json: str
) -> None:
    """Make a COCO-panoptic data set known to Detectron2 under a name.

    Only the JSON's "categories" are read now; the annotations are read when the data set is used.
    Registering a name again with the same paths does nothing.

    Args:
        name: what DATASETS.TRAIN and DATASETS.TEST will call the data set.
        image_root: folder of the images.
        panoptic_root: folder of the PNGs.
        panoptic_json: the annotations. Paths may hold ``~`` and environment variables and are
            relative to the working directory.

    Raises:
        UserError: a path does not exist, the categories are not usable, or the name is taken.
    """
    paths = {
        "image_root": resolve_path(image_root),
        "panoptic_root": resolve_path(panoptic_root),
        "panoptic_json": resolve_path(panoptic_json),
    }
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog:
        if any(metadata.get(key) != path for key, path in paths.items()):
            raise UserError(
                f"data set {name!r} is already registered with other paths: choose another name"
            )
        return
    check_paths(name, paths)
    content = read_coco_json(paths["panoptic_json"], "COCO-panoptic")
    try:
        table = ClassTable.from_categories(content["categories"])
    except UserError as error:
        raise UserError(f"{paths['panoptic_json']}: {error}") from error
    DatasetCatalog.register(name, functools.partial(load_panoptic_json, **paths))
    metadata.set(**paths, **panoptic_metadata(table))


def panoptic_metadata(table: ClassTable) -> dict[str, Any]:
    """Metadata as Detectron2's own ``coco_2017_*_panoptic`` has it, for any classes.

    Things and stuff both list all classes, so that one id space serves Detectron2's visualiser
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
    """Read a COCO-panoptic JSON into Detectron2's dataset dicts, one per annotation record.

    Returns:
        Dicts with file_name, image_id, height, width (if the JSON has them), pan_seg_file_name and
        segments_info: dicts with id (the PNG's), category_id (contiguous), isthing (bool),
        iscrowd (0 or 1) and, as in the JSON, area and bbox.

    Raises:
        UserError: naming the record that is wrong, or the first image or PNG that does not exist.
    """
    content = read_coco_json(panoptic_json, "COCO-panoptic")
    try:
        table = ClassTable.from_categories(content["categories"])
        images = records_by_id(content["images"], "id", "image")
        annotations = records_by_id(content["annotations"], "image_id", "annotation of image")
        dataset_dicts = [
            _dataset_dict(annotation, images, table, image_root, panoptic_root)
            for annotation in annotations.values()
        ]
        if not dataset_dicts:
            raise UserError('"annotations" is empty')
        _check_first_files(dataset_dicts[0], image_root, panoptic_root)
    except UserError as error:
        raise UserError(f"{panoptic_json}: {error}") from error
    if len(images) > len(dataset_dicts):
        logger.warning(
            "%s: %d of %d images have no annotation record and are not used",
            panoptic_json,
            len(images) - len(dataset_dicts),
            len(images),
        )
    return dataset_dicts


def check_paths(name: str, paths: Mapping[str, str | None]) -> None:
    """Raise UserError for the first path that does not exist; a path of None is not looked for."""
    for role, path in paths.items():
        if path is not None and not PathManager.exists(path):
            raise UserError(
                f"data set {name!r}: {role} {path!r} does not exist; correct the path or prepare "
                "the data (Detectron2 looks for its own data sets in $DETECTRON2_DATASETS)"
            )


def resolve_path(path: str) -> str:
    """The path with ``~`` and environment variables expanded, absolute unless it is a URI."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    return expanded if "://" in expanded else os.path.abspath(expanded)


def read_coco_json(path: str, format_name: str) -> dict[str, Any]:
    """The file's object, checked for the three lists that COCO's formats have in common.

    Raises:
        UserError: the file cannot be read, or is not in the format, which is named so.
    """
    try:
        with PathManager.open(path, "r") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path}: not in {format_name} format, there is no list {key!r}")
    return content


def records_by_id(records: list[Any], key: str, what: str) -> dict[Any, DatasetDict]:
    """The records under their ids, in the order of the file."""
    result: dict[Any, DatasetDict] = {}
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get(key), int | str):
            raise UserError(f"{what}, number {number} of the list, has no {key!r}")
        if record[key] in result:
            raise UserError(f"{what} {record[key]!r} is given twice")
        result[record[key]] = record
    return result


def _dataset_dict(
    annotation: DatasetDict,
    images: dict[Any, DatasetDict],
    table: ClassTable,
    image_root: str,
    panoptic_root: str,
) -> DatasetDict:
    image_id = annotation["image_id"]
    if image_id not in images:
        raise UserError(f"annotation of image {image_id!r}: no such entry in 'images'")
    image = images[image_id]
    for record, what in ((image, "image"), (annotation, "annotation of image")):
        if not isinstance(record.get("file_name"), str):
            raise UserError(f"{what} {image_id!r} has no 'file_name'")
    if not isinstance(annotation.get("segments_info"), list):
        raise UserError(
            f"annotation of image {image_id!r} has no 'segments_info' "
            "(an image without segments has an empty list)"
        )
    sizes: DatasetDict = {key: image[key] for key in ("height", "width") if key in image}
    return {
        "file_name": os.path.join(image_root, image["file_name"]),
        "image_id": image_id,
        **sizes,
        "pan_seg_file_name": os.path.join(panoptic_root, annotation["file_name"]),
        "segments_info": _segments_info(annotation, table.contiguous_ids, table),
    }


def _segments_info(
    annotation: DatasetDict, contiguous_ids: dict[int, int], table: ClassTable
) -> list[DatasetDict]:
    where = f"annotation of image {annotation['image_id']!r}"
    result: dict[int, DatasetDict] = {}
    for segment in annotation["segments_info"]:
        if not isinstance(segment, dict) or not isinstance(segment.get("id"), int):
            raise UserError(f"{where}: a segment has no integer 'id'")
        segment_id = segment["id"]
        if not 1 <= segment_id <= _LARGEST_SEGMENT_ID:
            raise UserError(
                f"{where}: segment id {segment_id} is not from 1 to {_LARGEST_SEGMENT_ID}"
            )
        if segment_id in result:
            raise UserError(f"{where}: segment {segment_id} is given twice")
        category_id = segment.get("category_id")
        if not isinstance(category_id, int) or category_id not in contiguous_ids:
            raise UserError(
                f"{where}: segment {segment_id} has category_id {category_id!r}, "
                "which is not among the categories"
            )
        class_id = contiguous_ids[category_id]
        result[segment_id] = {
            **{key: segment[key] for key in ("area", "bbox") if key in segment},
            "id": segment_id,
            "category_id": class_id,
            "isthing": table.is_thing[class_id],
            "iscrowd": int(segment.get("iscrowd", 0)),
        }
    return list(result.values())


def _check_first_files(dataset_dict: DatasetDict, image_root: str, panoptic_root: str) -> None:
    """Notice a wrong folder before training starts and not in a worker process."""
    for key, root in (("file_name", image_root), ("pan_seg_file_name", panoptic_root)):
        if not PathManager.isfile(dataset_dict[key]):
            raise UserError(
                f"image {dataset_dict['image_id']!r}: {dataset_dict[key]} does not exist; "
                f"is {root} the right folder?"
            )
