"""Random changes of valid files, and rounds of cases within a given time."""

import contextlib
import copy
import io
import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
from hypothesis import strategies as st

from helpers.commands import load_script

SECONDS_PER_CASE = 120  # of one command; more is a hang, on a busy machine as well
CASES_PER_ROUND = 25


class Hang(BaseException):
    """A command has not ended in time; no handler of exceptions catches it."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `Hang` in the main thread after some seconds."""

    def stop(_number: int, _frame: object) -> None:
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], seconds: float) -> int:
    """Check drawn cases until the time is over; return their number.

    The cases of a round follow from its number, so that a failure can be repeated. Hypothesis
    shrinks a case that fails.
    """
    end = time.monotonic() + seconds
    count = 0
    for number in itertools.count():
        count += _round(strategy, check, number, end)
        if time.monotonic() > end:
            return count
    raise AssertionError


def _round(
    strategy: st.SearchStrategy[Any], check: Callable[[Any], None], number: int, end: float
) -> int:
    count, has_failed = 0, False

    @hypothesis.seed(number)
    @hypothesis.settings(
        max_examples=CASES_PER_ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def run(case: Any) -> None:
        nonlocal count, has_failed
        # A case that fails is run again, to shrink it.
        if time.monotonic() > end and count and not has_failed:
            return
        count += 1
        has_failed_before, has_failed = has_failed, True
        check(case)
        has_failed = has_failed_before

    run()
    return count


def ended_well(script: str, *arguments: object) -> int:
    """Run a command in this process; return its status, 0, 1 or 2, the last with one line."""
    errors = io.StringIO()
    with (
        limited(SECONDS_PER_CASE),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        status = load_script(script).main([str(a) for a in arguments])
    said = errors.getvalue()
    assert status in (0, 1, 2), status
    assert "Traceback" not in said, said
    if status == 2:
        assert said.count("error: ") >= 1, said
        assert said.rpartition("error: ")[2].count("\n") == 1, said
    return status


# Changes of bytes.

_EDITS = st.tuples(
    st.sampled_from(["flip", "set", "insert", "delete", "repeat", "cut"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=12) | st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\x80\x02"]),
)


def changed_bytes(*originals: bytes) -> st.SearchStrategy[bytes]:
    """One of the files with a few changes, a part of it, or anything else."""
    edits = st.lists(_EDITS, min_size=1, max_size=6)
    changed = st.tuples(st.sampled_from(originals), edits).map(lambda drawn: _edited(*drawn))
    return changed | st.binary(max_size=64)


def _edited(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, value in edits:
        at = int(where * len(data))
        end = at + len(value)
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (value[0] or 1)]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + value + data[end:]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "delete":
            data = data[:at] + data[end:]
        elif kind == "repeat":
            data = data[:end] + data[at:]
        elif kind == "cut" and value[0] < 64:  # not too often
            data = data[:at]
    return data


# Changes of JSON.

_NUMBERS = st.sampled_from(
    [
        *(0, -1, 1, 2, 7, 255, 256, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**40, -(10**40)),
        *(0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), float("-inf")),
    ]
)
_TEXTS = st.sampled_from(
    ["", "0", "1", "nan", "../x.png", "/", ".", "a\0b", "\ud800", "\x1b[31m", "é" * 300, "000.png"]
) | st.text(max_size=5)
_VALUES = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.integers() | st.floats() | _TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_json(draw: st.DrawFn, original: Any) -> bytes:
    """The JSON with one to three values replaced, removed, doubled or exchanged."""
    content = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(content))
        if not places:
            break
        parent, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "double", "copy"]))
        if kind == "remove":
            del parent[key]
        elif kind == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif kind == "copy":
            other, name = draw(st.sampled_from(places))
            parent[key] = copy.deepcopy(other[name])
        else:
            parent[key] = draw(_VALUES)
    text = json.dumps(content, ensure_ascii=draw(st.booleans()))
    data = text.encode("utf-8", "surrogatepass")
    return data if draw(st.integers(0, 9)) else draw(changed_bytes(data))


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)
