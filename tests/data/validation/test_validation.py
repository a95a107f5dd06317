"""Each fault of a COCO-panoptic data set is reported once, by the loader in the same words."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from panopticapi.utils import id2rgb
from PIL import Image

from batchformer_panoptic.data import (
    ClassTable,
    PanopticDatasetMapper,
    load_panoptic_json,
    register_panoptic_dataset,
)
from batchformer_panoptic.data.io import read_coco_json, segment_extents
from batchformer_panoptic.data.validation import Problem, check_panoptic_content
from batchformer_panoptic.errors import UserError
from helpers.commands import load_script

PERSON, WALL, CROWD = 70_000, 300, 5  # segment ids of one, two and three bytes
Content = dict[str, Any]


def make_segment_map() -> np.ndarray:
    segment_map = np.zeros((6, 8), np.int64)
    segment_map[2:, :] = WALL
    segment_map[1:4, 2:5] = PERSON
    segment_map[5, 6:] = CROWD
    return segment_map


def make_segment(segment_id: int, category_id: int, iscrowd: int = 0) -> dict[str, Any]:
    rows, columns = np.nonzero(make_segment_map() == segment_id)
    left, top = int(columns.min()), int(rows.min())
    bbox = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
    return {
        "id": segment_id,
        "category_id": category_id,
        "area": len(rows),
        "bbox": bbox,
        "iscrowd": iscrowd,
    }


def write_png(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


@pytest.fixture
def content() -> Content:
    segments = [make_segment(PERSON, 3), make_segment(WALL, 9), make_segment(CROWD, 3, 1)]
    return {
        "images": [
            {"id": number, "file_name": f"{number}.jpg", "height": 6, "width": 8}
            for number in (11, 12)
        ],
        "annotations": [
            {
                "image_id": number,
                "file_name": f"{number}.png",
                "segments_info": copy.deepcopy(segments),
            }
            for number in (11, 12)
        ],
        "categories": [
            {"id": 3, "name": "person", "isthing": 1, "color": [1, 2, 3]},
            {"id": 9, "name": "wall", "isthing": 0},
        ],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("images", "panoptic"):
        (tmp_path / folder).mkdir()
    for number in (11, 12):
        write_png(tmp_path / f"images/{number}.jpg", np.full((6, 8, 3), 99, np.uint8))
        write_png(tmp_path / f"panoptic/{number}.png", id2rgb(make_segment_map()))
    return tmp_path


def check(root: Path, content: Content, **options: Any) -> list[Problem]:
    (root / "set.json").write_text(json.dumps(content))
    return check_panoptic_content(
        read_coco_json(root / "set.json"), root / "images", root / "panoptic", **options
    )


def segments(content: Content) -> list[dict[str, Any]]:
    return content["annotations"][0]["segments_info"]


def test_a_sound_set_has_no_problem(root: Path, content: Content) -> None:
    assert check(root, content) == []


def test_extents_match_panopticapi_ids_and_a_pixel_loop() -> None:
    segment_map = np.random.default_rng(0).integers(0, 4, (9, 7)) * 70_001
    extents = segment_extents(segment_map)
    assert sorted(extents) == [70_001, 140_002, 210_003]
    for segment_id, (area, (left, top, width, height)) in extents.items():
        rows, columns = np.nonzero(segment_map == segment_id)
        assert area == len(rows)
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)


def set_value(path: str, value: object) -> Callable[[Content], None]:
    """Assign to ``content[...]...[...]``; the path is dotted, numbers index lists."""

    def change(content: Content) -> None:
        node: Any = content
        *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
        for part in parents:
            node = node[part]
        node[last] = value

    return change


def delete(path: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        node: Any = content
        *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
        for part in parents:
            node = node[part]
        del node[last]

    return change


def repeat(path: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        node: Any = content
        for part in path.split("."):
            node = node[int(part) if part.isdecimal() else part]
        node.append(copy.deepcopy(node[0]))

    return change


SEGMENTS = "annotations.0.segments_info"
JSON_FAULTS: list[tuple[str, str, Callable[[Content], None]]] = [
    ("error", "missing section", set_value("categories", None)),
    ("error", "missing section", delete("annotations")),
    ("error", "missing section", set_value("images", [])),
    ("error", "bad record", lambda content: content["images"].append("x.jpg")),
    ("error", "bad record", lambda content: segments(content).append(None)),
    ("error", "duplicate category id", repeat("categories")),
    ("error", "duplicate category name", set_value("categories.1.name", "person")),
    ("error", "category without id", lambda c: c["categories"].append({"name": "x", "isthing": 1})),
    ("error", "category without name", delete("categories.0.name")),
    ("error", "category without isthing", delete("categories.0.isthing")),
    ("error", "category without isthing", set_value("categories.0.isthing", ["yes"])),
    ("error", "bad category color", set_value("categories.0.color", [0, 300, 0])),
    ("error", "bad category color", set_value("categories.0.color", [0, 30])),
    ("note", "no stuff", set_value("categories.1.isthing", 1)),
    ("note", "no things", set_value("categories.0.isthing", 0)),
    ("error", "bad image record", delete("images.0.height")),
    ("error", "duplicate image id", repeat("images")),
    ("warning", "image without annotation", delete("annotations.0")),
    ("error", "annotation without image", delete("images.0")),
    ("error", "bad annotation record", delete("annotations.0.file_name")),
    ("error", "duplicate annotation", repeat("annotations")),
    ("error", "no segments_info", delete(SEGMENTS)),
    ("error", "no segments_info", set_value(SEGMENTS, "none")),
    ("warning", "empty segments_info", set_value(SEGMENTS, [])),
    ("error", "bad segment id", set_value(f"{SEGMENTS}.0.id", 0)),
    ("error", "bad segment id", set_value(f"{SEGMENTS}.0.id", 256**3)),
    ("error", "bad segment id", set_value(f"{SEGMENTS}.0.id", "a")),
    ("error", "duplicate segment id", repeat(SEGMENTS)),
    ("error", "bad iscrowd", set_value(f"{SEGMENTS}.0.iscrowd", 2)),
    ("error", "bad iscrowd", delete(f"{SEGMENTS}.0.iscrowd")),
    ("error", "unknown category_id", set_value(f"{SEGMENTS}.0.category_id", 4)),
    ("warning", "stuff in several segments", set_value(f"{SEGMENTS}.0.category_id", 9)),
    ("error", "JSON id not in PNG", lambda c: segments(c).append({**segments(c)[0], "id": 77})),
    ("error", "PNG id not in JSON", delete(f"{SEGMENTS}.2")),
    ("error", "wrong area", set_value(f"{SEGMENTS}.0.area", 8)),
    ("error", "wrong area", delete(f"{SEGMENTS}.0.area")),
    ("error", "wrong bbox", set_value(f"{SEGMENTS}.0.bbox", [2, 1, 5, 4])),
    ("error", "wrong bbox", set_value(f"{SEGMENTS}.0.bbox", [2, 1, "5", None])),
    ("error", "wrong bbox", set_value(f"{SEGMENTS}.0.bbox", [2, 1, "x", 4])),
    ("error", "wrong bbox", set_value(f"{SEGMENTS}.0.bbox", "2 1 3 3")),
    ("warning", "no bbox", delete(f"{SEGMENTS}.0.bbox")),
]
# Faults of other records that follow from a fault.
CONSEQUENCES = {
    "missing section": {"annotation without image", "image without annotation"}
    | {"unknown category_id"},
    "duplicate category id": {"duplicate category name"},
    "bad segment id": {"PNG id not in JSON"},
    "empty segments_info": {"PNG id not in JSON"},
    "no things": {"stuff in several segments"},
}


@pytest.mark.parametrize(("severity", "kind", "spoil"), JSON_FAULTS)
def test_a_fault_of_the_json_is_found_once(
    root: Path,
    content: Content,
    severity: str,
    kind: str,
    spoil: Callable[[Content], None],
) -> None:
    spoil(content)
    problems = check(root, content)
    expected = [problem for problem in problems if problem.kind == kind]
    assert [problem.severity for problem in expected] == [severity]
    others = {problem.kind for problem in problems} - {kind}
    assert others <= CONSEQUENCES.get(kind, set())


def remove_image(root: Path) -> None:
    (root / "images/11.jpg").unlink()


def truncate_image(root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    write_png(root / "noise.png", noise)
    data = (root / "noise.png").read_bytes()
    (root / "images/11.jpg").write_bytes(data[: len(data) // 2])


def text_image(root: Path) -> None:
    (root / "images/11.jpg").write_text("not a picture")


def transpose_image(root: Path) -> None:
    write_png(root / "images/11.jpg", np.zeros((8, 6, 3), np.uint8))


def turn_image_by_exif(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(root / "images/11.jpg", exif=exif)


def remove_png(root: Path) -> None:
    (root / "panoptic/11.png").rename(root / "panoptic/11.jpg")


def truncate_png(root: Path) -> None:
    path = root / "panoptic/11.png"
    path.write_bytes(path.read_bytes()[:45])


def enlarge_png(root: Path) -> None:
    wider = np.pad(make_segment_map(), ((0, 0), (0, 1)))
    write_png(root / "panoptic/11.png", id2rgb(wider))


def gray_png(root: Path) -> None:
    write_png(root / "panoptic/11.png", make_segment_map().astype(np.uint8))


def rgba_png(root: Path) -> None:
    Image.open(root / "panoptic/11.png").convert("RGBA").save(root / "panoptic/11.png")


def palette_png(root: Path) -> None:
    Image.open(root / "panoptic/11.png").convert("P").save(root / "panoptic/11.png")


def deep_png(root: Path) -> None:
    rgb16 = id2rgb(make_segment_map())[..., ::-1].astype(np.uint16) * 257
    assert cv2.imwrite(str(root / "panoptic/11.png"), rgb16)


def jpeg_png(root: Path) -> None:
    Image.open(root / "panoptic/11.png").save(root / "panoptic/11.png", format="JPEG")


def swap_png(root: Path) -> None:
    write_png(root / "panoptic/11.png", np.ascontiguousarray(id2rgb(make_segment_map())[..., ::-1]))


FILE_FAULTS: list[tuple[str, str, Callable[[Path], None]]] = [
    ("missing image file", "11.jpg does not exist", remove_image),
    ("unreadable image file", "truncated", truncate_image),
    ("unreadable image file", "unknown image format", text_image),
    ("wrong image size", "is 6x8, but in the JSON 8x6", transpose_image),
    ("wrong image size", "is 6x8, but in the JSON 8x6", turn_image_by_exif),
    ("missing panoptic PNG", "(11.jpg exists)", remove_png),
    ("unreadable panoptic PNG", "11.png", truncate_png),
    ("wrong panoptic PNG size", "is 9x6, but its image is 8x6", enlarge_png),
    ("wrong PNG format", "a PNG of 8-bit grey", gray_png),
    ("wrong PNG format", "a PNG of 8-bit RGBA", rgba_png),
    ("wrong PNG format", "-bit palette", palette_png),
    ("wrong PNG format", "a PNG of 16-bit RGB", deep_png),
    ("wrong PNG format", "is not a PNG", jpeg_png),
    ("PNG red and blue swapped", "change places", swap_png),
]


@pytest.mark.parametrize(("kind", "words", "spoil"), FILE_FAULTS)
def test_a_fault_of_a_file_is_found_once(
    root: Path, content: Content, kind: str, words: str, spoil: Callable[[Path], None]
) -> None:
    spoil(root)
    problems = check(root, content)
    assert [(problem.kind, problem.severity) for problem in problems] == [(kind, "error")]
    assert words in problems[0].message
    assert (problems[0].image or "").startswith("11.")


def load(root: Path, content: Content) -> list[dict[str, Any]]:
    (root / "set.json").write_text(json.dumps(content))
    paths = (root / "set.json", root / "images", root / "panoptic")
    return load_panoptic_json(*map(str, paths))


def train_on(dataset_dicts: list[dict[str, Any]]) -> None:
    mapper = PanopticDatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    for dataset_dict in dataset_dicts:
        mapper(dataset_dict)


@pytest.mark.parametrize(("severity", "kind", "spoil"), JSON_FAULTS)
def test_the_loader_raises_the_first_error_of_the_json(
    root: Path, content: Content, severity: str, kind: str, spoil: Callable[[Content], None]
) -> None:
    spoil(content)
    problems = check(root, content, max_images=0)
    errors = [p for p in problems if p.severity == "error" and not p.tolerated]
    if not errors:
        assert len(load(root, content)) == len(content["annotations"])
        return
    with pytest.raises(UserError) as caught:
        load(root, content)
    assert str(caught.value) == f"{root / 'set.json'}: {errors[0]}"
    assert "\n" not in str(caught.value)


def test_the_loader_needs_neither_crowd_flags_nor_sizes(root: Path, content: Content) -> None:
    for segment in segments(content):
        del segment["iscrowd"]
    del content["images"][0]["height"], content["images"][0]["width"]
    kinds = {problem.kind for problem in check(root, content) if problem.tolerated}
    assert kinds == {"bad iscrowd", "bad image record"}
    train_on(load(root, content))


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("duplicate category id", repeat("categories")),
        ("duplicate category name", set_value("categories.1.name", "person")),
        ("category without id", set_value("categories.0.id", "3")),
        ("category without name", delete("categories.0.name")),
        ("category without isthing", set_value("categories.0.isthing", 2)),
        ("bad category color", set_value("categories.0.color", [0, 30])),
        ("bad record", lambda content: content["categories"].append("wall")),
        ("missing section", set_value("categories", [])),
        ("missing section", delete("images")),
    ],
)
def test_registration_and_class_table_use_the_same_words(
    root: Path, content: Content, kind: str, spoil: Callable[[Content], None]
) -> None:
    spoil(content)
    problem = next(problem for problem in check(root, content) if problem.severity == "error")
    assert problem.kind == kind
    paths = [str(root / name) for name in ("images", "panoptic", "set.json")]
    with pytest.raises(UserError) as caught:
        register_panoptic_dataset(f"spoilt_{root.name}_{id(root)}", *paths)
    assert str(caught.value) == f"{paths[2]}: {problem}"
    if "images" in content:
        with pytest.raises(UserError) as caught:
            ClassTable.from_categories(content["categories"])
        assert str(caught.value) == str(problem)


@pytest.mark.parametrize(("kind", "words", "spoil"), FILE_FAULTS)
def test_the_mapper_uses_the_same_words_for_files(
    root: Path, content: Content, kind: str, words: str, spoil: Callable[[Path], None]
) -> None:
    spoil(root)
    (problem,) = check(root, content)
    if problem.tolerated:
        train_on(load(root, content))
        return
    with pytest.raises(UserError) as caught:
        train_on(load(root, content))
    sentence = str(caught.value)
    assert words in sentence
    assert problem.message in sentence
    if kind.startswith("missing"):
        # The first file is already missed when the data set is read.
        folder = root / ("images" if "image" in kind else "panoptic")
        hint = f"; is {folder} the right folder?"
        assert sentence == f"{root / 'set.json'}: {problem.message}{hint}"
    elif problem.kind != "PNG red and blue swapped":
        assert sentence == problem.message  # which names the file
    else:
        assert sentence == f"{root / 'panoptic/11.png'}: {problem.message}"


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("JSON id not in PNG", lambda c: segments(c).append({**segments(c)[0], "id": 77})),
        ("PNG id not in JSON", delete(f"{SEGMENTS}.2")),
    ],
)
def test_the_mapper_uses_the_same_words_for_ids(
    root: Path, content: Content, kind: str, spoil: Callable[[Content], None]
) -> None:
    spoil(content)
    (problem,) = check(root, content)
    assert problem.kind == kind
    with pytest.raises(UserError) as caught:
        train_on(load(root, content))
    assert str(caught.value) == str(replace(problem, image=str(root / "panoptic/11.png")))


def test_a_problem_names_image_and_segment(root: Path, content: Content) -> None:
    segments(content)[1]["area"] = 1000
    (problem,) = check(root, content)
    assert (problem.image, problem.segment) == ("11.png", WALL)
    assert "1000" in problem.message
    assert str(make_segment(WALL, 9)["area"]) in problem.message


def test_a_box_may_be_off_by_one_pixel(root: Path, content: Content) -> None:
    segments(content)[0]["bbox"] = [2.0, 1.0, 2.0, 2.0]
    assert check(root, content) == []


def test_max_images_and_decoding_bound_what_is_read(root: Path, content: Content) -> None:
    truncate_image(root)
    (root / "panoptic/12.png").unlink()
    kinds = [problem.kind for problem in check(root, content, max_images=1)]
    assert kinds == ["unreadable image file"]
    kinds = [problem.kind for problem in check(root, content, decode_images=False)]
    assert kinds == ["missing panoptic PNG"]


def test_a_missing_folder_is_a_user_error(root: Path, content: Content) -> None:
    with pytest.raises(UserError, match=r"panoptic folder not found: .*nowhere"):
        check_panoptic_content(content, root / "images", root / "nowhere")


def run_command(root: Path, content: Content, *options: str) -> int:
    (root / "set.json").write_text(json.dumps(content))
    folders = ["--image-root", str(root / "images"), "--panoptic-root", str(root / "panoptic")]
    script = load_script("tools/check_dataset.py")
    return script.main(["--json", str(root / "set.json"), *folders, *options])


def test_the_command_accepts_a_sound_set(
    root: Path, content: Content, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(root, content) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 images, 2 annotations, 6 segments, 1 thing and 1 stuff classes"
    assert lines[2].split() == ["3", "person", "thing", "4", "2"]
    assert lines[3].split() == ["9", "wall", "stuff", "2", "2"]
    assert lines[-1] == "ok: 0 errors, 0 warnings, 0 notes"


def test_the_command_groups_counts_and_fails(
    root: Path, content: Content, capsys: pytest.CaptureFixture[str]
) -> None:
    for segment in segments(content):
        segment["area"] += 1
    segments(content)[0]["iscrowd"] = 7
    del segments(content)[0]["bbox"]
    assert run_command(root, content, "--max-problems", "2") == 1
    lines = capsys.readouterr().out.splitlines()[5:]
    assert [line for line in lines if not line.startswith(" ")] == [
        "error: wrong area (3)",
        "error: bad iscrowd (1)",
        "warning: no bbox (1)",
        "FAILED: 4 errors, 1 warnings, 0 notes",
    ]
    assert lines[1].startswith("  11.png, segment 70000: area is 10, but the PNG has 9 pixels")
    assert lines[3] == "  ... and 1 more"


def test_the_command_survives_a_wholly_wrong_json(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"images": [{}], "annotations": [{}, 3, {"segments_info": [{}]}], "categories": [{}]}
    assert run_command(root, wrong) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_command_says_in_one_line_what_is_missing(
    root: Path, content: Content, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "images").rename(root / "moved")
    assert run_command(root, content) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: image folder not found: {root / 'images'}\n"
