"""Checkpoints: safe reading, strict loading, and the stored class table and settings."""

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
