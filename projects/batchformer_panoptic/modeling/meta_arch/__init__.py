"""Meta-architectures of Detectron2 that this project adds."""

from .classifier import ImageClassifier
from .detr import PanopticDETR

__all__ = ["ImageClassifier", "PanopticDETR"]
