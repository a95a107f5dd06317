"""The built-in data set: reproducible, consistent, and not solvable by color only."""

import json
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest
from panopticapi.utils import rgb2id
from PIL import Image

from batchformer_panoptic.data.io import read_coco_json
from batchformer_panoptic.data.validation import check_panoptic_content
from helpers.commands import load_script

shapes = load_script("datasets/prepare_shapes_panoptic.py")


def generate(output: Path, train: int = 3, val: int = 2, seed: int = 5, *more: str) -> int:
    numbers = ["--num-train", str(train), "--num-val", str(val), "--seed", str(seed)]
    return shapes.main(["--output", str(output), *numbers, *more])


def read_files(root: Path) -> dict[str, bytes]:
    paths = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert generate(tmp_path / name) == 0
    files = read_files(tmp_path / "one")
    assert files == read_files(tmp_path / "two")
    assert len(files) == 2 * (3 + 2) + 2 + 1  # pictures and segments, annotations, manifest
    assert len({files[name] for name in files if name.startswith(("train", "val"))}) == 5


def test_a_larger_set_only_appends(tmp_path: Path) -> None:
    generate(tmp_path / "small", train=2, val=1)
    generate(tmp_path / "large", train=3, val=2)
    small, large = read_files(tmp_path / "small"), read_files(tmp_path / "large")
    pngs = {name: data for name, data in small.items() if name.endswith(".png")}
    assert len(pngs) == 6
    assert pngs == {name: large[name] for name in pngs}
    for split, count in (("train", 2), ("val", 1)):
        name = f"annotations/panoptic_{split}.json"
        fewer, more = json.loads(small[name]), json.loads(large[name])
        assert fewer["annotations"] == more["annotations"][:count]
        assert fewer["images"] == more["images"][:count]


def test_seeds_and_splits_give_other_pictures() -> None:
    keys = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1), (1, "val", 1)]
    pictures = [shapes.make_example(*key, 64)[0] for key in keys]
    for first in range(len(keys)):
        for second in range(first):
            assert (pictures[first] != pictures[second]).mean() > 0.5


def test_the_written_set_passes_the_validator(tmp_path: Path) -> None:
    generate(tmp_path, 6, 2, 0, "--size", "72")
    for split in ("train", "val"):
        path = tmp_path / f"annotations/panoptic_{split}.json"
        problems = check_panoptic_content(
            read_coco_json(path), tmp_path / split, tmp_path / f"panoptic_{split}"
        )
        assert problems == []


def test_records_are_complete_and_agree_with_the_pngs(tmp_path: Path) -> None:
    generate(tmp_path)
    content = json.loads((tmp_path / "annotations/panoptic_train.json").read_text())
    is_thing = {category["id"]: category["isthing"] for category in content["categories"]}
    assert sorted(is_thing) == [1, 2, 4, 7, 101, 103, 106]
    assert sorted(is_thing.values()) == [0, 0, 0, 1, 1, 1, 1]
    assert all({"name", "supercategory", "color"} <= set(c) for c in content["categories"])
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        assert image["id"] == annotation["image_id"]
        assert (image["height"], image["width"]) == (96, 96)
        assert Image.open(tmp_path / "train" / image["file_name"]).size == (96, 96)
        rgb = np.array(Image.open(tmp_path / "panoptic_train" / annotation["file_name"]))
        segment_map = rgb2id(rgb)
        found = {segment["id"]: segment for segment in annotation["segments_info"]}
        assert set(np.unique(segment_map)) == set(found)
        for segment_id, segment in found.items():
            mask = (segment_map == segment_id).astype(np.uint8)
            assert segment["area"] == mask.sum()
            assert segment["bbox"] == list(cv2.boundingRect(mask))
            assert segment["iscrowd"] == 0
            assert all(isinstance(number, int) for number in (segment_id, *segment["bbox"]))


@pytest.fixture(scope="module")
def examples() -> list[tuple[np.ndarray, np.ndarray, list[dict]]]:
    return [shapes.make_example(0, "train", index, 96) for index in range(60)]


def test_the_pictures_are_varied(examples: list) -> None:
    seen = defaultdict(list)
    for _, segment_map, segments in examples:
        assert segment_map.min() > 0  # every pixel belongs to a segment
        assert len({segment["id"] for segment in segments}) == len(segments)
        stuff = [segment["category_id"] for segment in segments if segment["category_id"] > 100]
        things = len(segments) - len(stuff)
        assert len(set(stuff)) == len(stuff)  # one segment per stuff class
        assert 2 <= len(stuff) <= 3
        assert 1 <= things <= shapes.MAX_THINGS
        seen["things"].append(things)
        for segment in segments:
            assert segment["area"] >= shapes.MIN_VISIBLE_PIXELS
            seen[segment["category_id"]].append(segment["area"])
    assert set(seen["things"]) == {1, 2, 3, 4}
    for category in shapes.THINGS:
        areas = seen[category.id]
        assert len(areas) > 20
        assert max(areas) > 4 * min(areas)


