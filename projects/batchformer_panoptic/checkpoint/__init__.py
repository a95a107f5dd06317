"""Checkpoints: safe reading, strict fitting, the class table inside."""

from .class_table import ClassTableRecord, read_class_table
from .loading import PanopticCheckpointer

__all__ = ["ClassTableRecord", "PanopticCheckpointer", "read_class_table"]
