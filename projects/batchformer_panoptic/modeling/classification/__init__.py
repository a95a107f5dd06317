"""Image classification with a vision Transformer of timm."""

from .build import build_batch_mixing, build_vision_transformer
from .mixing import BatchMixing
from .vision_transformer import HookedVisionTransformer

__all__ = [
    "BatchMixing",
    "HookedVisionTransformer",
    "build_batch_mixing",
    "build_vision_transformer",
]
