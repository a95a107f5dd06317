"""Models. Importing this package registers them with Detectron2."""

from . import backbone, meta_arch

__all__ = ["backbone", "meta_arch"]
