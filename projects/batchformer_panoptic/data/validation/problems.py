"""What a check reports, and how it reads the records of a JSON that may be broken."""

from dataclasses import dataclass
from typing import Any, TypeGuard

Record = dict[str, Any]
LARGEST_SEGMENT_ID = 256**3 - 1


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: short name shared by all problems of the same sort, e.g. ``"wrong area"``.
        message: what is wrong, with the offending value, and what to do where that is not plain.
        image: file name (or id, where there is no name) of the image, or None for the whole set.
        segment: segment id, or None.
        severity: ``"error"`` (training or evaluation fails or gives wrong numbers), ``"warning"``
            (works, but is seldom meant) or ``"note"``.
    """

    kind: str
    message: str
    image: str | None = None
    segment: int | None = None
    severity: str = "error"


def records(content: Record, section: str) -> list[Record]:
    """The records of a section that are JSON objects; [] when the section is unusable."""
    found = content.get(section)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def segments_of(annotation: Record) -> list[Record]:
    """The usable records of ``segments_info``."""
    return records(annotation, "segments_info")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a whole number (``true`` and ``1.0`` are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def image_name(record: Record) -> str:
    """What to call an image or annotation record in a message."""
    return str(record.get("file_name", record.get("image_id", record.get("id", "?"))))


def segment_number(segment: Record) -> int | None:
    """The segment's id where it is a possible one, else None."""
    found = segment.get("id")
    return found if is_integer(found) and 0 < found <= LARGEST_SEGMENT_ID else None
