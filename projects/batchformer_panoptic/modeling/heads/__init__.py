"""Heads: query states in, raw predictions out."""

from .box import BoxHead
from .mask import MaskHead

__all__ = ["BoxHead", "MaskHead"]
