"""The handwritten digits: fixed evaluation half, nested training sets, overwriting."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.commands import load_script

pytest.importorskip("sklearn", reason="the extra [digits]")
digits = load_script("datasets/prepare_digits.py")


def prepare(output: Path, *more: object) -> int:
    return digits.main(["--output", str(output), *map(str, more)])


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.png")}


def test_training_follows_the_arguments_and_evaluation_does_not(tmp_path: Path) -> None:
    for folder, labels, seed in (("a", 5, 0), ("b", 20, 0), ("c", 5, 1)):
        assert prepare(tmp_path / folder, "--labels-per-class", labels, "--seed", seed) == 0
    a, b, c = (names(tmp_path / folder / "train") for folder in "abc")
    assert set(Counter(name.split("/")[0] for name in a).values()) == {5}
    assert set(Counter(name.split("/")[0] for name in b).values()) == {20}
    assert a < b
    assert a != c
    held_out = [names(tmp_path / folder / "val") for folder in "abc"]
    assert held_out[0] == held_out[1] == held_out[2]
    assert len(held_out[0]) == 899
    assert not {name.split("/")[1] for name in b} & {name.split("/")[1] for name in held_out[0]}


def test_files_are_scikit_learns_pictures(tmp_path: Path) -> None:
    assert prepare(tmp_path / "set", "--labels-per-class", 86) == 0
    from sklearn.datasets import load_digits

    source = load_digits()
    paths = sorted((tmp_path / "set").rglob("*.png"))
    assert len(paths) == 860 + 899
    for path in paths[::50]:
        pixels = np.array(Image.open(path))
        place = int(path.stem)
        assert pixels.dtype == np.uint8
        assert np.abs(pixels / 255 * 16 - source.images[place]).max() < 0.05
        assert path.parent.name == str(source.target[place])
        assert path.parent.parent.name == ("train" if place < 898 else "val")


def test_a_finished_set_is_left_alone_and_another_needs_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    assert prepare(folder, "--labels-per-class", 2) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare(folder, "--labels-per-class", 2) == 0
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare(folder, "--labels-per-class", 3) == 2
    assert "labels_per_class 2 (requested: 3); add --overwrite" in capsys.readouterr().err
    next((folder / "val").rglob("*.png")).unlink()
    assert prepare(folder, "--labels-per-class", 2) == 2
    assert "incomplete set; add --overwrite" in capsys.readouterr().err
    assert prepare(folder, "--labels-per-class", 3, "--overwrite") == 0
    assert len(names(folder / "train")) == 30
    assert len(names(folder / "val")) == 899


def test_a_foreign_folder_is_never_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "holiday.png").write_bytes(b"precious")
    (tmp_path / "manifest.json").write_text(json.dumps({"generator": "shapes_panoptic"}))
    assert prepare(tmp_path, "--overwrite") == 2
    assert "holds other files" in capsys.readouterr().err
    assert (tmp_path / "train" / "holiday.png").read_bytes() == b"precious"


@pytest.mark.parametrize(("option", "value"), [("--labels-per-class", 87), ("--seed", -1)])
def test_numbers_out_of_range_are_refused(tmp_path: Path, option: str, value: int) -> None:
    with pytest.raises(SystemExit) as error:
        prepare(tmp_path / "set", f"{option}={value}")
    assert error.value.code == 2
    assert not (tmp_path / "set").exists()


def test_no_scikit_learn_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert prepare(tmp_path / "set") == 2
    assert "error: the digits come with scikit-learn: pip install" in capsys.readouterr().err
