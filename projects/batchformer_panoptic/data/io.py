"""What the commands that prepare data sets share: folders that they fill, and their arguments.

A manifest in the folder holds the settings it was made with and is marked complete at the very end,
so that neither half a set nor another one is taken for the one that was asked for, and nobody
else's files are touched.

Image files in and out.
"""

import argparse
import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.data import detection_utils
from PIL import Image

from ..errors import UserError, one_line

ImageArray = npt.NDArray[np.uint8]


def read_image(path: str | Path) -> ImageArray:
    """Read an image as evaluation does: decoded by Pillow, turned as its EXIF data says.

    Returns:
        (H, W, 3) uint8, BGR.

    Raises:
        UserError: naming the file, if it is missing or no image.
    """
    try:
        image: ImageArray = detection_utils.read_image(str(path), format="BGR")
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist") from None
    # Pillow reports damaged files with all of these.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = one_line(error)
        raise UserError(f"image {path} cannot be read: {reason}") from error
    return np.ascontiguousarray(image)


def write_image(path: str | Path, image_rgb: ImageArray) -> None:
    """Write (H, W, 3) uint8 RGB; missing folders are created.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        written = cv2.imwrite(str(path), image_rgb[:, :, ::-1])
    except (OSError, cv2.error) as error:
        reason = one_line(error)
        raise UserError(f"{path} cannot be written: {reason}") from error
    if not written:
        raise UserError(f"{path} cannot be written: is its folder writable?")


MANIFEST = "manifest.json"


class PreparedFolder:
    """A folder that one command fills.

    Args:
        path: the folder, there or not.
        settings: what its content follows from; ``generator`` names the command.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = dict(settings)

    def is_done(self, is_intact: Callable[[], bool], *, overwrite: bool) -> bool:
        """Whether the very set that is asked for is there; False: it is to be made.

        Args:
            is_intact: asked of a set that is marked complete: whether no file was lost since.
            overwrite: make it in any case, in the place of whatever this command wrote.

        Raises:
            UserError: the folder holds something else, or an unfinished or different set and
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
        """Remove ``folders``, which are what this command writes; mark complete at the end."""
        self._path.mkdir(parents=True, exist_ok=True)
        write_json(self._path / MANIFEST, {**self._settings, "complete": False})
        for folder in folders:
            if (self._path / folder).exists():
                shutil.rmtree(self._path / folder)
        yield
        write_json(self._path / MANIFEST, {**self._settings, "complete": True})

    def _read_manifest(self) -> dict[str, Any] | None:
        """What this command noted, or None for a new or empty folder."""
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
            f"{key} {found.get(key)} (asked: {value})"
            for key, value in self._settings.items()
            if found.get(key) != value
        ]
        return "a set with " + ", ".join(changed) if changed else "an incomplete set"


def write_atomically(path: str, save: Callable[[str], None]) -> None:
    """Write a file as a whole or not at all.

    Args:
        path: the target, whose folder is made; a symbolic link keeps pointing to what is replaced.
        save: called with the name of a temporary file, with the target's ending, in the target's
            folder; writes it. When it raises, the target is as before and nothing is left behind.

    Raises:
        UserError: the target is a folder, or the system refuses.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    if os.path.isdir(target):
        raise UserError(f"cannot write {path}: it is a folder")
    # tempfile would make the file unreadable for other users. `save` may need the ending.
    stem, ending = os.path.splitext(name)
    temporary = os.path.join(folder, f".{stem}.{uuid.uuid4().hex}{ending}")
    try:
        os.makedirs(folder, exist_ok=True)
        save(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # without it, a power failure could leave an empty file
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.remove(temporary)


def write_json(path: str | Path, content: Any, *, indent: int | None = None) -> None:
    """Write a JSON file as a whole or not at all; missing folders are created.

    Raises:
        ValueError: the content has a NaN or an infinity, which JSON cannot hold.
        UserError: the file cannot be written.
    """
    text = json.dumps(content, indent=indent, allow_nan=False) + "\n"
    write_atomically(str(path), lambda name: _write_text(name, text))


def _write_text(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")


def integer_between(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number from ``low`` to ``high``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse
