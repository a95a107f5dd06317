"""Finds the checkpoint that a run continues from, also when ``last_checkpoint`` does not help."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, one_line
from .files import read_weights

LAST_CHECKPOINT = "last_checkpoint"
FINAL = "model_final.pth"
# The iterations of these are not in their names.
_BEST, _NONFINITE = "model_best.pth", "model_nonfinite.pth"
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")

logger = logging.getLogger(__name__)


class FoundCheckpoint(NamedTuple):
    """A readable checkpoint with its content, which is that of `read_weights`."""

    path: Path
    content: dict[str, Any]

    @property
    def iteration(self) -> int:
        """The last iteration before it was saved, -1 if it is unknown."""
        number = self.content.get("iteration")
        return number if isinstance(number, int) else -1


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the files ``model_<iteration>.pth`` of a folder by iteration, oldest first."""
    names = ((_NUMBERED.fullmatch(path.name), path) for path in folder.glob("model_*.pth"))
    return dict(sorted((int(match[1]), path) for match, path in names if match))


def find_checkpoint(folder: Path, *, with_trainer: bool) -> FoundCheckpoint | None:
    """Return the checkpoint that ``last_checkpoint`` names, or else the newest whole one.

    A checkpoint is whole if it can be read, and has the state of the trainer where that is needed.
    ``model_nonfinite.pth`` is taken only if ``last_checkpoint`` names it.

    Args:
        folder: the ``OUTPUT_DIR`` of the run.
        with_trainer: whether training is to be resumed.

    Returns:
        None: the folder has neither checkpoints nor ``last_checkpoint``.

    Raises:
        UserError: there are checkpoints, and none of them is whole.
    """
    problems: list[str] = []
    found = None
    named = _named(folder, problems)
    if named is not None:
        found = _read(named, with_trainer, problems)
    if found is None:
        found = max(
            _whole(folder, with_trainer, problems), key=lambda one: one.iteration, default=None
        )
        if found is not None:
            logger.warning(
                f"{problems[0]}: continuing from {found.path}, the newest whole checkpoint"
            )
    if found is None and problems:
        raise UserError(
            f"no checkpoint to continue from: {problems[0]}; restore a checkpoint in {folder}, or "
            "name another OUTPUT_DIR"
        )
    newest = max(numbered_checkpoints(folder), default=-1)
    if found is not None and found.iteration < newest:
        logger.warning(f"{folder} has newer checkpoints than {found.path}, up to {newest}")
    return found


def _named(folder: Path, problems: list[str]) -> Path | None:
    """Return the file that ``last_checkpoint`` names; add a reason to the problems if it fails."""
    last = folder / LAST_CHECKPOINT
    try:
        name = last.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        others = (folder / name for name in (FINAL, _BEST, _NONFINITE))
        if numbered_checkpoints(folder) or any(path.is_file() for path in others):
            problems.append(f"{last} is missing")
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{last} cannot be read: {one_line(error)}")
        return None
    if not name or not (folder / name).is_file():
        problems.append(f"{last} names {name!r}, which does not exist")
        return None
    return folder / name


def _read(path: Path, with_trainer: bool, problems: list[str]) -> FoundCheckpoint | None:
    try:
        found = FoundCheckpoint(path, read_weights(str(path)))
    except UserError as error:
        problems.append(str(error))
        return None
    if with_trainer and (found.iteration < 0 or "trainer" not in found.content):
        problems.append(f"{path} has only weights, not the state of a training")
        return None
    return found


def _whole(folder: Path, with_trainer: bool, problems: list[str]) -> Iterator[FoundCheckpoint]:
    """Yield the newest whole numbered checkpoint, and those of other names that are whole."""
    numbered = reversed(numbered_checkpoints(folder).values())
    for paths in ([folder / FINAL], numbered, [folder / _BEST]):
        for path in paths:
            found = _read(path, with_trainer, problems) if path.is_file() else None
            if found is not None:
                yield found
                break
