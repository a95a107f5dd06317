"""Small data sets with one fault each, and the table in docs/data_faults.md."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from panopticapi.utils import id2rgb
from PIL import Image

from helpers.commands import REPO_ROOT

PERSON, WALL, CROWD = 70_000, 300, 5  # segment ids of one, two and three bytes
DOCUMENT = REPO_ROOT / "docs" / "data_faults.md"
Content = dict[str, Any]
Spoil = Callable[[Path], None]


class Fault(NamedTuple):
    """A fault, and the kind of problem that it is."""

    done: str  # as said in the table
    kind: str
    spoil: Spoil  # changes the folder that `write_sound_set` has written


# ---------------------------------------------------------------------------
# A sound data set: two images of 6x8 pixels with a person, a wall, a crowd and void
# ---------------------------------------------------------------------------


def make_segment_map() -> np.ndarray:
    segment_map = np.zeros((6, 8), np.int64)
    segment_map[1:, :] = WALL
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


def sound_content() -> Content:
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


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_sound_set(root: Path, seed: int = 0) -> Path:
    """Write ``images``, ``panoptic`` and ``set.json``; the seed decides the images' pixels."""
    for folder in ("images", "panoptic"):
        (root / folder).mkdir(parents=True)
    for number in (11, 12):
        pixels = noise(100 * seed + number, 6, 8, 3)
        Image.fromarray(pixels).save(root / f"images/{number}.jpg", format="PNG")
        write_ids(root, make_segment_map(), number)
    write_content(root, sound_content())
    return root


def write_ids(root: Path, segment_map: np.ndarray, number: int = 11) -> None:
    Image.fromarray(id2rgb(segment_map)).save(root / f"panoptic/{number}.png")


def write_content(root: Path, content: Content) -> None:
    (root / "set.json").write_text(json.dumps(content))


# ---------------------------------------------------------------------------
# Changes of the JSON
# ---------------------------------------------------------------------------

SEGMENTS = "annotations.0.segments_info"


def change(edit: Callable[[Content], Any]) -> Spoil:
    def spoil(root: Path) -> None:
        content = json.loads((root / "set.json").read_text())
        edit(content)
        write_content(root, content)

    return spoil


def _find(content: Content, path: str) -> Any:
    """``content[...]...[...]``; the path is dotted, numbers index lists."""
    node: Any = content
    for part in path.split("."):
        node = node[int(part) if part.isdecimal() else part]
    return node


def set_value(path: str, value: object) -> Spoil:
    parent, _, last = path.rpartition(".")
    return change(
        lambda content: (_find(content, parent) if parent else content).update({last: value})
    )


def delete(path: str) -> Spoil:
    parent, _, last = path.rpartition(".")
    key: Any = int(last) if last.isdecimal() else last
    return change(lambda content: (_find(content, parent) if parent else content).pop(key))


def repeat(path: str) -> Spoil:
    def edit(content: Content) -> None:
        found = _find(content, path)
        found.append(copy.deepcopy(found[0]))

    return change(edit)


def append(path: str, value: object) -> Spoil:
    return change(lambda content: _find(content, path).append(value))


def write_json_bytes(data: bytes) -> Spoil:
    return lambda root: (root / "set.json").write_bytes(data) and None


def other_encoding(root: Path) -> None:
    text = (root / "set.json").read_text()
    (root / "set.json").write_bytes(text.encode("utf-16"))


