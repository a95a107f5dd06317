"""The readers of images, panoptic PNGs and COCO's JSON."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from panopticapi.utils import id2rgb
from PIL import Image

from batchformer_panoptic.data import io, register_panoptic_dataset
from batchformer_panoptic.data.io import (
    read_coco_json,
    read_image,
    read_image_size,
    read_segment_map,
)
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation import PanopticEvaluator, ThingAPEvaluator
from helpers.tiny_dataset import TinyPanopticDataset

LARGEST_ID = 256**3 - 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_ids_survive_the_png(tmp_path: Path, mode: str) -> None:
    segment_map = np.array([[0, 1, 255, 256], [65535, 65536, LARGEST_ID - 1, LARGEST_ID]])
    path = tmp_path / "ids.png"
    image = Image.fromarray(id2rgb(segment_map))
    if mode == "RGBA":
        image.putalpha(77)
    image.save(path)
    loaded = read_segment_map(path)
    assert loaded.dtype == np.int32
    np.testing.assert_array_equal(loaded, segment_map)


def test_unusable_pngs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^panoptic PNG .*gone\.png does not exist$"):
        read_segment_map(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png cannot be read: unknown image format"):
        read_segment_map(tmp_path / "text.png")
    Image.new("RGB", (300, 300), (1, 2, 3)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    with pytest.raises(UserError, match=r"cut\.png cannot be read"):
        read_segment_map(tmp_path / "cut.png")
    Image.new("L", (3, 3)).save(tmp_path / "grey.png")
    with pytest.raises(UserError, match=r"grey\.png is a PNG of 8-bit grey; segment ids need"):
        read_segment_map(tmp_path / "grey.png")
    Image.new("L", (3, 3)).save(tmp_path / "grey.jpg")
    with pytest.raises(UserError, match=r"grey\.jpg is not a PNG; segment ids need"):
        read_segment_map(tmp_path / "grey.jpg")


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_size_is_that_of_the_image_read(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.jpg"
    Image.new("RGB", (8, 6)).save(path, exif=exif)
    assert read_image_size(path) == read_image(path).shape[:2]


def test_a_missing_image_names_a_file_with_another_extension(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    for read in (read_image, read_image_size):
        with pytest.raises(UserError, match=r"^image .*a\.jpg does not exist \(a\.png exists\)$"):
            read(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "other.json does not exist"),
        ("{", "other.json is not valid JSON"),
        ("[]", "other.json holds a list"),
    ],
)
def test_an_unusable_json_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_coco_json(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_not_a_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_coco_json(tmp_path)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are parsed by `read_coco_json` during a test."""
    names: list[str] = []
    load = json.load

    def record(file: Any) -> Any:
        names.append(Path(file.name).name)
        return load(file)

    monkeypatch.setattr(io.json, "load", record)
    monkeypatch.setattr(io, "_cached", type(io._cached)())
    return names


def test_a_run_parses_the_panoptic_json_once(
    tiny_panoptic_dataset: TinyPanopticDataset, tmp_path: Path, parsed: list[str]
) -> None:
    path = tmp_path / "once.json"
    path.write_bytes(tiny_panoptic_dataset.panoptic_json.read_bytes())
    name = f"once_{id(path)}"
    register_panoptic_dataset(name, *tiny_panoptic_dataset.row[1:3], str(path))
    before = json.dumps(read_coco_json(path))
    DatasetCatalog.get(name)[0]["segments_info"][0]["bbox"][0] = -1  # must not reach other readers
    PanopticEvaluator(name)
    ThingAPEvaluator(name, str(tmp_path))
    assert parsed.count("once.json") == 1
    assert json.dumps(read_coco_json(path)) == before == json.dumps(json.loads(path.read_text()))
    MetadataCatalog.pop(name)
    DatasetCatalog.remove(name)


def test_a_changed_json_is_parsed_again(tmp_path: Path, parsed: list[str]) -> None:
    path = tmp_path / "changing.json"
    path.write_text('{"images": [1]}')
    os.utime(path, ns=(1, 1))
    assert read_coco_json(path) == {"images": [1]}
    path.write_text('{"images": [2]}')  # of the same size
    assert read_coco_json(path) == {"images": [2]}
    assert read_coco_json(str(path)) is read_coco_json(path)
    assert parsed == ["changing.json"] * 2


def test_kept_files_are_bounded_in_size(
    tmp_path: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io, "_CACHED_BYTES", 40)
    sizes = {"a": 15, "b": 15, "large": 60}
    for name, size in sizes.items():
        (tmp_path / name).write_text('{"x": "' + "y" * (size - 9) + '"}')
    for name in ("a", "b", "large", "a", "b"):
        read_coco_json(tmp_path / name)
    assert parsed == ["a", "b", "large"]
    (tmp_path / "c").write_text('{"x": "yyyyyy"}')
    for name in ("c", "b", "a", "large"):  # c replaces a, which was used before b
        read_coco_json(tmp_path / name)
    assert parsed == ["a", "b", "large", "c", "a", "large"]
