"""Backbones that Detectron2 does not have."""

from .small_resnet import build_small_resnet_backbone

__all__ = ["build_small_resnet_backbone"]
