"""Checkpoints: safe reading, strict fitting, the class table and the settings inside."""

from .class_table import ClassTableRecord, read_class_table
from .files import read_weights
from .loading import PanopticCheckpointer
from .settings import SettingsRecord

__all__ = [
    "ClassTableRecord",
    "PanopticCheckpointer",
    "SettingsRecord",
    "read_class_table",
    "read_weights",
]
