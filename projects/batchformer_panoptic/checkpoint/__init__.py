"""Checkpoints: safe reading, strict loading, and the stored class table and settings."""

from .files import read_weights
from .loading import PanopticCheckpointer
from .records import ClassTableRecord, RunRecord, SettingsRecord, read_class_table

__all__ = [
    "ClassTableRecord",
    "PanopticCheckpointer",
    "RunRecord",
    "SettingsRecord",
    "read_class_table",
    "read_weights",
]
