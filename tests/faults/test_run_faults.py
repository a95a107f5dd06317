"""Every fault of a run: its words, its exit status, the files that are left, and the document.

`UPDATE_FAULT_TABLE=1 pytest tests/faults` writes docs/run_faults.md.
"""

import os
from pathlib import Path

import pytest

from faults import batch, disk, formats, numerics, resuming, settings, signals
from helpers.run_faults import DOCUMENT, Outcome, Place, RunFault, outcome_of, render
from helpers.tiny_dataset import TinyPanopticDataset

FAULTS = [
    *batch.FAULTS,
    *disk.FAULTS,
    *formats.FAULTS,
    *numerics.FAULTS,
    *resuming.FAULTS,
    *settings.FAULTS,
    *signals.FAULTS,
]
OUTCOMES: dict[str, Outcome] = {}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.fault)
def test_fault_ends_with_its_status_and_one_line(
    fault: RunFault,
    tmp_path: Path,
    tiny_panoptic_dataset: TinyPanopticDataset,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = Place(tmp_path, tiny_panoptic_dataset, monkeypatch, capfd)
    fault.act(place)
    assert place.status == fault.status, place.words
    assert place.words or not fault.status
    OUTCOMES[fault.fault] = outcome_of(place)


def test_the_document_is_current() -> None:
    if len(OUTCOMES) != len(FAULTS):
        pytest.skip("needs the outcomes of all tests of this file")
    text = render(FAULTS, OUTCOMES)
    if os.environ.get("UPDATE_FAULT_TABLE"):
        DOCUMENT.write_text(text, encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == text
