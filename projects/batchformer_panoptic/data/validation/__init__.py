"""Checks of data sets in COCO's layouts, with messages for their owners.

Every check is a generator of `Problem`. Content never makes a check raise: a malformed record
becomes a problem, and the rest is still checked. Loader, mapper and evaluators run the same checks
and raise the first error as a `UserError`.
"""

from .annotations import (
    SECTIONS,
    check_annotations,
    check_categories,
    check_color,
    check_entries,
    check_lists,
    check_panoptic_json,
    check_repeated_ids,
)
from .files import (
    Depth,
    check_image_size,
    check_images,
    check_instances_content,
    check_panoptic_content,
    check_png_size,
    check_shared_images,
)
from .instances import (
    check_box_categories,
    check_boxes,
    check_instances_json,
    usable_segmentation,
)
from .limits import check_detections, check_queries, no_training_targets
from .pixels import check_area, check_segment_ids, segment_without_pixels
from .problems import Problem, raise_first_error, records, segments_of, stated_size
from .repair import PNG_FOLDER, repair_panoptic_set

__all__ = [
    "PNG_FOLDER",
    "SECTIONS",
    "Depth",
    "Problem",
    "check_annotations",
    "check_area",
    "check_box_categories",
    "check_boxes",
    "check_categories",
    "check_color",
    "check_detections",
    "check_entries",
    "check_image_size",
    "check_images",
    "check_instances_content",
    "check_instances_json",
    "check_lists",
    "check_panoptic_content",
    "check_panoptic_json",
    "check_png_size",
    "check_queries",
    "check_repeated_ids",
    "check_segment_ids",
    "check_shared_images",
    "no_training_targets",
    "raise_first_error",
    "records",
    "repair_panoptic_set",
    "segment_without_pixels",
    "segments_of",
    "stated_size",
    "usable_segmentation",
]
