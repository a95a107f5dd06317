"""Data sets, class tables, the mapper and the loaders."""

from .class_table import ClassTable
from .classification_mapper import ClassificationMapper
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
from .loader import (
    CheckedLoader,
    ResumableSampler,
    SampledItem,
    build_test_loader,
    build_train_loader,
    load_dataset_dicts,
)
from .panoptic_mapper import PanopticDatasetMapper, build_augmentations

__all__ = [
    "CheckedLoader",
    "ClassTable",
    "ClassificationMapper",
    "PanopticDatasetMapper",
    "ResumableSampler",
    "SampledItem",
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
