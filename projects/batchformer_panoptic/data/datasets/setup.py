"""Registers the data sets of a config and derives its classes from them."""

from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...config import boxes_only_changes, classifies
from ...errors import UserError, did_you_mean
from ..class_table import ClassTable
from .image_folder import CLASSIFICATION, register_image_folder
from .instances import register_instances_dataset
from .panoptic import register_panoptic_dataset

# Config key -> function that registers a row, and the names of a row's entries.
_CUSTOM: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "CUSTOM_PANOPTIC": (
        register_panoptic_dataset,
        ("name", "image_root", "panoptic_root", "panoptic_json"),
    ),
    "CUSTOM_INSTANCES": (register_instances_dataset, ("name", "image_root", "json_file")),
    "CUSTOM_IMAGE_FOLDERS": (register_image_folder, ("name", "root")),
}


def setup_datasets(cfg: CfgNode) -> None:
    """Register the custom data sets and derive the classes from DATASETS.TRAIN and TEST.

    DATASETS.CUSTOM_PANOPTIC, CUSTOM_INSTANCES and CUSTOM_IMAGE_FOLDERS list custom data sets.
    MODEL.DETR.NUM_CLASSES of 0 and MODEL.PANOPTIC.THING_CLASS_IDS of [] are filled in, for the
    meta-architecture "ImageClassifier" MODEL.CLASSIFIER.NUM_CLASSES instead. Calling this again
    with the same config changes nothing.

    Args:
        cfg: changed in place, therefore not frozen.

    Raises:
        UserError: a malformed row, an unknown data set, data sets with different classes, classes
            in the config that differ from those of the data sets, or data sets without the
            annotations that the model learns (masks, boxes or labels of images).
    """
    for key in _CUSTOM:
        for row in cfg.DATASETS[key]:
            _register_row(key, row)
    table = class_table_of([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    if table is None:
        return
    _check_task(cfg)
    if cfg.MODEL.MASK_ON:
        _check_masks(cfg)
    section = class_section(cfg)
    node = cfg.MODEL[section]
    if node.NUM_CLASSES not in (0, table.num_classes):
        raise UserError(
            f"MODEL.{section}.NUM_CLASSES is {node.NUM_CLASSES}, but the data sets have "
            f"{table.num_classes} classes: leave it at 0 to take that number"
        )
    if not classifies(cfg):
        _take_things(cfg, table.thing_class_ids)
    node.NUM_CLASSES = table.num_classes


def class_section(cfg: CfgNode) -> str:
    """Return the section of MODEL whose NUM_CLASSES the model reads: "CLASSIFIER" or "DETR"."""
    return "CLASSIFIER" if classifies(cfg) else "DETR"


def _take_things(cfg: CfgNode, things: list[int]) -> None:
    configured_things = sorted(cfg.MODEL.PANOPTIC.THING_CLASS_IDS)
    if configured_things and configured_things != things:
        raise UserError(
            f"MODEL.PANOPTIC.THING_CLASS_IDS is {configured_things}, but the things of the data "
            f"sets are {things}: leave it at [] to take those"
        )
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = things


def class_table_of(names: Sequence[str]) -> ClassTable | None:
    """Return the classes that all named data sets share; None without any name.

    Raises:
        UserError: an unknown name, or classes that differ.
    """
    table: ClassTable | None = None
    for name in names:
        check_registered(name)
        metadata = MetadataCatalog.get(name)
        if not metadata.get("thing_classes") and not metadata.get("stuff_classes"):
            # register_coco_instances sets the classes only when the data set is read.
            DatasetCatalog.get(name)
        other = ClassTable.from_metadata(metadata)
        if table is None:
            table = other
        elif difference := table.difference(other):
            raise UserError(
                f"data sets {names[0]!r} and {name!r} do not have the same classes: {difference}"
            )
    return table


def check_registered(name: str) -> None:
    """Raise UserError, with similar names and the remedy, for a name that is not registered."""
    if name in DatasetCatalog:
        return
    raise UserError(
        f"unknown data set {name!r}{did_you_mean(name, DatasetCatalog.list())}; add a custom data "
        "set to "
        + " or ".join(
            f"DATASETS.{key} as {_row_form(words)}" for key, (_, words) in _CUSTOM.items()
        )
    )


def _check_task(cfg: CfgNode) -> None:
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        is_image_folder = MetadataCatalog.get(name).get("evaluator_type") == CLASSIFICATION
        if is_image_folder == classifies(cfg):
            continue
        what = "one label for each image" if is_image_folder else "segments or boxes"
        raise UserError(
            f"the data set {name!r} has {what}, and MODEL.META_ARCHITECTURE is "
            f"{cfg.MODEL.META_ARCHITECTURE!r}: 'ImageClassifier' takes image folders "
            "(DATASETS.CUSTOM_IMAGE_FOLDERS) only, and other models take none"
        )


def _check_masks(cfg: CfgNode) -> None:
    for name in cfg.DATASETS.TRAIN:
        if not MetadataCatalog.get(name).get("panoptic_root"):
            changes = " ".join(["MODEL.MASK_ON False", *boxes_only_changes(cfg)])
            raise UserError(
                f"MODEL.MASK_ON needs masks, but the data set {name!r} has no panoptic PNGs to "
                f"learn them from: set {changes} to train on boxes only"
            )


def _register_row(key: str, row: object) -> None:
    register, words = _CUSTOM[key]
    if (
        not isinstance(row, list | tuple)
        or len(row) != len(words)
        or not all(isinstance(value, str) and value for value in row)
    ):
        number = {2: "two", 3: "three", 4: "four"}[len(words)]
        raise UserError(
            f"DATASETS.{key}: {row!r} is not a list of {number} texts {_row_form(words)}"
        )
    register(*row)


def _row_form(words: Sequence[str]) -> str:
    return f"[{', '.join(words)}]"
