"""Checks of data sets in COCO's panoptic layout, with messages for their owners.

Every check is a generator of `Problem`. Content never makes a check raise: a malformed record
becomes a problem, and the rest is still checked. The loader runs the same checks and raises the
first error as a `UserError`.
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
    check_unique,
)
from .files import (
    check_area,
    check_image_size,
    check_panoptic_content,
    check_png_size,
    check_segment_ids,
    segment_without_pixels,
)
from .problems import Problem, raise_first_error, records, segments_of

__all__ = [
    "SECTIONS",
    "Problem",
    "check_annotations",
    "check_area",
    "check_categories",
    "check_color",
    "check_entries",
    "check_image_size",
    "check_lists",
    "check_panoptic_content",
    "check_panoptic_json",
    "check_png_size",
    "check_repeated_ids",
    "check_segment_ids",
    "check_unique",
    "raise_first_error",
    "records",
    "segment_without_pixels",
    "segments_of",
]
