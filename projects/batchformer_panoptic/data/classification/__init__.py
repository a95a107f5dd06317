"""Images with one label each: augmentation as timm has it, and the mapper."""

from .augmentation import PixelErasing, build_image_transform
from .mapper import ClassificationMapper

__all__ = ["ClassificationMapper", "PixelErasing", "build_image_transform"]
