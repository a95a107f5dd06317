"""Problems that the checks report, and readers of records in JSON that may be malformed."""

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
        severity: ``"error"`` (training or evaluation fails or gives wrong numbers), ``"warning"``
            (works, but is rarely intended) or ``"note"``.
        tolerated: an error of which only other tools are affected, such as panopticapi, which
            needs ``iscrowd`` in every segment. This package reads such data sets.
    """

    kind: str
    message: str
    image: str | None = None
    segment: int | None = None
    severity: str = "error"
    tolerated: bool = False

    def __str__(self) -> str:
        where = [] if self.image is None else [self.image]
        if self.segment is not None:
            where.append(f"segment {self.segment}")
        return f"{', '.join(where)}: {self.message}" if where else self.message


def raise_first_error(problems: Iterable[Problem], source: str | None = None) -> None:
    """Raise the first error, unless it is tolerated, in the words of its problem.

    Args:
        problems: consumed up to that error, so that a generator does no further checks.
        source: the file at fault, put before the sentence.

    Raises:
        UserError: there is such an error.
    """
    for problem in problems:
        if problem.severity == "error" and not problem.tolerated:
            raise UserError(str(problem) if source is None else f"{source}: {problem}")


def records(content: Record, section: str) -> list[Record]:
    """Return the entries of a list that are JSON objects; [] without such a list."""
    found = content.get(section)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def segments_of(annotation: Record) -> list[Record]:
    """Return the usable records of ``segments_info``."""
    return records(annotation, "segments_info")


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a JSON value is an integer (``true`` and ``1.0`` are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def image_name(record: Record) -> str:
    """Return the name of an image or annotation record for messages."""
    return str(record.get("file_name", record.get("image_id", record.get("id", "?"))))


def segment_number(segment: Record) -> int | None:
    """Return the id of a segment, or None if it is not a possible one."""
    found = segment.get("id")
    return found if is_integer(found) and 0 < found <= LARGEST_SEGMENT_ID else None
