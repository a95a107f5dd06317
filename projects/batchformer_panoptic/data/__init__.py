"""Data sets, class tables, the mapper and the loaders."""

from .augmentation import build_augmentations
from .build import build_test_loader, build_train_loader, load_dataset_dicts
from .categories import ClassTable
from .dataset_mapper import PanopticDatasetMapper
from .datasets import (
    load_instances_json,
    load_panoptic_json,
    register_instances_dataset,
    register_panoptic_dataset,
    setup_datasets,
)
from .samplers import StreamItem, StreamSampler

__all__ = [
    "ClassTable",
    "PanopticDatasetMapper",
    "StreamItem",
    "StreamSampler",
    "build_augmentations",
    "build_test_loader",
    "build_train_loader",
    "load_dataset_dicts",
    "load_instances_json",
    "load_panoptic_json",
    "register_instances_dataset",
    "register_panoptic_dataset",
    "setup_datasets",
]
