"""tools/predict.py through its main: files that other programs read, resuming, and mistakes."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from batchformer_panoptic.data.segment_maps import read_segment_map
from batchformer_panoptic.engine import predictor as predictor_module
from helpers.commands import load_script
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.trained_files import Run, file_names, write_run

predict = load_script("tools/predict.py")
check_dataset = load_script("tools/check_dataset.py")

# Names that would collide without folder and ending, in several scripts.
NAMES = ("a/1.png", "b/1.png", "b/1.jpg", "Straße/猫 und Hund.png", "снимок.png", "صورة.jpg")


def run_of_things(folder: Path, dataset: TinyPanopticDataset, **overrides: bool) -> Run:
    """A random model finds one segment of stuff; this one finds several things."""
    run = write_run(folder, dataset, **overrides)
    checkpoint = torch.load(run.weights, weights_only=True)
    checkpoint["model"]["box_head.class_embed.bias"][0] += 3
    torch.save(checkpoint, run.weights)
    return run


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_panoptic_dataset: TinyPanopticDataset
) -> Run:
    return run_of_things(tmp_path_factory.mktemp("things"), tiny_panoptic_dataset)


@pytest.fixture
def photographs(tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset) -> Path:
    folder = tmp_path / "photographs"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        source = "000.png" if name.endswith("png") else "001.jpg"
        shutil.copy(tiny_panoptic_dataset.image_root / source, folder / name)
    (folder / ".hidden.png").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    return folder


def call(run: Run, photographs: Path, output: Path, *options: str) -> int:
    arguments = ["--config-file", str(run.config_file), "--input", str(photographs)]
    return predict.main([*arguments, "--output", str(output), *options, *run.opts])


def read(path: Path) -> dict[str, list]:
    return json.loads(path.read_text())


def test_the_folder_is_a_coco_panoptic_data_set(
    run: Run, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call(run, photographs, out, "--batch-size", "4") == 0
    content = read(out / "panoptic.json")
    assert sorted(image["file_name"] for image in content["images"]) == sorted(NAMES)
    assert {a["file_name"] for a in content["annotations"]} == {f"{name}.png" for name in NAMES}
    assert content["categories"] == run.table.to_json()
    segments = [s for a in content["annotations"] for s in a["segments_info"]]
    assert len(segments) > len(NAMES)
    assert all(0 < segment["score"] <= 1 for segment in segments)
    roots = ["--image-root", str(photographs), "--panoptic-root", str(out / "panoptic")]
    assert check_dataset.main(["--json", str(out / "panoptic.json"), *roots]) == 0
    # Two of the photographs are copies of others, which the checker says.
    assert "ok: 0 errors, 2 warnings" in capsys.readouterr().out


def test_instances_and_table_describe_the_same_segments(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert call(run, photographs, out) == 0
    panoptic, coco = read(out / "panoptic.json"), COCO(out / "instances.json")
    names = {image["id"]: image["file_name"] for image in panoptic["images"]}
    rows = []
    for annotation in panoptic["annotations"]:
        image_id, segments = annotation["image_id"], annotation["segments_info"]
        segment_map = read_segment_map(out / "panoptic" / annotation["file_name"])
        for segment, thing in zip(segments, coco.imgToAnns[image_id], strict=True):
            for key in ("category_id", "score", "bbox", "area", "iscrowd"):
                assert thing[key] == segment[key]
            np.testing.assert_array_equal(coco.annToMask(thing), segment_map == segment["id"])
            assert mask_util.area(thing["segmentation"]) == segment["area"]
            name = run.table.names[run.table.contiguous_ids[segment["category_id"]]]
            row = [names[image_id], segment["id"], name, segment["score"], segment["area"]]
            rows.append([str(value) for value in (*row, *segment["bbox"])])
    assert len(rows) > 2 * len(NAMES)
    with (out / "segments.csv").open(encoding="utf-8", newline="") as file:
        header, *found = csv.reader(file)
    assert header == ["image", "segment", "class", "score", "area", "x", "y", "width", "height"]
    assert found == rows


def test_overlays_have_the_size_of_the_photograph(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    assert call(run, photographs, tmp_path / "out") == 0
    for name in NAMES:
        photograph = Image.open(photographs / name)
        overlay = Image.open(tmp_path / "out" / "overlays" / f"{name}.jpg")
        assert overlay.size == photograph.size
        difference = np.asarray(overlay).astype(int) - np.asarray(photograph)
        assert abs(difference).mean() > 5
    with Image.open(tmp_path / "out" / "legend.png") as legend:
        colors = {color for _, color in legend.getcolors(100_000)}
    assert set(run.table.colors) <= colors
    assert call(run, photographs, tmp_path / "plain", "--no-overlays") == 0
    assert "overlays" not in file_names(tmp_path / "plain")


def test_an_interrupted_run_continues(
    run: Run,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    predicted = []
    original = predictor_module.Predictor.predict_batch

    def counted(self, images):
        predicted.append(len(images))
        if len(predicted) == 4:
            raise KeyboardInterrupt
        return original(self, images)

    monkeypatch.setattr(predictor_module.Predictor, "predict_batch", counted)
    out = tmp_path / "out"
    assert call(run, photographs, out) == 130
    assert capsys.readouterr().err.endswith("interrupted: the same command continues\n")
    with (out / "predictions.jsonl").open("a") as file:
        file.write('{"file_name": "half')  # a line that was being written
    assert call(run, photographs, out) == 0
    assert predicted == [1] * (len(NAMES) + 1)
    assert f"3 of {len(NAMES)} images are finished already" in capsys.readouterr().out
    monkeypatch.undo()
    assert call(run, photographs, tmp_path / "at once") == 0
    for name in ("panoptic.json", "instances.json", "segments.csv"):
        assert (out / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()


def test_changed_and_incomplete_images_are_predicted_again(
    run: Run, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call(run, photographs, out) == 0
    shutil.copy(photographs / "b/1.jpg", photographs / "a/1.png")
    os.utime(photographs / "a/1.png", ns=(1, 1))
    (out / "panoptic" / "b" / "1.png.png").unlink()
    capsys.readouterr()
    assert call(run, photographs, out) == 0
    assert f"{len(NAMES) - 2} of {len(NAMES)} images are" in capsys.readouterr().out
    sizes = {
        i["file_name"]: (i["width"], i["height"]) for i in read(out / "panoptic.json")["images"]
    }
    assert sizes["a/1.png"] == (32, 40)
    assert (out / "panoptic" / "b" / "1.png.png").is_file()


def test_unreadable_images_are_named_and_the_others_predicted(
    run: Run, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call(run, photographs, out) == 0
    (photographs / "a/1.png").write_text("damaged")
    (photographs / "b/2.webp").write_text("damaged")
    capsys.readouterr()
    assert call(run, photographs, out) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error:")] == errors
    assert "a/1.png cannot be read" in errors[0]
    assert "b/2.webp cannot be read" in errors[1]
    assert errors[2] == f"error: 2 of {len(NAMES) + 1} images could not be read"
    listed = {image["file_name"] for image in read(out / "panoptic.json")["images"]}
    assert listed == {*NAMES} - {"a/1.png"}


def test_a_model_of_boxes_is_written_without_masks(
    tiny_panoptic_dataset: TinyPanopticDataset, photographs: Path, tmp_path: Path
) -> None:
    run = run_of_things(tmp_path / "boxes", tiny_panoptic_dataset, MODEL__MASK_ON=False)
    out = tmp_path / "out"
    assert call(run, photographs, out, "--confidence-threshold", "0") == 0
    assert not (out / "panoptic.json").exists()
    annotations = read(out / "instances.json")["annotations"]
    assert annotations
    assert all("segmentation" not in annotation for annotation in annotations)
    assert all(annotation["bbox"][2] >= 0 for annotation in annotations)


def test_ids_come_from_the_annotations(
    run: Run, tiny_panoptic_dataset: TinyPanopticDataset, tmp_path: Path
) -> None:
    truth = tiny_panoptic_dataset.panoptic_json
    options = ("--ids-from", str(truth))
    assert call(run, tiny_panoptic_dataset.image_root, tmp_path / "out", *options) == 0
    expected = {image["file_name"]: image["id"] for image in read(truth)["images"]}
    found = read(tmp_path / "out" / "panoptic.json")
    assert {image["file_name"]: image["id"] for image in found["images"]} == expected
    assert {a["image_id"] for a in found["annotations"]} == set(expected.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--confidence-threshold", "0.5"], r"holds predictions with settings \w+, not \w+: add"),
        (["--input", "{photographs}/a"], r"with image folder .*photographs, not .*photographs/a"),
        (["--ids-from", "{ids}"], r"ids\.json does not list the image Stra"),
        (["--output", "{photographs}"], "holds other files: name a new or empty folder"),
        (["--output", "{photographs}/a/1.png"], r"1\.png is a file: name a folder"),
        (["--input", "{photographs}/absent*"], "no images in"),
    ],
)
def test_mistakes_get_one_line(
    run: Run,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "ids.json").write_text('{"images": []}')
    assert call(run, photographs, tmp_path / "out", "--no-overlays") == 0
    capsys.readouterr()
    filled = [o.format(photographs=photographs, ids=tmp_path / "ids.json") for o in options]
    assert call(run, photographs, tmp_path / "out", "--no-overlays", *filled) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert re.search(message, errors[0])


def test_overwriting_starts_again(run: Run, photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(run, photographs, out) == 0
    assert call(run, photographs / "a", out, "--overwrite", "--no-overlays") == 0
    names = ["instances.json", "panoptic", "panoptic.json", "predictions.jsonl", "segments.csv"]
    assert file_names(out) == names
    assert file_names(out / "panoptic") == ["1.png.png"]


def test_the_output_below_the_photographs_is_no_input(run: Run, photographs: Path) -> None:
    for _ in range(2):
        assert call(run, photographs, photographs / "out") == 0
    assert len(read(photographs / "out" / "panoptic.json")["images"]) == len(NAMES)
