"""Transformers by name: feature maps in, query states and memory out."""

from .base import TRANSFORMER_REGISTRY, Proposals, Transformer, TransformerOutput, build_transformer
from .conditional import ConditionalDecoder
from .deformable import DeformableTransformer
from .detr import SingleScaleTransformer
from .mask2former import Mask2Former
from .smca import SMCADecoder
from .smca_multiscale import MultiScaleSMCA

__all__ = [
    "TRANSFORMER_REGISTRY",
    "ConditionalDecoder",
    "DeformableTransformer",
    "Mask2Former",
    "MultiScaleSMCA",
    "Proposals",
    "SMCADecoder",
    "SingleScaleTransformer",
    "Transformer",
    "TransformerOutput",
    "build_transformer",
]
