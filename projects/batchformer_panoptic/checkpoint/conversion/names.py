"""Tables of names that are read in both directions."""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Row(NamedTuple):
    """Two prefixes that mean the same, ``#`` in them being one number.

    Attributes:
        theirs: prefix in the other project.
        ours: prefix in this project.
        tail: regular expression of the rest of a name, which is the same on both sides.
    """

    theirs: str
    ours: str
    tail: str


class NameTable:
    """Translates names in both directions; a name that no row covers has no counterpart."""

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self._to_ours = [(_pattern(row.theirs, row.tail), row.ours) for row in rows]
        self._to_theirs = [(_pattern(row.ours, row.tail), row.theirs) for row in rows]

    def to_ours(self, name: str) -> str | None:
        """This project's name, None if there is none."""
        return _translate(name, self._to_ours)

    def to_theirs(self, name: str) -> str | None:
        """The other project's name, None if there is none."""
        return _translate(name, self._to_theirs)


def _pattern(prefix: str, tail: str) -> re.Pattern[str]:
    # No leading zeros: each number has one spelling, and each name one counterpart.
    number = re.escape(prefix).replace(r"\#", "(?P<number>0|[1-9][0-9]*)")
    return re.compile(f"{number}(?P<tail>{tail})")


def _translate(name: str, patterns: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in patterns:
        if found := pattern.fullmatch(name):
            groups = found.groupdict()
            return target.replace("#", groups.get("number") or "") + groups["tail"]
    return None
