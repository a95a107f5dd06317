"""Panoptic quality, average precision, and the accuracy of classification."""

from .box_ap import build_box_evaluator
from .build import EVALUATOR_FACTORIES, build_evaluator, main_metric
from .panoptic_evaluator import StreamingPanopticEvaluator
from .panoptic_quality import Segments, image_pq_counts
from .panoptic_results import ClassQuality, GroupQuality, PanopticQuality
from .thing_ap import ThingAPEvaluator
from .top_k import TopKEvaluator

__all__ = [
    "EVALUATOR_FACTORIES",
    "ClassQuality",
    "GroupQuality",
    "PanopticQuality",
    "Segments",
    "StreamingPanopticEvaluator",
    "ThingAPEvaluator",
    "TopKEvaluator",
    "build_box_evaluator",
    "build_evaluator",
    "image_pq_counts",
    "main_metric",
]
