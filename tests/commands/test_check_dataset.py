"""tools/check_dataset.py: configs, reports and corrected copies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from batchformer_panoptic.data.check import check_files
from batchformer_panoptic.data.validation import Depth
from helpers import instance_files
from helpers.commands import load_script
from helpers.data_faults import (
    FAULTS,
    WARNINGS,
    append,
    change,
    make_segment_map,
    only_crowds,
    repeat,
    set_value,
    sound_content,
    write_sound_set,
)

check_dataset = load_script("tools/check_dataset.py")
Lines = pytest.CaptureFixture[str]


def row(root: Path, name: str) -> list[str]:
    return [name, str(root / "images"), str(root / "panoptic"), str(root / "set.json")]


def write_config(folder: Path, **datasets: Any) -> list[str]:
    (folder / "config.yaml").write_text(yaml.safe_dump({"DATASETS": datasets}))
    return ["--config-file", str(folder / "config.yaml")]


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    """Of two sound sets, ``train`` and ``val``."""
    rows = [
        row(write_sound_set(tmp_path / name, seed), f"{name}_{tmp_path.name}")
        for seed, name in enumerate(("train", "val"))
    ]
    return write_config(tmp_path, CUSTOM_PANOPTIC=rows, TRAIN=[rows[0][0]], TEST=[rows[1][0]])


def test_a_config_has_all_its_sets_checked(
    config: list[str], tmp_path: Path, capsys: Lines
) -> None:
    assert check_dataset.main(config) == 0
    out = capsys.readouterr().out
    headings = [line for line in out.splitlines() if line.startswith("==")]
    names = [f"train_{tmp_path.name}", f"val_{tmp_path.name}", "all data sets"]
    assert headings == [f"== {name} ==" for name in names]
    assert out.endswith("ok: 0 errors, 0 warnings, 0 notes\n")
    set_value("annotations.0.segments_info.0.area", 8)(tmp_path / "val")
    (tmp_path / "val/images/12.jpg").write_bytes((tmp_path / "train/images/11.jpg").read_bytes())
    assert check_dataset.main(config) == 1
    out = capsys.readouterr().out
    assert "  11.png, segment 70000: area is 8, but the PNG has 9 pixels" in out
    assert f"1 images of {names[0]} are in {names[1]}, too" in out


def test_the_limits_of_a_model_are_named(config: list[str], tmp_path: Path, capsys: Lines) -> None:
    for split in ("train", "val"):
        set_value("categories.1.isthing", 1)(tmp_path / split)
    model = ["MODEL.META_ARCHITECTURE", "PanopticDETR", "MODEL.DETR.NUM_OBJECT_QUERIES", "1"]
    assert check_dataset.main([*config, "--opts", *model, "TEST.DETECTIONS_PER_IMAGE", "1"]) == 0
    out = capsys.readouterr().out
    assert "warning: more objects than queries (2)" in out
    assert "warning: more objects than detections (1)" in out
    assert "AP then counts at most 50.0 % of the objects of the set as found" in out


def test_a_training_set_without_targets_is_an_error(
    config: list[str], tmp_path: Path, capsys: Lines
) -> None:
    change(only_crowds)(tmp_path / "train")
    assert check_dataset.main(config) == 1
    assert "has a segment or box that is not a crowd" in capsys.readouterr().out


def test_sets_with_other_classes_do_not_fit(
    config: list[str], tmp_path: Path, capsys: Lines
) -> None:
    set_value("categories.1.name", "floor")(tmp_path / "val")
    assert check_dataset.main(config) == 1
    assert (
        "do not have the same classes: class 1 is 'wall' against 'floor'" in capsys.readouterr().out
    )


def test_boxes_and_image_folders_are_checked(tmp_path: Path, capsys: Lines) -> None:
    files = instance_files.write_instances(tmp_path / "boxes")
    (tmp_path / "folder/cat").mkdir(parents=True)
    Image.new("RGB", (5, 4)).save(tmp_path / "folder/cat/1.png")
    name = f"boxes_{tmp_path.name}"
    boxes = write_config(tmp_path, CUSTOM_INSTANCES=[files.row(name)], TRAIN=[name])
    assert check_dataset.main(boxes) == 0
    assert (
        "3 images, 6 annotations, 6 boxes, 2 thing and 0 stuff classes" in capsys.readouterr().out
    )
    (files.image_root / "0.png").write_text("no image")
    assert check_dataset.main(boxes) == 1
    assert "unknown image format" in capsys.readouterr().out
    folder_name = f"folder_{tmp_path.name}"
    folders = [[folder_name, str(tmp_path / "folder")]]
    config = write_config(tmp_path, CUSTOM_IMAGE_FOLDERS=folders, TRAIN=[folder_name])
    classifier = ["--opts", "MODEL.META_ARCHITECTURE", "ImageClassifier"]
    assert check_dataset.main([*config, *classifier]) == 0
    (tmp_path / "folder/cat/2.png").write_text("no image")
    assert check_dataset.main([*config, *classifier]) == 1
    bounded = Depth(max_pixels=1_000_000)  # every second image, if one has a million pixels
    assert check_files({"image_root": tmp_path / "folder"}, bounded).problems == []
    (tmp_path / "folder/dog").mkdir()
    assert check_dataset.main([*config, *classifier]) == 1
    assert "the class folder 'dog' has no images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --config-file, or --json"),
        (["--json", "a.json", "--image-root", "a"], "give --config-file, or --json"),
        (["--config-file", "a.yaml", "--fix", "b"], "--config-file goes with none of"),
    ],
)
def test_arguments_that_do_not_fit(arguments: list[str], words: str, capsys: Lines) -> None:
    with pytest.raises(SystemExit) as caught:
        check_dataset.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_a_config_without_known_sets_is_a_mistake(tmp_path: Path, capsys: Lines) -> None:
    assert check_dataset.main(write_config(tmp_path, TRAIN=[])) == 2
    assert check_dataset.main(write_config(tmp_path, TRAIN=["absent_set"])) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "names no data set" in errors[0]
    assert "unknown data set 'absent_set'" in errors[-1]


def paths(root: Path) -> list[str]:
    folders = ["--image-root", str(root / "images"), "--panoptic-root", str(root / "panoptic")]
    return ["--json", str(root / "set.json"), *folders]


def test_the_report_holds_every_problem(tmp_path: Path) -> None:
    root = write_sound_set(tmp_path / "set")
    set_value("annotations.1.segments_info.1.area", 0)(root)
    report = tmp_path / "reports/one.json"
    options = ["--max-problems", "1", "--json-out", str(report)]
    assert check_dataset.main([*paths(root), *options]) == 1
    content = json.loads(report.read_text())
    (problem,) = content["problems"]
    assert (content["ok"], content["counts"]) == (False, {"error": 1})
    assert problem.pop("message").startswith("area is 0, but the PNG has 29 pixels")
    expected = {"kind": "wrong area", "image": "12.png", "segment": 300, "severity": "error"}
    assert problem == {"data_set": str(root / "set.json"), **expected}


FIXABLE = (
    "image ids of two types",
    "a wrong area",
    "an area as text",
    "an area is null",
    "no `area`",
    "a wrong box",
    "no `bbox`",
    "no `iscrowd`",
    "`iscrowd` as text",
    "a byte-order mark",
    "an RGBA PNG",
    "a segment id as text",
    "a `category_id` as text",
    "a category id as text",
    "an `image_id` as text",
    "a height as text",
    "red and blue swapped",
    "a palette PNG",
    "a grey PNG",
    "grey saved as RGB",
    "grey with alpha",
)
ALL = {fault.done: fault for fault in (*FAULTS, *WARNINGS)}


@pytest.mark.parametrize("done", FIXABLE)
def test_a_corrected_copy_is_sound(tmp_path: Path, done: str, capsys: Lines) -> None:
    root = write_sound_set(tmp_path / "set")
    ALL[done].spoil(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    fixed = tmp_path / "fixed"
    assert check_dataset.main([*paths(root), "--fix", str(fixed)]) == 0
    assert capsys.readouterr().out.endswith("ok: 0 errors, 0 warnings, 0 notes\n")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    written = json.loads((fixed / "panoptic.json").read_text())
    expected = sound_content()
    for given, new in zip(expected["annotations"], written["annotations"], strict=True):
        keep = {segment["area"]: segment for segment in given["segments_info"]}
        for segment in new["segments_info"]:
            assert segment | {"id": 0} == keep[segment["area"]] | {"id": 0}
    assert written["images"] == expected["images"]
    pixels = np.asarray(Image.open(fixed / "panoptic/12.png")).astype(int)
    assert pixels.dtype == int
    np.testing.assert_array_equal(pixels @ [1, 256, 65536], make_segment_map())


def test_a_copy_keeps_faults_that_have_no_rule(tmp_path: Path, capsys: Lines) -> None:
    root = write_sound_set(tmp_path / "set")
    repeat("annotations.0.segments_info")(root)
    append("annotations.1.segments_info", {"id": 77, "category_id": 3, "area": 1})(root)
    change(lambda c: c["annotations"][1]["segments_info"][0].update(area="x"))(root)
    ALL["a JPEG as PNG"].spoil(root)
    assert check_dataset.main([*paths(root), "--fix", str(tmp_path / "fixed")]) == 1
    out = capsys.readouterr().out
    assert "not a PNG but a JPEG" in out
    assert "2 entries of segments_info have the id 70000" in out
    assert "segment 77: listed in segments_info, but no pixel has this id" in out
    assert "area is 'x'" not in out  # taken from the pixels


@pytest.mark.parametrize("target", ["set", "set/set.json"])
def test_a_copy_is_not_written_over_files(tmp_path: Path, target: str, capsys: Lines) -> None:
    root = write_sound_set(tmp_path / "set")
    assert check_dataset.main([*paths(root), "--fix", str(tmp_path / target)]) == 2
    assert "holds other files; name a new or empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("annotations.0.area", float("nan"), "the annotations have NaN or an infinity"),
        ("images.0.height", float("inf"), "the annotations have NaN or an infinity"),
        ("annotations.0.file_name", "../images/11.jpg", "'../images/11.jpg' leads out of"),
        ("annotations.0.file_name", "{root}/panoptic/11.png", "leads out of the folder"),
    ],
)
def test_a_copy_stays_in_its_folder_and_is_json(
    tmp_path: Path, path: str, value: Any, words: str, capsys: Lines
) -> None:
    root = write_sound_set(tmp_path / "set")
    set_value(path, value.format(root=root) if isinstance(value, str) else value)(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert check_dataset.main([*paths(root), "--fix", str(tmp_path / "fixed")]) == 2
    assert words in capsys.readouterr().err
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "fixed" / "panoptic.json").exists()
