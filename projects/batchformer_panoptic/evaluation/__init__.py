"""Panoptic quality, average precision, mean IoU, and the accuracy of classification."""

from .build import EVALUATOR_FACTORIES, build_evaluator, main_metric, per_class_values
from .coco_ap import ThingAPEvaluator, build_box_evaluator
from .overlapped import OverlappedEvaluator
from .panoptic_evaluator import (
    ClassQuality,
    GroupQuality,
    PanopticEvaluator,
    PanopticQuality,
)
from .panoptic_quality import Segments, image_pq_counts
from .semantic_evaluator import SemanticEvaluator
from .top_k import TopKEvaluator

__all__ = [
    "EVALUATOR_FACTORIES",
    "ClassQuality",
    "GroupQuality",
    "OverlappedEvaluator",
    "PanopticEvaluator",
    "PanopticQuality",
    "Segments",
    "SemanticEvaluator",
    "ThingAPEvaluator",
    "TopKEvaluator",
    "build_box_evaluator",
    "build_evaluator",
    "image_pq_counts",
    "main_metric",
    "per_class_values",
]
