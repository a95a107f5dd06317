"""The log of a run: lines that cannot be written, and names with escape sequences."""

import io
import logging
import sys
from pathlib import Path

import pytest

from batchformer_panoptic.engine.writers import start_logging
from batchformer_panoptic.errors import PrintableStream


class Broken(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, _text: str) -> int:
        raise self.error


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The logger of the package, which writes to a console and to a file."""
    console = io.StringIO()
    monkeypatch.setattr(sys, "stdout", PrintableStream(console))
    log = logging.getLogger("batchformer_panoptic")
    before, propagate = log.handlers[:], log.propagate
    start_logging(str(tmp_path), with_tables=True)
    new = [handler for handler in log.handlers if handler not in before]
    yield log, console, new, tmp_path / "log.txt"
    log.handlers, log.propagate = before, propagate


def test_escape_sequences_of_names_are_text(log) -> None:
    logger, console, _, file = log
    logger.info("class %s", "\x1b[31mred\nblue")
    assert "class \\x1b[31mred\nblue" in console.getvalue()
    assert "class \\x1b[31mred\nblue" in file.read_text()


def test_a_full_disk_loses_lines_of_the_log_only(log, capfd) -> None:
    logger, console, handlers, _ = log
    handlers[-1].setStream(Broken(OSError(28, "No space left on device")))
    logger.info("kept")
    assert "kept" in console.getvalue()
    assert capfd.readouterr().err == ""


def test_a_console_that_has_gone_ends_the_run(log) -> None:
    logger, _, handlers, _ = log
    handlers[0].setStream(Broken(BrokenPipeError(32, "Broken pipe")))
    with pytest.raises(BrokenPipeError):
        logger.info("lost")


def test_a_mistake_in_a_message_is_still_reported(log, capfd) -> None:
    logger, _, handlers, _ = log
    handlers[-1].setStream(Broken(RuntimeError("a fault")))  # type: ignore[arg-type]
    logger.info("a line")
    assert "a fault" in capfd.readouterr().err