def cut_json(root: Path) -> None:
    data = (root / "set.json").read_bytes()
    (root / "set.json").write_bytes(data[: len(data) // 2])


def with_byte_order_mark(root: Path) -> None:
    data = (root / "set.json").read_bytes()
    (root / "set.json").write_bytes(b"\xef\xbb\xbf" + data)


JSON_FAULTS = [
    Fault("the JSON is empty", "unreadable JSON", write_json_bytes(b" ")),
    Fault("the JSON is cut off", "unreadable JSON", cut_json),
    Fault("the JSON is a list", "unreadable JSON", write_json_bytes(b"[]")),
    Fault("the JSON is in UTF-16", "unreadable JSON", other_encoding),
    Fault("`categories` is null", "missing section", set_value("categories", None)),
    Fault("no `annotations`", "missing section", delete("annotations")),
    Fault("`images` is empty", "missing section", set_value("images", [])),
    Fault("a text among the images", "bad record", append("images", "x.jpg")),
    Fault("null among the segments", "bad record", append(SEGMENTS, None)),
    Fault("a category twice", "duplicate category id", repeat("categories")),
    Fault(
        "two categories of one name",
        "duplicate category name",
        set_value("categories.1.name", "person"),
    ),
    Fault("a category without id", "category without id", delete("categories.0.id")),
    Fault("a category id as text", "category without id", set_value("categories.0.id", "3")),
    Fault("a category without name", "category without name", delete("categories.0.name")),
    Fault("an empty category name", "category without name", set_value("categories.0.name", "")),
    Fault("no `isthing`", "category without isthing", delete("categories.0.isthing")),
    Fault(
        "`isthing` is a text", "category without isthing", set_value("categories.0.isthing", "1")
    ),
    Fault(
        "`isthing` is a list", "category without isthing", set_value("categories.0.isthing", [1])
    ),
    Fault("a color above 255", "bad category color", set_value("categories.0.color", [0, 300, 0])),
    Fault("a color of two values", "bad category color", set_value("categories.0.color", [0, 30])),
    Fault("an image without id", "bad image record", delete("images.0.id")),
    Fault("an image id is null", "bad image record", set_value("images.0.id", None)),
    Fault("an image without file name", "bad image record", delete("images.0.file_name")),
    Fault("a height as text", "bad image size", set_value("images.0.height", "6")),
    Fault("a width of 0", "bad image size", set_value("images.0.width", 0)),
    Fault("a width is null", "bad image size", set_value("images.0.width", None)),
    Fault("an image twice", "duplicate image id", repeat("images")),
    Fault(
        "image ids of two types",
        "mixed image ids",
        change(
            lambda c: (c["images"][0].update(id="11"), c["annotations"][0].update(image_id="11"))
        ),
    ),
    Fault("an annotated image is not listed", "annotation without image", delete("images.0")),
    Fault(
        "an `image_id` as text",
        "annotation without image",
        set_value("annotations.0.image_id", "11"),
    ),
    Fault(
        "an annotation without file name",
        "bad annotation record",
        delete("annotations.0.file_name"),
    ),
    Fault("an annotation twice", "duplicate annotation", repeat("annotations")),
    Fault("no `segments_info`", "no segments_info", delete(SEGMENTS)),
    Fault("`segments_info` is an object", "no segments_info", set_value(SEGMENTS, {})),
    Fault("a segment id of 0", "bad segment id", set_value(f"{SEGMENTS}.0.id", 0)),
    Fault("a negative segment id", "bad segment id", set_value(f"{SEGMENTS}.0.id", -7)),
    Fault("a segment id of 25 bits", "bad segment id", set_value(f"{SEGMENTS}.0.id", 256**3)),
    Fault("a segment id as text", "bad segment id", set_value(f"{SEGMENTS}.0.id", str(PERSON))),
    Fault("a segment id is null", "bad segment id", set_value(f"{SEGMENTS}.0.id", None)),
    Fault("a segment twice", "duplicate segment id", repeat(SEGMENTS)),
    Fault("`iscrowd` is 2", "bad iscrowd", set_value(f"{SEGMENTS}.0.iscrowd", 2)),
    Fault("`iscrowd` as text", "bad iscrowd", set_value(f"{SEGMENTS}.0.iscrowd", "0")),
    Fault("`iscrowd` is null", "bad iscrowd", set_value(f"{SEGMENTS}.0.iscrowd", None)),
    Fault("an area as text", "bad area", set_value(f"{SEGMENTS}.0.area", "9")),
    Fault("an area is null", "bad area", set_value(f"{SEGMENTS}.0.area", None)),
    Fault("a negative area", "bad area", set_value(f"{SEGMENTS}.0.area", -9)),
    Fault("an area with a fraction", "bad area", set_value(f"{SEGMENTS}.0.area", 9.5)),
    Fault(
        "a class that is not listed",
        "unknown category_id",
        set_value(f"{SEGMENTS}.0.category_id", 4),
    ),
    Fault(
        "a `category_id` as text",
        "unknown category_id",
        set_value(f"{SEGMENTS}.0.category_id", "3"),
    ),
    Fault(
        "a `category_id` of 40 digits",
        "unknown category_id",
        set_value(f"{SEGMENTS}.0.category_id", 10**39),
    ),
]


# ---------------------------------------------------------------------------
# Changes of files
# ---------------------------------------------------------------------------


def save_image(image: Image.Image, **options: Any) -> Spoil:
    return lambda root: image.save(root / "images/11.jpg", **options)


def rename(source: str, target: str) -> Spoil:
    return lambda root: (root / source).rename(root / target) and None


def write_file(name: str, data: bytes) -> Spoil:
    return lambda root: (root / name).write_bytes(data) and None


def cut(name: str) -> Spoil:
    def spoil(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])

    return spoil


def flip_bit(name: str) -> Spoil:
    def spoil(root: Path) -> None:
        data = bytearray((root / name).read_bytes())
        data[data.index(b"IDAT") + 20] ^= 1
        (root / name).write_bytes(data)

    return spoil


def transposed_with_exif(orientation: int) -> Spoil:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save_image(Image.fromarray(noise(11, 6, 8, 3)), format="PNG", exif=exif)


def convert_png(mode: str, **options: Any) -> Spoil:
    def spoil(root: Path) -> None:
        with Image.open(root / "panoptic/11.png") as image:
            converted = image.convert(mode)
        converted.save(root / "panoptic/11.png", **options)

    return spoil


def write_map(change_map: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return lambda root: write_ids(root, change_map(make_segment_map()))


def indices(root: Path, mode: str) -> None:
    """The positions of the segments in the list, plus 1, become ids and grey or palette values."""
    order = np.array([0, WALL, PERSON, CROWD])
    values = np.argmax(make_segment_map()[..., None] == order, axis=-1).astype(np.uint8)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.convert(mode).save(root / "panoptic/11.png")
    number = {PERSON: 2, WALL: 1, CROWD: 3}
    content = json.loads((root / "set.json").read_text())
    for segment in content["annotations"][0]["segments_info"]:
        segment["id"] = number[segment["id"]]
    write_content(root, content)


def deep_rgb(root: Path) -> None:
    rgb16 = id2rgb(make_segment_map())[..., ::-1].astype(np.uint16) * 257
    assert cv2.imwrite(str(root / "panoptic/11.png"), rgb16)


def jpeg(root: Path) -> None:
    with Image.open(root / "panoptic/11.png") as image:
        image.save(root / "panoptic/11.png", format="JPEG")


def through_jpeg(root: Path) -> None:
    with Image.open(root / "panoptic/11.png") as image:
        ids = np.kron(np.asarray(image), np.ones((7, 7, 1), np.uint8))
    Image.fromarray(ids).save(root / "large.jpg", quality=50)
    with Image.open(root / "large.jpg") as image:
        image.save(root / "panoptic/11.png")
    Image.fromarray(noise(11, 42, 56, 3)).save(root / "images/11.jpg")
    change(lambda c: c["images"][0].update(height=42, width=56))(root)


def swap_folders(root: Path) -> None:
    (root / "images").rename(root / "other")
    (root / "panoptic").rename(root / "images")
    (root / "other").rename(root / "panoptic")


SHAPE = (6, 8)
FILE_FAULTS = [
    Fault(
        "an image is missing", "missing image file", lambda root: (root / "images/11.jpg").unlink()
    ),
    Fault(
        "the suffix in upper case", "missing image file", rename("images/11.jpg", "images/11.JPG")
    ),
    Fault("another suffix", "missing image file", rename("images/11.jpg", "images/11.webp")),
    Fault(
        "a back slash in a name",
        "missing image file",
        set_value("images.0.file_name", "images\\11.jpg"),
    ),
    Fault("an image cut off", "unreadable image file", cut("images/11.jpg")),
    Fault("a flipped bit in a PNG image", "unreadable image file", flip_bit("images/11.jpg")),
    Fault("a text file as image", "unreadable image file", write_file("images/11.jpg", b"text")),
    Fault("an empty image file", "unreadable image file", write_file("images/11.jpg", b"")),
    Fault(
        "floating-point grey up to 255",
        "unreadable image file",
        save_image(Image.fromarray(np.full(SHAPE, 255, np.float32)), format="TIFF"),
    ),
    Fault(
        "floating-point grey with NaN",
        "unreadable image file",
        save_image(Image.fromarray(np.full(SHAPE, np.nan, np.float32)), format="TIFF"),
    ),
    Fault(
        "grey of 32-bit integers",
        "unreadable image file",
        save_image(Image.fromarray(np.full(SHAPE, 70_000, np.int32)), format="TIFF"),
    ),
    Fault(
        "height and width swapped",
        "wrong image size",
        change(lambda c: c["images"][0].update(height=8, width=6)),
    ),
    Fault("a rotation by EXIF missed", "wrong image size", transposed_with_exif(6)),
    Fault(
        "an image of another size",
        "wrong image size",
        save_image(Image.new("RGB", (16, 12)), format="PNG"),
    ),
    Fault("folders swapped", "swapped folders", swap_folders),
    Fault(
        "a PNG is missing", "missing panoptic PNG", lambda root: (root / "panoptic/11.png").unlink()
    ),
    Fault(
        "a PNG of another suffix",
        "missing panoptic PNG",
        rename("panoptic/11.png", "panoptic/11.bmp"),
    ),
    Fault("a PNG cut off", "unreadable panoptic PNG", cut("panoptic/11.png")),
    Fault("a flipped bit in a PNG", "unreadable panoptic PNG", flip_bit("panoptic/11.png")),
    Fault(
        "a PNG of another size",
        "wrong panoptic PNG size",
        write_map(lambda ids: np.pad(ids, ((0, 0), (0, 1)))),
    ),
    Fault("a grey PNG", "wrong PNG format", lambda root: indices(root, "L")),
    Fault("a palette PNG", "wrong PNG format", lambda root: indices(root, "P")),
    Fault("grey with alpha", "wrong PNG format", lambda root: indices(root, "LA")),
    Fault(
        "16-bit grey",
        "wrong PNG format",
        lambda root: Image.fromarray(make_segment_map().astype(np.uint16)).save(
            root / "panoptic/11.png"
        ),
    ),
    Fault("a JPEG as PNG", "wrong PNG format", jpeg),
    Fault(
        "red and blue swapped",
        "PNG red and blue swapped",
        write_map(lambda ids: (ids & 255) << 16 | ids & 0xFF00 | ids >> 16),
    ),
    Fault("grey saved as RGB", "PNG of grey values", lambda root: indices(root, "RGB")),
    Fault("a PNG that was a JPEG", "PNG without ids", through_jpeg),
    Fault(
        "a photograph as PNG",
        "PNG without ids",
        lambda root: Image.fromarray(noise(1, *SHAPE, 3)).save(root / "panoptic/11.png"),
    ),
    Fault(
        "colors of classes",
        "PNG without ids",
        write_map(lambda ids: np.where(ids == WALL, 0x40E0D0, 0x2222B2)),
    ),
    Fault(
        "a listed segment has no pixels",
        "JSON id not in PNG",
        append(SEGMENTS, make_segment(WALL, 9) | {"id": 77, "category_id": 3}),
    ),
    Fault("a segment is not listed", "PNG id not in JSON", delete(f"{SEGMENTS}.2")),
    Fault("a wrong area", "wrong area", set_value(f"{SEGMENTS}.0.area", 8)),
]
FAULTS = JSON_FAULTS + FILE_FAULTS


# ---------------------------------------------------------------------------
# Data sets that are read, with a warning or a note
# ---------------------------------------------------------------------------


def only_crowds(content: Content) -> None:
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["iscrowd"] = 1


def pages(root: Path) -> None:
    first, second = (Image.fromarray(noise(seed, *SHAPE, 3)) for seed in (11, 12))
    first.save(root / "images/11.jpg", format="TIFF", save_all=True, append_images=[second])


def far_parts(root: Path) -> None:
    ids = np.zeros((20, 60), np.int64)
    ids[5:15, 2:10] = ids[5:15, 50:58] = PERSON
    ids[0] = WALL
    write_ids(root, ids)
    Image.fromarray(noise(11, 20, 60, 3)).save(root / "images/11.jpg", format="PNG")
    segments = [
        {"id": PERSON, "category_id": 3, "area": 160, "bbox": [2, 5, 56, 10], "iscrowd": 0},
        {"id": WALL, "category_id": 9, "area": 60, "bbox": [0, 0, 60, 1], "iscrowd": 0},
    ]
    change(
        lambda c: (
            c["images"][0].update(height=20, width=60),
            c["annotations"][0].update(segments_info=segments),
        )
    )(root)


def mostly_void(root: Path) -> None:
    ids = np.where(make_segment_map() == PERSON, PERSON, 0)
    for number in (11, 12):
        write_ids(root, ids, number)
    change(lambda c: [a.update(segments_info=[make_segment(PERSON, 3)]) for a in c["annotations"]])(
        root
    )


def speck(root: Path) -> None:
    ids = make_segment_map()
    ids[0, 0] = 9
    write_ids(root, ids)
    segment = {"id": 9, "category_id": 3, "area": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0}
    append(SEGMENTS, segment)(root)


def no_segment(root: Path) -> None:
    set_value(SEGMENTS, [])(root)
    write_map(np.zeros_like)(root)


def copy_image(root: Path) -> None:
    (root / "images/12.jpg").write_bytes((root / "images/11.jpg").read_bytes())


def grey_image(pixels: np.ndarray) -> Spoil:
    return save_image(Image.fromarray(pixels), format="TIFF")


WARNINGS = [
    Fault("a byte-order mark", "byte-order mark", with_byte_order_mark),
    Fault("every category is a thing", "no stuff", set_value("categories.1.isthing", 1)),
    Fault("an image without annotation", "image without annotation", delete("annotations.0")),
    Fault("an image without height", "image without size", delete("images.0.height")),
    Fault(
        "`segments_info` is empty",
        "empty segments_info",
        no_segment,
    ),
    Fault("no `iscrowd`", "no iscrowd", delete(f"{SEGMENTS}.0.iscrowd")),
    Fault("no `area`", "no area", delete(f"{SEGMENTS}.0.area")),
    Fault("no `bbox`", "no bbox", delete(f"{SEGMENTS}.0.bbox")),
    Fault("a wrong box", "wrong bbox", set_value(f"{SEGMENTS}.0.bbox", [2, 1, 5, 4])),
    Fault("a box of texts", "wrong bbox", set_value(f"{SEGMENTS}.0.bbox", [2, 1, "x", 4])),
    Fault(
        "stuff in two segments",
        "stuff in several segments",
        set_value(f"{SEGMENTS}.0.category_id", 9),
    ),
    Fault("only crowds", "no targets", change(only_crowds)),
    Fault("much void", "much void", mostly_void),
    Fault("a speck", "speck", speck),
    Fault("a thing in two parts far apart", "parts far apart", far_parts),
    Fault("an RGBA PNG", "wrong PNG format", convert_png("RGBA")),
    Fault("a PNG of 16-bit RGB", "wrong PNG format", deep_rgb),
    Fault("one image under two ids", "one image under two ids", copy_image),
    Fault(
        "one file name under two ids",
        "one image under two ids",
        set_value("images.1.file_name", "11.jpg"),
    ),
    Fault("an image upside down by EXIF", "EXIF orientation", transposed_with_exif(3)),
    Fault("a 16-bit image", "16-bit image", grey_image(np.full(SHAPE, 60_000, np.uint16))),
    Fault("a floating-point image", "16-bit image", grey_image(np.full(SHAPE, 0.5, np.float32))),
    Fault("12 bits in 16", "dark 16-bit image", grey_image(np.full(SHAPE, 4095, np.uint16))),
    Fault("an image of two pages", "several pages", pages),
]


class Outcome(NamedTuple):
    """The lines about a fault, and the exit statuses."""

    doctor: str
    doctor_status: int
    trainer: str
    trainer_status: int


def render(outcomes: dict[str, Outcome]) -> str:
    """Return the document for the outcomes of all faults and warnings, by what was done."""
    return HEADER.format(
        errors="\n".join(_row(fault, outcomes[fault.done]) for fault in FAULTS),
        others="\n".join(_row(fault, outcomes[fault.done]) for fault in WARNINGS),
    )


def _row(fault: Fault, outcome: Outcome) -> str:
    cells = (fault.done, outcome.doctor, outcome.trainer or "nothing")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


HEADER = """# Faults of data sets, and the words about them

Data sets with one fault each, made by the tests; `SET` stands for the folder of the data set.
`UPDATE_FAULT_TABLE=1 pytest tests/data/validation/test_fault_table.py` writes this file.

## Refused

The checker exits with status 1. `train_net.py` exits with status 2 before it builds the model, if
the data set is for training or for evaluation.

| fault | `tools/check_dataset.py` | `train_net.py` |
|---|---|---|
{errors}

## Read with a warning or a note

The checker exits with status 0, and `train_net.py` logs the kinds of warnings.

| data set | `tools/check_dataset.py` | `train_net.py` |
|---|---|---|
{others}
"""
