"""Problems that the checks report, and readers of records in JSON that may be malformed."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

from ...errors import UserError

Record = dict[str, Any]

# A PNG stores an id in three bytes, as R + 256 G + 65536 B; 0 is void.
LARGEST_SEGMENT_ID = 256**3 - 1


@dataclass(frozen=True)
class Problem:
    """One fault of a data set; ``str`` gives the sentence, which begins with image and segment.

    Attributes:
        kind: short name shared by all problems of the same sort, e.g. ``"wrong area"``.
        message: the fault, with the offending value and, where it is not obvious, the remedy.
        image: file name of the image, or its id without one; None for the whole data set.
        segment: segment id, or None.
        severity: ``"error"`` (training and evaluation refuse the data set in the same words),
            ``"warning"`` (they read it, but it is rarely intended, or breaks other tools) or
            ``"note"``.
    """

    kind: str
    message: str
    image: str | None = None
    segment: int | None = None
    severity: str = "error"

    def __str__(self) -> str:
        where = [] if self.image is None else [self.image]
        if self.segment is not None:
            where.append(f"segment {self.segment}")
        return f"{', '.join(where)}: {self.message}" if where else self.message


def raise_first_error(problems: Iterable[Problem], source: str | None = None) -> None:
    """Raise the first error in the words of its problem.

    Args:
        problems: consumed up to that error, so that a generator does no further checks.
        source: the file at fault, put before the sentence.

    Raises:
        UserError: there is such an error.
    """
    for problem in problems:
        if problem.severity == "error":
            raise UserError(str(problem) if source is None else f"{source}: {problem}")


def records(content: Record, section: str) -> list[Record]:
    """Return the entries of a list that are JSON objects; [] without such a list."""
    found = content.get(section)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def segments_of(annotation: Record) -> list[Record]:
    """Return the usable records of ``segments_info``."""
    return records(annotation, "segments_info")


# ---------------------------------------------------------------------------
# Typed readers of values, the same for training, evaluation and the checks
# ---------------------------------------------------------------------------


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a JSON value is an integer of 64 bits (``true`` and ``1.0`` are not)."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_size(value: object) -> TypeGuard[int]:
    """Return whether a JSON value is a height or width in pixels."""
    return is_integer(value) and value > 0


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a JSON value is a finite number."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def stated_size(image: Record) -> tuple[int, int] | None:
    """Return (H, W) of an image record; None if it states no usable size."""
    height, width = image.get("height"), image.get("width")
    return (height, width) if is_size(height) and is_size(width) else None


def check_crowd(record: Record) -> str | None:
    """Return a sentence about ``iscrowd`` unless it is 0, 1, false, true or absent."""
    found = record.get("iscrowd", 0)
    if isinstance(found, bool) or (is_integer(found) and found in (0, 1)):
        return None
    return f"iscrowd is {found!r}; write 0 or 1{text_hint(found)}"


def check_stated_area(record: Record) -> str | None:
    """Return a sentence about ``area`` unless it is a number of pixels or absent."""
    found = record.get("area", 0)
    if is_number(found) and found >= 0:
        return None
    return f"area is {found!r}; write a number of pixels, or leave it out{text_hint(found)}"


def text_hint(value: object) -> str:
    """Return the remedy for a number that is written as text, or ""."""
    is_text = isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value)
    return f" (a text: write {value} without quotes)" if is_text else ""


def image_name(record: Record) -> str:
    """Return the name of an image or annotation record for messages."""
    return str(record.get("file_name", record.get("image_id", record.get("id", "?"))))


def segment_number(segment: Record) -> int | None:
    """Return the id of a segment, or None if it is not a possible one."""
    found = segment.get("id")
    return found if is_integer(found) and 0 < found <= LARGEST_SEGMENT_ID else None
