"""The checks of panoptic data sets, each fault once, and the loader in the same words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchformer_panoptic.data import (
    ClassTable,
    PanopticDatasetMapper,
    load_panoptic_json,
    register_panoptic_dataset,
)
from batchformer_panoptic.data.io import read_coco_json
from batchformer_panoptic.data.segment_maps import segment_extents
from batchformer_panoptic.data.validation import (
    Depth,
    Problem,
    check_panoptic_content,
    check_shared_images,
    files,
)
from batchformer_panoptic.data.validation.pixels import check_pieces
from batchformer_panoptic.errors import UserError
from helpers.commands import load_script
from helpers.data_faults import (
    FAULTS,
    FILE_FAULTS,
    WALL,
    WARNINGS,
    Content,
    Fault,
    cut,
    make_segment,
    sound_content,
    write_content,
    write_sound_set,
)


@pytest.fixture
def content() -> Content:
    return sound_content()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_sound_set(tmp_path / "set")


def check(root: Path, content: Content | None = None, **options: Any) -> list[Problem]:
    if content is not None:
        write_content(root, content)
    return check_panoptic_content(
        read_coco_json(root / "set.json"),
        root / "images",
        root / "panoptic",
        Depth(**options),
    )


def segments(content: Content) -> list[dict[str, Any]]:
    return content["annotations"][0]["segments_info"]


def test_a_sound_set_has_no_problem(root: Path) -> None:
    assert check(root) == []


def test_extents_match_panopticapi_ids_and_a_pixel_loop() -> None:
    segment_map = np.random.default_rng(0).integers(0, 4, (9, 7)) * 70_001
    extents = segment_extents(segment_map)
    assert sorted(extents) == [70_001, 140_002, 210_003]
    for segment_id, (area, (left, top, width, height)) in extents.items():
        rows, columns = np.nonzero(segment_map == segment_id)
        assert area == len(rows)
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)


# Faults of other records, and warnings, that follow from a fault.
CONSEQUENCES = {
    "missing section": {"annotation without image", "image without annotation"}
    | {"unknown category_id", "no targets"},
    "duplicate category id": {"duplicate category name"},
    "category without id": {"unknown category_id"},
    "bad image record": {"annotation without image"},
    "duplicate image id": {"one image under two ids"},
    "annotation without image": {"image without annotation"},
    "bad segment id": {"PNG id not in JSON"},
    "no segments_info": {"only crowds"},
    "bad area": {"wrong area"},
    "wrong image size": {"wrong panoptic PNG size", "EXIF orientation"},
    "swapped folders": {"missing image file", "missing panoptic PNG"},
    "parts far apart": {"much void"},
    "one image under two ids": {"wrong panoptic PNG size"},
    "dark 16-bit image": {"16-bit image"},
    "empty segments_info": {"much void"},
}
READABLE = [
    fault
    for fault in (*FAULTS, *WARNINGS)
    if fault.kind not in ("unreadable JSON", "byte-order mark")
]


@pytest.mark.parametrize("fault", READABLE, ids=lambda fault: fault.done)
def test_a_fault_is_found_once(root: Path, fault: Fault) -> None:
    fault.spoil(root)
    problems = check(root)
    expected = [problem for problem in problems if problem.kind == fault.kind]
    assert [problem.severity == "error" for problem in expected] == [fault in FAULTS]
    others = {problem.kind for problem in problems} - {fault.kind}
    assert others <= CONSEQUENCES.get(fault.kind, set())


def load(root: Path) -> list[dict[str, Any]]:
    paths = (root / "set.json", root / "images", root / "panoptic")
    return load_panoptic_json(*map(str, paths))


def train_on(dataset_dicts: list[dict[str, Any]]) -> None:
    mapper = PanopticDatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    for dataset_dict in dataset_dicts:
        mapper(dataset_dict)


# Training does not read areas (evaluation does), and only the check looks into the other folder.
NOT_IN_TRAINING = {"wrong area", "swapped folders"}


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if f.kind not in NOT_IN_TRAINING], ids=lambda fault: fault.done
)
def test_the_loader_and_the_mapper_raise_the_first_error(root: Path, fault: Fault) -> None:
    fault.spoil(root)
    with pytest.raises(UserError) as caught:
        train_on(load(root))
    sentence = str(caught.value)
    assert "\n" not in sentence
    if fault.kind == "unreadable JSON":
        return
    error = next(problem for problem in check(root) if problem.severity == "error")
    assert error.message in sentence
    if fault not in FILE_FAULTS:
        assert sentence == f"{root / 'set.json'}: {error}"


@pytest.mark.parametrize("fault", WARNINGS, ids=lambda fault: fault.done)
def test_the_loader_and_the_mapper_read_a_set_with_a_warning(root: Path, fault: Fault) -> None:
    fault.spoil(root)
    train_on(load(root))


ABOUT_CATEGORIES = [
    fault
    for fault in FAULTS
    if fault.kind in ("duplicate category id", "duplicate category name")
    or fault.kind in ("category without id", "category without name")
    or fault.done in ("`categories` is null", "no `annotations`")
]


@pytest.mark.parametrize("fault", ABOUT_CATEGORIES, ids=lambda fault: fault.done)
def test_registration_and_class_table_use_the_same_words(root: Path, fault: Fault) -> None:
    fault.spoil(root)
    problem = next(problem for problem in check(root) if problem.severity == "error")
    assert problem.kind == fault.kind
    paths = [str(root / name) for name in ("images", "panoptic", "set.json")]
    with pytest.raises(UserError) as caught:
        register_panoptic_dataset(f"spoilt_{root.parent.name}_{id(root)}", *paths)
    assert str(caught.value) == f"{paths[2]}: {problem}"
    content = read_coco_json(paths[2])
    if "annotations" in content:
        with pytest.raises(UserError) as caught:
            ClassTable.from_categories(content["categories"])
        assert str(caught.value) == str(problem)


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
    cut("images/11.jpg")(root)
    (root / "panoptic/12.png").unlink()
    kinds = [problem.kind for problem in check(root, content, max_images=1)]
    assert kinds == ["unreadable image file"]
    kinds = [problem.kind for problem in check(root, content, decode_images=False)]
    assert kinds == ["missing panoptic PNG"]


def test_headers_are_checked_beyond_the_bound_on_pixels(root: Path, content: Content) -> None:
    segments(content)[0]["area"] += 1  # of the first image, which is decoded
    content["annotations"][1]["segments_info"][0]["area"] += 1
    found = check(root, content, max_pixels=6 * 8)
    assert [(problem.kind, problem.image) for problem in found] == [("wrong area", "11.png")]
    cut("panoptic/12.png")(root)  # the header stays
    assert [problem.image for problem in check(root, content, max_pixels=6 * 8)] == ["11.png"]
    (root / "panoptic/12.png").write_bytes(b"text")
    kinds = {problem.kind for problem in check(root, content, max_pixels=6 * 8)}
    assert kinds == {"wrong area", "unreadable panoptic PNG"}


def test_processes_find_the_same(
    root: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments(content)[0]["area"] += 1
    (root / "panoptic/12.png").unlink()
    expected = check(root, content)
    monkeypatch.setattr(files, "_FEW_FILES", 0)
    assert len(expected) == 2
    assert check(root, content, processes=2) == expected


def test_images_in_train_and_val_are_counted(tmp_path: Path) -> None:
    roots = [write_sound_set(tmp_path / str(seed), seed) for seed in range(3)]
    train, val, other = ([root / f"images/{n}.jpg" for n in (11, 12)] for root in roots)
    val[0].write_bytes(train[1].read_bytes())
    (problem,) = check_shared_images({"train": train}, {"val": val, "other": other})
    assert problem.severity == "warning"
    assert problem.message.startswith(f"1 images of train are in val, too, the first is {train[1]}")


def test_two_segments_beside_each_other_are_not_far_apart() -> None:
    segment_map = np.zeros((30, 40), np.int32)
    segment_map[2:12, 3:13] = segment_map[2:12, 20:30] = 5  # 7 pixels of 27 between them
    assert list(check_pieces(segment_map, segment_extents(segment_map), "a.png")) == []
    segment_map[2:12, 20:30] = 0
    segment_map[25:30, 3:8] = 5  # 13 rows of 28
    segment_map[2:6, 3:13] = 0
    (problem,) = check_pieces(segment_map, segment_extents(segment_map), "a.png")
    assert (problem.segment, problem.message) == (
        5,
        "in two parts that are 13 pixels apart: is it one object?",
    )


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


@pytest.mark.parametrize("key", ["category_id", "id", "area", "bbox", "iscrowd"])
@pytest.mark.parametrize("value", [[], {}, None])
def test_the_command_survives_values_of_other_types(
    root: Path, content: Content, key: str, value: object
) -> None:
    content["annotations"][0]["segments_info"][0][key] = value
    run_command(root, content)
    content["categories"][0]["id"] = value
    assert run_command(root, content) == 1


def test_the_command_says_in_one_line_what_is_missing(
    root: Path, content: Content, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "images").rename(root / "moved")
    assert run_command(root, content) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: image folder not found: {root / 'images'}\n"


@pytest.mark.parametrize("size", [0, 7, 8, 20, 24, 25, 26, 40])
def test_the_command_survives_a_png_cut_off_anywhere(
    root: Path, content: Content, size: int
) -> None:
    path = root / "panoptic" / content["annotations"][0]["file_name"]
    path.write_bytes(path.read_bytes()[:size])
    assert run_command(root, content) == 1
