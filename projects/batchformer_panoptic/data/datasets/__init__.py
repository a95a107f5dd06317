"""Data sets: reading, registering, and the config keys that follow from them."""

from .panoptic import load_panoptic_json, register_panoptic_dataset
from .setup import setup_datasets

__all__ = ["load_panoptic_json", "register_panoptic_dataset", "setup_datasets"]
