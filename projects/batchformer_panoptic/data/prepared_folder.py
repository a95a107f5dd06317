"""Parts shared by the commands that prepare data sets: their output folder and their arguments."""

import argparse
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .io import write_json

MANIFEST = "manifest.json"


class PreparedFolder:
    """A folder that one command fills.

    A manifest in the folder records the settings of the command. It is marked complete last, so
    that an unfinished set, or one made with other settings, is not mistaken for the requested one.
    Folders without a manifest of the command are never changed.

    Args:
        path: the folder; it need not exist.
        settings: everything that determines the content; ``generator`` names the command.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = dict(settings)

    def is_done(self, is_intact: Callable[[], bool], *, overwrite: bool) -> bool:
        """Return whether the folder already holds the requested set.

        Args:
            is_intact: called for a complete set; returns whether all its files still exist.
            overwrite: replace a set of this command, even a complete one.

        Raises:
            UserError: the folder holds other files, or an unfinished or different set and
                ``overwrite`` is False.
        """
        found = self._read_manifest()
        if overwrite or found is None:
            return False
        if found == {**self._settings, "complete": True} and is_intact():
            return True
        raise UserError(
            f"{self._path} holds {self._describe(found)}; add --overwrite to replace it"
        )

    @contextlib.contextmanager
    def filling(self, folders: Sequence[str]) -> Iterator[None]:
        """Remove the old content before the block and mark the folder complete after it.

        Args:
            folders: names of all subfolders that the command writes.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        write_json(self._path / MANIFEST, {**self._settings, "complete": False})
        for folder in folders:
            if (self._path / folder).exists():
                shutil.rmtree(self._path / folder)
        yield
        write_json(self._path / MANIFEST, {**self._settings, "complete": True})

    def _read_manifest(self) -> dict[str, Any] | None:
        """Return the manifest of this command, or None for a new or empty folder."""
        if not self._path.exists():
            return None
        if not self._path.is_dir():
            raise UserError(f"--output {self._path} is a file; name a new folder")
        if not any(self._path.iterdir()):
            return None
        try:
            manifest = json.loads((self._path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            manifest = None
        if (
            not isinstance(manifest, dict)
            or manifest.get("generator") != self._settings["generator"]
        ):
            raise UserError(f"--output {self._path} holds other files; name a new or empty folder")
        return manifest

    def _describe(self, found: Mapping[str, Any]) -> str:
        changed = [
            f"{key} {found.get(key)} (requested: {value})"
            for key, value in self._settings.items()
            if found.get(key) != value
        ]
        return "a set with " + ", ".join(changed) if changed else "an incomplete set"


def integer_between(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type for integers from ``low`` to ``high``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} to {high}")
        return int(text)

    return parse
