"""Faults of a run: what is done to it, what the commands say, and what is left on disk."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers.commands import REPO_ROOT, load_script
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.trained_files import Run, write_run

DOCUMENT = REPO_ROOT / "docs" / "run_faults.md"


@dataclasses.dataclass
class Place:
    """Where a fault happens: an empty folder, and the last command that was run in it."""

    folder: Path
    dataset: TinyPanopticDataset
    monkeypatch: pytest.MonkeyPatch
    capfd: Any
    status: int = 0
    words: str = ""

    def trained(self, **overrides: Any) -> Run:
        """Files of a tiny model in ``folder/run``; overrides are those of `tiny_cfg`."""
        return write_run(self.folder / "run", self.dataset, **overrides)

    def command(self, script: str, *arguments: object) -> int:
        """Run a command in this process; keep its status and the last line of its errors."""
        self.capfd.readouterr()
        self.ended(
            load_script(script).main([str(a) for a in arguments]), self.capfd.readouterr().err
        )
        return self.status

    def ended(self, status: int, errors: str) -> None:
        """Keep the outcome of a command; a process of its own calls this with what it printed."""
        assert "Traceback" not in errors, errors
        lines = errors.strip().splitlines()
        self.status, self.words = status, lines[-1] if lines else ""


class RunFault(NamedTuple):
    """A fault, the command that meets it, and what is true afterwards.

    ``act`` makes the fault, runs the command with `Place.command` and asserts what ``state`` says.
    """

    fault: str
    command: str
    state: str
    act: Callable[[Place], None]
    status: int = 2


class Outcome(NamedTuple):
    """What a fault has led to."""

    words: str
    status: int


def outcome_of(place: Place) -> Outcome:
    """The outcome, with ``DIR`` and ``SET`` for the folders of the test and of the data set."""
    words = re.sub(r"\x1b\[[0-9;]*m", "", place.words)  # without colours
    for folder, name in ((place.folder, "DIR"), (place.dataset.panoptic_json.parent, "SET")):
        words = words.replace(str(folder), name)
    return Outcome(words, place.status)


def render(faults: Iterable[RunFault], outcomes: dict[str, Outcome]) -> str:
    """Return the document for the outcomes of all faults, by fault."""
    rows = []
    for fault in faults:
        words, status = outcomes[fault.fault]
        cells = (fault.fault, fault.command, words, str(status), fault.state)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return HEADER + "\n".join(rows) + "\n"


HEADER = """# Faults of runs, and what is left afterwards

Made by the tests, with a tiny model in the folder `DIR` and a data set in `SET`. The words are the
last line of standard error. `UPDATE_FAULT_TABLE=1 pytest tests/faults` writes this file;
[data_faults.md](data_faults.md) has the faults of data sets.

| fault | command | words | exit status | afterwards |
|---|---|---|---|---|
"""
