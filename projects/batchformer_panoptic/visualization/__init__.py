"""Drawing of predictions, annotations and training targets."""

from ..data.images import read_image, write_image
from .drawing import draw_ground_truth, draw_result, draw_scene, draw_targets
from .error_map import ERROR_ENTRIES, draw_errors
from .scene import contact_sheet, side_by_side, write_pictures
from .text import legend, legend_entries

__all__ = [
    "ERROR_ENTRIES",
    "contact_sheet",
    "draw_errors",
    "draw_ground_truth",
    "draw_result",
    "draw_scene",
    "draw_targets",
    "legend",
    "legend_entries",
    "read_image",
    "side_by_side",
    "write_image",
    "write_pictures",
]
