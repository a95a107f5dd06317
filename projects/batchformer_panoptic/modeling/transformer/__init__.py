"""Transformers by name: feature maps in, query states and memory out."""

from .base import TRANSFORMER_REGISTRY, Transformer, TransformerOutput, build_transformer
from .detr import SingleScaleTransformer

__all__ = [
    "TRANSFORMER_REGISTRY",
    "SingleScaleTransformer",
    "Transformer",
    "TransformerOutput",
    "build_transformer",
]
