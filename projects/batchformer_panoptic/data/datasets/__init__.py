"""Data sets: reading, registering, and the config keys that follow from them."""

from .image_folder import load_image_folder, register_image_folder
from .instances import load_instances_json, register_instances_dataset
from .panoptic import load_panoptic_json, register_panoptic_dataset
from .setup import class_section, setup_datasets

__all__ = [
    "class_section",
    "load_image_folder",
    "load_instances_json",
    "load_panoptic_json",
    "register_image_folder",
    "register_instances_dataset",
    "register_panoptic_dataset",
    "setup_datasets",
]
