"""Backbones besides those of Detectron2: ResNets of DETR, small ResNets, Swin, timm models."""

from .resnet import (
    FoldedConv2d,
    build_resnet_dc5_backbone,
    build_small_resnet_backbone,
    checkpoint_stages,
    fold_frozen_norms,
)
from .swin import SwinBackbone, build_swin_backbone
from .timm import TESTED_TIMM_MODELS, TimmBackbone, build_timm_backbone, create_timm_features

__all__ = [
    "TESTED_TIMM_MODELS",
    "FoldedConv2d",
    "SwinBackbone",
    "TimmBackbone",
    "build_resnet_dc5_backbone",
    "build_small_resnet_backbone",
    "build_swin_backbone",
    "build_timm_backbone",
    "checkpoint_stages",
    "create_timm_features",
    "fold_frozen_norms",
]
