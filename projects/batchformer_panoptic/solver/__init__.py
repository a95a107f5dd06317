"""Optimizer, gradient clipping and learning-rate schedule from a config."""

from .build import build_gradient_clipper, build_lr_scheduler, build_optimizer

__all__ = ["build_gradient_clipper", "build_lr_scheduler", "build_optimizer"]