def test_occlusion_leaves_enough_of_every_region(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = []
    make_segments = shapes.make_segments

    def keep_scene(rng: np.random.Generator, scene: object) -> object:
        scenes.append(scene)
        return make_segments(rng, scene)

    monkeypatch.setattr(shapes, "make_segments", keep_scene)
    for index in range(40):
        shapes.make_example(3, "val", index, 96)
    shares = []
    for scene in scenes:
        left = np.bincount(scene.owner.ravel(), minlength=len(scene.painted))
        assert (left >= shapes.MIN_VISIBLE_PIXELS).all()
        shares += [
            seen / painted
            for seen, painted, category in zip(left, scene.painted, scene.categories, strict=True)
            if category.isthing
        ]
    assert min(shares) >= shapes.MIN_VISIBLE_SHARE
    assert sum(share < 0.95 for share in shares) >= 10  # occlusion does occur


def test_color_is_a_cue_but_does_not_determine_the_class(examples: list) -> None:
    """A vote of the 15 nearest mean colors is often wrong about the 7 classes."""
    colors, classes = [], []
    for picture, segment_map, segments in examples:
        for segment in segments:
            colors.append(picture[segment_map == segment["id"]].mean(axis=0))
            classes.append(segment["category_id"])
    color, label = np.stack(colors), np.array(classes)
    distance = np.linalg.norm(color[:, None] - color[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    votes = label[np.argsort(distance, axis=1)[:, :15]]
    winner = np.array([np.bincount(row).argmax() for row in votes])
    right = (winner == label).mean()
    assert 0.25 < right < 0.55


def test_things_contrast_with_their_surroundings(examples: list) -> None:
    outline = np.ones((5, 5), np.uint8)
    for picture, segment_map, segments in examples:
        lab = cv2.cvtColor(picture.astype(np.float32) / 255.0, cv2.COLOR_RGB2LAB)
        for segment in segments:
            mask = (segment_map == segment["id"]).astype(np.uint8)
            ring = (cv2.dilate(mask, outline) > 0) & (mask == 0)
            if segment["category_id"] < 100:
                distance = np.linalg.norm(lab[mask > 0].mean(axis=0) - lab[ring].mean(axis=0))
                assert distance > 10.0, segment


@pytest.mark.parametrize("category", shapes.THINGS, ids=lambda category: category.name)
def test_shapes_have_the_corners_of_their_name(category: tuple) -> None:
    axis = np.linspace(-1.3, 1.3, 401)
    u, v = np.meshgrid(axis, axis)
    mask = shapes.INSIDE[category.id](u, v).astype(np.uint8)
    (outline,), _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    corners = len(cv2.approxPolyDP(outline, 8.0, True))
    expected = {"square": 4, "triangle": 3, "star": 10}
    if category.name == "disc":
        assert mask.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(np.pi, rel=0.01)
    else:
        assert corners == expected[category.name]


def test_a_finished_set_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert generate(tmp_path) == 0
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_an_interrupted_run_is_noticed_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "id2rgb", fail)
        assert generate(tmp_path / "set") == 2
    message = f"error: --output {tmp_path / 'set'} cannot be written: disk full\n"
    assert capsys.readouterr().err == message
    assert json.loads((tmp_path / "set/manifest.json").read_text())["complete"] is False
    assert generate(tmp_path / "set") == 2
    assert "incomplete set; add --overwrite" in capsys.readouterr().err
    assert generate(tmp_path / "set", 3, 2, 5, "--overwrite") == 0
    generate(tmp_path / "fresh")
    assert read_files(tmp_path / "set") == read_files(tmp_path / "fresh")


def test_a_lost_file_or_other_arguments_need_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tmp_path)
    assert generate(tmp_path, seed=6) == 2
    assert "seed 5 (requested: 6); add --overwrite" in capsys.readouterr().err
    next((tmp_path / "panoptic_val").glob("*.png")).unlink()
    assert generate(tmp_path) == 2
    assert "incomplete set; add --overwrite" in capsys.readouterr().err
    assert generate(tmp_path, 2, 1, 6, "--overwrite") == 0
    assert len(list((tmp_path / "train").iterdir())) == 2


@pytest.mark.parametrize("manifest", [None, "{}", "[1]", "not json"])
def test_a_foreign_folder_is_never_touched(
    tmp_path: Path, manifest: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/holiday.png").write_bytes(b"precious")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    before = read_files(tmp_path)
    assert generate(tmp_path, 3, 2, 5, "--overwrite") == 2
    assert "holds other files; name a new or empty folder" in capsys.readouterr().err
    assert read_files(tmp_path) == before


def test_an_output_that_is_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert generate(tmp_path / "file") == 2
    assert "is a file; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--num-train", "0"), ("--num-val", "x"), ("--seed", "-1"), ("--size", "32")],
)
def test_bad_numbers_name_the_value(
    tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        shapes.main(["--output", str(tmp_path / "set"), f"{option}={value}"])
    assert exit_info.value.code == 2
    assert f"{value!r} is not an integer from" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
