"""JSON files, writing as a whole or not at all, and the folders that a command fills."""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager

from ..errors import UserError, one_line, refusal_of

# ---------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one of them on each line, such as ``metrics.json``.

    A line that is not an object is left out: a process that is killed may leave half of one.

    Raises:
        UserError: the file is missing or unreadable.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    return [found for found in map(parse_object, lines) if found is not None]


def parse_object(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None if it has none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


# Parsed annotations take several times the size of their file and stay for the whole run, so that
# only files up to this many bytes together are kept. COCO's panoptic_val2017.json has 12 MB.
_CACHED_BYTES = 64 * 2**20

# Absolute path -> modification time in ns, size in bytes, content; least recently used first.
_cached: OrderedDict[str, tuple[int, int, dict[str, Any]]] = OrderedDict()


def read_coco_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a COCO JSON file.

    Registration, dataset dicts and evaluators read the same file. It is parsed again only when
    its modification time or size has changed, or when it is too large to keep.

    Args:
        path: a local path or a URI that Detectron2's PathManager supports.

    Returns:
        The parsed object. It is shared between callers and must not be changed.

    Raises:
        UserError: the file is missing or unreadable, or does not hold a JSON object.
    """
    try:
        local_path = os.path.abspath(PathManager.get_local_path(str(path)))
        status = os.stat(local_path)
        state = (status.st_mtime_ns, status.st_size)
        if local_path in _cached and _cached[local_path][:2] == state:
            _cached.move_to_end(local_path)
            return _cached[local_path][2]
        # "utf-8-sig" accepts a byte-order mark, which editors and PowerShell write.
        with open(local_path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except UnicodeDecodeError:
        raise UserError(f"{path} is not in UTF-8: save it in that encoding") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not COCO's JSON object")
    _cached.pop(local_path, None)
    if status.st_size <= _CACHED_BYTES:
        _cached[local_path] = (*state, content)
        while sum(size for _, size, _ in _cached.values()) > _CACHED_BYTES:
            _cached.popitem(last=False)
    return content


# ---------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Convert a refusal of the system inside the block (disk full, no rights) to `UserError`.

    Args:
        path: the file or folder that the block writes; named in the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        raise UserError(f"cannot write {path}: {refusal.strerror}") from error


def write_atomically(path: str, save: Callable[[str], object]) -> None:
    """Write a file as a whole or not at all.

    Args:
        path: the target. Its folder is created; of a symbolic link, the file it points to is
            replaced.
        save: writes the temporary file whose name it is given: in the target's folder, with the
            target's ending. When it raises, the target is unchanged and nothing is left behind.

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
        with writing(path):
            os.makedirs(folder, exist_ok=True)
            save(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())  # without it, a power failure could leave an empty file
            os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.remove(temporary)


# A temporary file of `write_atomically`: a dot, the stem, 32 hexadecimal digits and the ending.
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}(\.[^.]+)?")


def name_of_temporary(name: str) -> str | None:
    """Return the name of the file that `write_atomically` was writing, or None.

    Args:
        name: of a file that may be one of its temporary files, which only a killed process leaves.
    """
    found = _TEMPORARY.fullmatch(name)
    return None if found is None else found[1] + (found[2] or "")


def write_json(path: str | Path, content: Any, *, indent: int | None = None) -> None:
    """Write a JSON file as a whole or not at all; missing folders are created.

    Raises:
        ValueError: the content has a NaN or an infinity, which JSON cannot hold.
        UserError: the file cannot be written.
    """
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8 as a whole or not at all; missing folders are created.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(str(path), lambda name: _write_utf8(name, text))


def _write_utf8(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------
# Folders that a command fills
# ---------------------------------------------------------------------------

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
            raise UserError(f"{self._path} is a file; name a new folder")
        if not any(self._path.iterdir()):
            return None
        try:
            manifest = read_json(self._path / MANIFEST)
        except UserError:
            manifest = None
        if (
            not isinstance(manifest, dict)
            or manifest.get("generator") != self._settings["generator"]
        ):
            raise UserError(f"{self._path} holds other files; name a new or empty folder")
        return manifest

    def _describe(self, found: Mapping[str, Any]) -> str:
        changed = [
            f"{key} {found.get(key)} (requested: {value})"
            for key, value in self._settings.items()
            if found.get(key) != value
        ]
        return "a set with " + ", ".join(changed) if changed else "an incomplete set"
