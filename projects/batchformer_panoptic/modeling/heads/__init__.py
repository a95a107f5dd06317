"""Heads: query states in, raw predictions out."""

from .box import BoxHead, LayerwiseBoxHead
from .mask import MaskHead
from .semantic import SemanticAuxHead

__all__ = ["BoxHead", "LayerwiseBoxHead", "MaskHead", "SemanticAuxHead"]
