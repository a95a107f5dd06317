"""Meta-architectures of Detectron2 that this project adds."""

from .detr import PanopticDETR

__all__ = ["PanopticDETR"]
