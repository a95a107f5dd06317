"""Checkpoints are written atomically."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from batchformer_panoptic.data.io import write_atomically
from batchformer_panoptic.errors import UserError


def _half_way(error: BaseException) -> Callable[[str], None]:
    def save(path: str) -> None:
        Path(path).write_bytes(b"half")
        raise error

    return save


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (RuntimeError("disk"), RuntimeError),
        (OSError(28, "No space left on device"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("before", [b"precious", None])
def test_failed_write_leaves_the_target(
    tmp_path: Path, raised: BaseException, seen: type[BaseException], before: bytes | None
) -> None:
    target = tmp_path / "w.pth"
    if before is not None:
        target.write_bytes(before)
    with pytest.raises(seen):
        write_atomically(str(target), _half_way(raised))
    assert (target.read_bytes() if target.exists() else None) == before
    assert [path.name for path in tmp_path.iterdir()] == ([] if before is None else ["w.pth"])


def test_written_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "w.safetensors"
    target.write_bytes(b"old")
    seen = []

    def save(path: str) -> None:
        seen.append(Path(path))
        Path(path).write_bytes(b"new")
        assert target.read_bytes() == b"old"

    write_atomically(str(target), save)
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    assert (seen[0].parent, seen[0].suffix) == (tmp_path, ".safetensors")
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.pth").symlink_to(tmp_path / "real.pth")
    write_atomically(str(tmp_path / "link.pth"), lambda path: _write(path, b"new"))
    assert (tmp_path / "link.pth").is_symlink()
    assert (tmp_path / "real.pth").read_bytes() == b"new"


def _write(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)


def test_the_folder_is_made(tmp_path: Path) -> None:
    write_atomically(str(tmp_path / "new" / "folder" / "w.pth"), lambda path: _write(path, b"new"))
    assert (tmp_path / "new" / "folder" / "w.pth").read_bytes() == b"new"


def test_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    for target, words in (("", "it is a folder"), ("file/w.pth", "cannot write .*file")):
        with pytest.raises(UserError, match=words):
            write_atomically(str(tmp_path / target), lambda path: _write(path, b"new"))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
