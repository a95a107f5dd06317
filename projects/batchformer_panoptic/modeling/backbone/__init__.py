"""Backbones that Detectron2 does not have."""

from .detr_resnet import build_resnet_dc5_backbone
from .recomputing import recompute_stages
from .small_resnet import build_small_resnet_backbone
from .timm_backbone import TimmBackbone, build_timm_backbone
from .timm_features import TESTED_TIMM_MODELS, create_timm_features

__all__ = [
    "TESTED_TIMM_MODELS",
    "TimmBackbone",
    "build_resnet_dc5_backbone",
    "build_small_resnet_backbone",
    "build_timm_backbone",
    "create_timm_features",
    "recompute_stages",
]
