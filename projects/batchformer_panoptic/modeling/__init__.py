"""Models. Importing this package registers them with Detectron2."""

from . import backbone, image_classifier, panoptic_detr

__all__ = ["backbone", "image_classifier", "panoptic_detr"]
