"""Data sets: reading, registering, and the config keys that follow from them."""

from .instances import load_instances_json, register_instances_dataset
from .panoptic import load_panoptic_json, register_panoptic_dataset
from .setup import setup_datasets

__all__ = [
    "load_instances_json",
    "load_panoptic_json",
    "register_instances_dataset",
    "register_panoptic_dataset",
    "setup_datasets",
]
