"""Predictions and annotations as pictures: the predictor, the drawing, the arranging."""

from ..data.io import read_image, write_image
from ..engine.predictor import Predictor, configure_for_drawing
from .drawing import draw_ground_truth, draw_result, draw_scene, draw_targets
from .scene import contact_sheet, side_by_side

__all__ = [
    "Predictor",
    "configure_for_drawing",
    "contact_sheet",
    "draw_ground_truth",
    "draw_result",
    "draw_scene",
    "draw_targets",
    "read_image",
    "side_by_side",
    "write_image",
]
