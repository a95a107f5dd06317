"""Penn-Fudan from its download: the recorded split, masks as segments, incomplete downloads."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchformer_panoptic.data.segment_maps import read_segment_map
from helpers.commands import load_script
from helpers.pennfudan_download import write_download

command = load_script("datasets/prepare_pennfudan.py")
# The validation photographs of the results in docs/results.
VAL_FUDAN = (8, 11, 17, 41, 44, 59, 60, 64, 68, 69, 73, 74)
VAL_PENN = (6, 14, 16, 22, 26, 39, 45, 49, 58, 59, 69, 72, 77, 81, 84, 89, 90, 95)


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_download(tmp_path_factory.mktemp("download") / "PennFudanPed.zip")


@pytest.fixture(scope="module")
def prepared(download: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "set"
    assert command.main([str(download), "--output", str(output)]) == 0
    return output


def _error(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert command.main([*map(str, argv)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_split_is_that_of_the_recorded_results(prepared: Path) -> None:
    names = {s: {p.stem for p in (prepared / s).iterdir()} for s in ("train", "val", "test")}
    assert {split: len(found) for split, found in names.items()} == command.SPLIT_SIZES
    assert len(set.union(*names.values())) == 170
    expected = {f"FudanPed{n:05d}" for n in VAL_FUDAN} | {f"PennPed{n:05d}" for n in VAL_PENN}
    assert names["val"] == expected


def test_masks_become_segments(prepared: Path, download: Path) -> None:
    content = json.loads((prepared / "annotations" / "panoptic_val.json").read_text())
    assert [(c["name"], c["isthing"]) for c in content["categories"]] == [
        ("person", 1),
        ("background", 0),
    ]
    image, annotation = content["images"][0], content["annotations"][0]
    assert image == {"id": 8, "file_name": "FudanPed00008.png", "height": 24, "width": 32}
    assert [s["category_id"] for s in annotation["segments_info"]] == [2, 1, 1, 1]
    assert annotation["segments_info"][1]["area"] == 16 * 6
    assert annotation["segments_info"][1]["bbox"] == [8, 4, 6, 16]
    segment_map = read_segment_map(prepared / "panoptic_val" / annotation["file_name"])
    with zipfile.ZipFile(download) as archive:
        with archive.open("PennFudanPed/PedMasks/FudanPed00008_mask.png") as file:
            assert np.array_equal(segment_map - 1, np.array(Image.open(file)))
        photograph = archive.read("PennFudanPed/PNGImages/FudanPed00008.png")
    assert (prepared / "val" / "FudanPed00008.png").read_bytes() == photograph


def test_the_set_is_valid(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in command.SPLIT_SIZES:
        argv = ["--json", str(prepared / "annotations" / f"panoptic_{split}.json")]
        argv += ["--image-root", str(prepared / split)]
        argv += ["--panoptic-root", str(prepared / f"panoptic_{split}")]
        assert load_script("tools/check_dataset.py").main(argv) == 0, capsys.readouterr().out


@pytest.mark.parametrize("inside", ["", "PennFudanPed"])
def test_an_unpacked_folder_gives_the_same(
    tmp_path: Path, download: Path, prepared: Path, inside: str
) -> None:
    with zipfile.ZipFile(download) as archive:
        archive.extractall(tmp_path)
    assert command.main([str(tmp_path / inside), "--output", str(tmp_path / "set")]) == 0
    for path in prepared.rglob("*.*"):
        assert (tmp_path / "set" / path.relative_to(prepared)).read_bytes() == path.read_bytes()


def test_a_finished_set_is_left_alone(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(prepared, tmp_path / "set")
    assert command.main(["gone.zip", "--output", str(output)]) == 0
    assert "already complete" in capsys.readouterr().out
    next((output / "panoptic_test").iterdir()).unlink()
    assert "add --overwrite" in _error(capsys, "gone.zip", "--output", output)


def _rewritten(download: Path, path: Path, file: str, content: bytes | None) -> Path:
    """The download with one file replaced, or left out."""
    with zipfile.ZipFile(download) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            replaced = content if name == f"PennFudanPed/{file}" else old.read(name)
            if replaced is not None:
                new.writestr(name, replaced)
    return path


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("PNGImages/FudanPed00002.png", None, "lacks PNGImages/FudanPed00002.png: download"),
        ("PNGImages/FudanPed00002.png", b"no picture", "unknown image format"),
        ("PedMasks/FudanPed00002_mask.png", b"no picture", "FudanPed00002_mask.png cannot be read"),
    ],
)
def test_incomplete_downloads(
    tmp_path: Path,
    download: Path,
    file: str,
    content: bytes | None,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = _rewritten(download, tmp_path / "broken.zip", file, content)
    assert words in _error(capsys, source, "--output", tmp_path / "set")


@pytest.mark.parametrize(
    ("shape", "words"),
    [((24, 31), "(24, 31) pixels (height, width)"), ((24, 32, 3), "3 channels, not one")],
)
def test_masks_of_another_form(
    tmp_path: Path,
    download: Path,
    shape: tuple[int, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mask = tmp_path / "mask.png"
    Image.fromarray(np.zeros(shape, np.uint8)).save(mask)
    file = "PedMasks/FudanPed00002_mask.png"
    source = _rewritten(download, tmp_path / "broken.zip", file, mask.read_bytes())
    assert words in _error(capsys, source, "--output", tmp_path / "set")


def test_what_is_not_the_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "set"
    (tmp_path / "other").mkdir()
    (tmp_path / "page.zip").write_text("<html>")
    for name, words in (
        ("gone.zip", "no folder or readable zip file"),
        ("page.zip", "no folder or readable zip file"),
        ("other", "has no folder PennFudanPed/PNGImages"),
    ):
        assert words in _error(capsys, tmp_path / name, "--output", output)
        assert not output.exists()
