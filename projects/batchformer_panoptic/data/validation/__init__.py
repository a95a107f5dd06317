"""Find what is wrong with a data set in COCO's panoptic layout, and say it in plain words.

Every check is one small generator of :class:`Problem`. Nothing here raises for bad *content*: a
broken record becomes a problem and the rest is still checked.
"""

from .check import check_panoptic_content, check_panoptic_dataset, load_panoptic_json
from .problems import Problem, records, segments_of

__all__ = [
    "Problem",
    "check_panoptic_content",
    "check_panoptic_dataset",
    "load_panoptic_json",
    "records",
    "segments_of",
]
