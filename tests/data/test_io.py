"""The readers of images, panoptic PNGs and COCO's JSON."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from panopticapi.utils import id2rgb
from PIL import Image

from batchformer_panoptic import add_batchformer_panoptic_config
from batchformer_panoptic.data import images, io, register_panoptic_dataset
from batchformer_panoptic.data.images import (
    IMAGE_SUFFIXES,
    missing_file,
    read_image,
    read_image_facts,
)
from batchformer_panoptic.data.io import read_coco_json
from batchformer_panoptic.data.segment_maps import (
    possible_segment_maps,
    read_index_map,
    read_segment_map,
)
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation import PanopticEvaluator, ThingAPEvaluator
from helpers.commands import REPO_ROOT
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
    with pytest.raises(UserError, match=r"grey\.jpg is not a PNG but a JPEG, which changes ids"):
        read_segment_map(tmp_path / "grey.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # top left
    # How a camera with this orientation stores the upright image.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=100)
    image = read_image(path)
    assert np.abs(image.astype(int) - upright).max() < 90  # JPEG and WebP smooth the edge
    for decode in (False, True):
        facts = read_image_facts(path, decode=decode)
        assert (facts.size, facts.orientation) == ((16, 24), orientation)


GREY16 = np.array([[0, 255, 256], [4095, 32768, 65535]], np.uint16)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_of_16_bits_the_upper_8_are_kept(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(GREY16).save(path)
    image = read_image(path)
    assert image.tolist() == np.stack([GREY16 >> 8] * 3, axis=-1).tolist()
    facts = read_image_facts(path)
    assert (facts.is_deep, facts.brightest) == (True, 255)


def test_floating_point_from_0_to_1_becomes_8_bits(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[0, 1.5]], np.float32), "floating-point values from 0 to 1.5; scale them"),
        (np.array([[-0.5, 1]], np.float32), "floating-point values from -0.5 to 1; scale them"),
        (np.array([[np.nan, 1]], np.float32), "floating-point values from nan to nan; scale"),
        (np.array([[7, 9]], np.int32), "32-bit integers; save the image with 8 or 16 bits"),
    ],
)
def test_values_without_a_rule_are_refused(tmp_path: Path, values: np.ndarray, words: str) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    for read in (read_image, read_image_facts):
        with pytest.raises(UserError, match=words) as caught:
            read(path)
        assert str(caught.value).startswith(f"image {path} cannot be read: ")


RED = [200, 30, 40]


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGBA", "png"), ("P", "png"), ("P", "gif"), ("CMYK", "jpg"), ("CMYK", "tif"), ("RGB", "bmp")],
)
def test_every_color_mode_gives_its_color(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    image = Image.new("RGB", (6, 4), tuple(RED))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    options = {"transparency": 0} if mode == "P" else {"quality": 100} if mode == "CMYK" else {}
    image.save(path, **options)
    with Image.open(path) as opened:
        assert opened.mode in (mode, "RGB")
    for image_format, order in (("RGB", 1), ("BGR", -1)):
        pixels = read_image(path, image_format)
        assert pixels.shape == (4, 6, 3)
        assert pixels.flags.c_contiguous
        assert np.abs(pixels[2, 3].astype(int) - RED[::order]).max() <= 3


def test_transparency_is_ignored(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 2), (*RED, 0))
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", "RGB")[0, 0].tolist() == RED
    Image.new("LA", (2, 2), (77, 0)).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png", "RGB")[0, 0].tolist() == [77] * 3
    Image.new("1", (2, 2), 1).save(tmp_path / "c.png")
    assert read_image(tmp_path / "c.png", "RGB")[0, 0].tolist() == [255] * 3


def test_of_several_pages_the_first_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 3), tuple(RED)), Image.new("RGB", (9, 9))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    assert read_image(tmp_path / "a.tif", "RGB")[0, 0].tolist() == RED
    assert read_image_facts(tmp_path / "a.tif").pages == 2


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_damaged_images_are_refused(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"whole.{suffix}"
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    damaged = [data[: len(data) * part // 10] for part in range(1, 10)]
    if suffix == "png":  # a checksum is in PNG files only
        damaged += [data[:k] + bytes([data[k] ^ 4]) + data[k + 1 :] for k in range(60, 9000, 900)]
    for content in damaged:
        path.write_bytes(content)
        for read in (read_image, read_image_facts):
            with pytest.raises(UserError, match="cannot be read"):
                read(path)


def test_a_png_whose_end_was_never_written_is_refused(tmp_path: Path) -> None:
    """Pillow decodes it, and the rest of the pixels is black, or void."""
    path = tmp_path / "a.png"
    Image.fromarray(np.full((64, 64, 3), 9, dtype=np.uint8)).save(path)
    data = path.read_bytes()
    for end in range(40, len(data) - 4):  # the last 4 bytes are the checksum of nothing
        path.write_bytes(data[:end] + bytes(len(data) - end))
        readers = (read_image, read_image_facts, read_segment_map, read_index_map)
        for read in (*readers, possible_segment_maps):
            with pytest.raises(UserError, match="cut off, or one of its checksums is wrong"):
                read(path)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES - {".heic", ".heif"}))
def test_flipped_bits_give_pixels_or_a_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    try:
        Image.fromarray(pixels).save(path)
    except (KeyError, OSError, ValueError):
        pytest.skip("this Pillow does not write the format")
    data = path.read_bytes()
    refusals = []
    for bit in range(0, 8 * min(len(data), 600), 13):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        for read in (read_image, read_image_facts):
            try:
                read(path)
            except UserError as error:
                refusals.append(str(error))
    assert refusals
    assert "\n" not in "".join(refusals)


def test_other_programs_are_not_started_for_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png cannot be read: unknown image format \(datasets"):
        read_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png cannot be read: unknown image format \(datasets"):
        read_index_map(tmp_path / "a.png")


def test_heic_is_read_with_its_package(tmp_path: Path) -> None:
    path = tmp_path / "a.heic"
    try:
        from pillow_heif import from_pillow
    except ImportError:
        path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
        with pytest.raises(UserError, match=r"a\.heic .*HEIC needs the package pillow-heif"):
            read_image(path)
        return
    from_pillow(Image.new("RGB", (64, 48), tuple(RED))).save(path, quality=100)
    assert np.abs(read_image(path, "RGB").astype(int) - RED).max() <= 6


def test_a_missing_image_names_a_file_with_another_extension(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    for read in (read_image, read_image_facts):
        with pytest.raises(UserError, match=r"^image .*a\.jpg does not exist \(a\.png exists\)$"):
            read(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("wanted", "there", "hint"),
    [
        ("a.jpg", "a.JPG", "(a.JPG exists)"),
        ("a.jpg", "A.jpg", "(A.jpg exists)"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg", "(cafe\u0301.jpg exists)"),
        ("b\\a.jpg", "a.jpg", "(write / instead of \\ in file names)"),
    ],
)
def test_a_missing_file_has_a_likely_cause(
    tmp_path: Path, wanted: str, there: str, hint: str
) -> None:
    (tmp_path / there).touch()
    assert missing_file(tmp_path / wanted, "image") == (
        f"image {tmp_path / wanted} does not exist {hint}"
    )


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


def test_images_are_opened_in_one_place() -> None:
    folders = ("projects", "tools", "demo", "datasets")
    sources = [path for name in folders for path in (REPO_ROOT / name).rglob("*.py")]
    found = [path.name for path in sources if "Image.open(" in path.read_text()]
    assert sorted(found) == ["images.py", "runtime.py"]  # the second one runs without the package


@pytest.mark.parametrize("read", [read_image, read_image_facts, read_index_map])
@pytest.mark.parametrize("kind", ["EPS", "SPIDER", "DDS", "bomb"])
def test_unwanted_files_are_refused_by_every_reader(tmp_path: Path, read: Any, kind: str) -> None:
    path = tmp_path / "x.png"
    if kind == "bomb":
        Image.new("1", (20000, 20000)).save(path)
    else:
        mode = "F" if kind == "SPIDER" else "RGB"
        # Pillow remembers the ending of a file as that of its format.
        Image.new(mode, (40, 40)).save(tmp_path / "x.other", format=kind)
        (tmp_path / "x.other").rename(path)
    reason = "Image size" if kind == "bomb" else "unknown image format"
    with pytest.raises(UserError, match=rf"{path} cannot be read: {reason}"):
        read(path)


def test_large_images_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (30, 20)).save(path)
    content = bytearray(path.read_bytes())
    content[41:-12] = bytes(len(content) - 53)  # the pixels, which cannot be decoded any more
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x.png has 30 x 20 = 600 pixels, more than INPUT"):
        read_image(path, max_pixels=599)
    with pytest.raises(UserError, match="cannot be read"):
        read_image(path, max_pixels=600)


def test_the_default_limit_is_that_of_the_config_and_of_pillow() -> None:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    assert cfg.INPUT.MAX_PIXELS == images.MAX_PIXELS == Image.MAX_IMAGE_PIXELS
