"""Heads: query states in, raw predictions out."""

from .box import BoxHead, ClassHead, LayerwiseBoxHead
from .mask import MaskHead, QueryMaskHead, SemanticAuxHead

__all__ = [
    "BoxHead",
    "ClassHead",
    "LayerwiseBoxHead",
    "MaskHead",
    "QueryMaskHead",
    "SemanticAuxHead",
]
