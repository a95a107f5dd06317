"""OUTPUT_DIR: one process that writes to it, and what a killed one has left in it."""

import atexit
import contextlib
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TextIO

from ..data.io import name_of_temporary, parse_object, read_json_lines
from ..errors import UserError
from ..visualization.curves import METRICS_NAME

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

LOCK = ".lock"
_REPLACED = ".replaced"

# The locks of this process by folder, with its id, since a forked process has a copy of this dict.
_held: dict[Path, tuple[int, TextIO]] = {}


def hold(folder: Path) -> None:
    """Keep other runs out of a folder until `release`, or until this process ends in any way.

    It is a POSIX lock on the file ``.lock``. Unlike one of flock it is not inherited by the workers
    of a data loader, which may outlive a killed process; the system lifts it with the process, so
    that the file that a killed run leaves means nothing.

    Raises:
        UserError: another process holds the folder.
        OSError: the lock file cannot be written.
    """
    folder = folder.resolve()
    if folder in _held and _held[folder][0] == os.getpid():
        return
    path = folder / LOCK
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            _lock(file, folder)
        except BaseException:
            file.close()
            raise
        if _is_at(path, file):
            break
        file.close()  # the holder has removed it on its way out
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[folder] = (os.getpid(), file)


def _lock(file: TextIO, folder: Path) -> None:
    if sys.platform == "win32":
        logger.warning(f"this system has no locks of files: let one run write to {folder}")
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(
            f"OUTPUT_DIR {folder} is in use by {file.read() or 'another process'}: wait until it "
            "ends, or name another OUTPUT_DIR"
        ) from None
    except OSError as error:
        logger.warning(
            f"the file system of {folder} has no locks ({error.strerror}): let one run write to it"
        )


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def release(folder: Path) -> None:
    """Let other runs into a folder and remove the lock file; without `hold`, nothing happens."""
    folder = folder.resolve()
    owner, file = _held.pop(folder, (0, None))
    if file is None:
        return
    if owner == os.getpid():
        (folder / LOCK).unlink(missing_ok=True)  # before the lock is lifted
    file.close()


@atexit.register
def _release_all() -> None:
    for folder in list(_held):
        release(folder)


def remove_temporaries(folder: Path, names: Sequence[str]) -> None:
    """Remove the temporary files that killed runs have left in a folder that is held.

    Args:
        folder: of a run; everything below its ``inference`` is searched, too.
        names: patterns of the files of a run, whose temporary files are removed.
    """
    for path in folder.glob(".*"):
        name = name_of_temporary(path.name)
        if name is not None and any(fnmatch(name, pattern) for pattern in names):
            path.unlink()
    for path in (folder / "inference").rglob(".*"):
        if name_of_temporary(path.name) is not None:
            path.unlink()


def set_aside(folder: Path, paths: Iterable[Path]) -> None:
    """Move files and folders of an earlier run to where `put_back` finds them."""
    (folder / _REPLACED).mkdir(exist_ok=True)
    for path in paths:
        path.rename(folder / _REPLACED / path.name)


def put_back(folder: Path) -> None:
    """Undo `set_aside`; without it, nothing happens."""
    replaced = folder / _REPLACED
    for path in replaced.iterdir() if replaced.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.rename(folder / path.name)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Delete the run that was set aside if the block succeeds, and put it back if it fails."""
    try:
        yield
    except BaseException:
        put_back(folder)
        raise
    shutil.rmtree(folder / _REPLACED, ignore_errors=True)


def logged_values(folder: Path, iteration: int) -> dict[str, Any]:
    """Return what ``metrics.json`` has of an iteration, {} for nothing.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / METRICS_NAME
    records = read_json_lines(path) if path.is_file() else []
    return {k: v for r in records if r.get("iteration") == iteration for k, v in r.items()}


def last_logged(folder: Path) -> int:
    """Return the last iteration in ``metrics.json``, -1 without one.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / METRICS_NAME
    records = read_json_lines(path) if path.is_file() else []
    return max((r["iteration"] for r in records if "iteration" in r), default=-1)


def cut_metrics(folder: Path, end: int) -> None:
    """Cut off the last lines of ``metrics.json`` from an iteration on, and any half of a line.

    The file is only shortened, so that nothing can be lost when the process is killed here.

    Args:
        folder: of the run.
        end: the first iteration that is removed; it and later ones are repeated.

    Raises:
        UserError: the file cannot be changed.
    """
    path = folder / METRICS_NAME
    position = kept = 0
    try:
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            position += len(line)
            record = parse_object(line) if line.endswith(b"\n") else None
            if record is not None and record.get("iteration", end) < end:
                kept = position
        if kept < position:
            os.truncate(path, kept)
    except OSError as error:
        raise UserError(f"{path} cannot be shortened: {error.strerror}") from error
