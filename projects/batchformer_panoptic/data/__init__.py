"""Data sets, class tables, the mapper and the loaders."""

from .augmentation import build_augmentations
from .build import build_test_loader, build_train_loader, load_dataset_dicts
from .categories import ClassTable
from .classification import ClassificationMapper
from .dataset_mapper import PanopticDatasetMapper
from .datasets import (
    class_section,
    load_image_folder,
    load_instances_json,
    load_panoptic_json,
    register_image_folder,
    register_instances_dataset,
    register_panoptic_dataset,
    setup_datasets,
)
from .samplers import StreamItem, StreamSampler

__all__ = [
    "ClassTable",
    "ClassificationMapper",
    "PanopticDatasetMapper",
    "StreamItem",
    "StreamSampler",
    "build_augmentations",
    "build_test_loader",
    "build_train_loader",
    "class_section",
    "load_dataset_dicts",
    "load_image_folder",
    "load_instances_json",
    "load_panoptic_json",
    "register_image_folder",
    "register_instances_dataset",
    "register_panoptic_dataset",
    "setup_datasets",
]
