"""Readers of label images: Pascal VOC, CVAT's segmentation masks and Cityscapes.

H, W: height and width of an image in pixels.
"""

from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from ...errors import UserError
from ..images import read_image, read_image_facts
from ..io import read_json
from ..segment_maps import read_index_map
from .source import (
    ImageIndex,
    Sample,
    Segment,
    Size,
    Source,
    check_mask_size,
    encode,
    only_file,
    polygon,
    split_of,
    things,
)

IndexMap = npt.NDArray[np.int32]
RGB = tuple[int, int, int]

# ---------------------------------------------------------------------------
# Pascal VOC, and CVAT's "Segmentation mask 1.1"
# ---------------------------------------------------------------------------

BACKGROUND, VOID = 0, 255
VOID_COLOR = (224, 224, 192)  # of index 255 in VOC's palette


def read_voc(files: list[Path], index: ImageIndex) -> Source:
    """Read the folders SegmentationClass and SegmentationObject.

    Index 0 is not a class, but the rest of the image. Index 255 is void. With a file labelmap.txt,
    as CVAT writes it, colors stand for the classes.

    Args:
        files: the folder SegmentationClass.
        index: the images.
    """
    class_folder = only_file(files)
    root = class_folder.parent
    object_folder = root / "SegmentationObject"
    index.leave_out(class_folder, object_folder)
    colors = _read_label_map(root / "labelmap.txt")
    listed = CLASS_NAMES if colors is None else colors
    classes = [name for name in listed if colors is None or colors[name] != (0, 0, 0)]
    source = Source(things(classes), [], has_objects=object_folder.is_dir())
    if not source.has_objects:
        source.notes["no folder SegmentationObject: every class is stuff"] += 1
        source.categories[:] = [{**category, "isthing": 0} for category in source.categories]
    for name, split in _voc_names(root, class_folder).items():
        class_png = class_folder / f"{name}.png"
        if not class_png.is_file() and split == "test":
            source.notes["image of the split test without a mask, left out"] += 1
        elif (found := index.find(name)) is not None:
            size = read_image_facts(class_png, decode=False).size if class_png.is_file() else None
            object_png = object_folder / f"{name}.png" if source.has_objects else None
            read = partial(_voc_segments, class_png, object_png, classes, colors)
            source.samples.append(Sample(found, read, split, size))
    return source


def _read_label_map(path: Path) -> dict[str, RGB] | None:
    """Return the color of each class in a labelmap.txt; None without the file."""
    if not path.is_file():
        return None
    colors: dict[str, RGB] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, color = line.split(":")[:2]
            red, green, blue = (int(value) for value in color.split(","))
            colors[name] = (red, green, blue)
    return colors


def _voc_names(root: Path, class_folder: Path) -> dict[str, str | None]:
    """Return the names of the annotated images, with their splits."""
    lists = sorted((root / "ImageSets" / "Segmentation").glob("*.txt"))
    parts = [path for path in lists if path.stem != "trainval"] or lists
    found: dict[str, str | None] = {
        line.strip(): split_of(path.stem)
        for path in parts
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    }
    masks = (path.relative_to(class_folder) for path in class_folder.rglob("*.png"))
    return found or {path.with_suffix("").as_posix(): None for path in sorted(masks)}


def _voc_segments(
    class_png: Path,
    object_png: Path | None,
    classes: list[str],
    colors: dict[str, RGB] | None,
    size: Size,
) -> list[Segment]:
    if not class_png.is_file():
        return []
    class_map = _read_classes(class_png, classes, colors)
    check_mask_size(class_png, class_map.shape, size)
    object_map = np.zeros_like(class_map)
    if object_png is not None:
        object_map = read_index_map(object_png) if colors is None else _read_packed(object_png)
        check_mask_size(object_png, object_map.shape, size)
    # An object of VOC has one class; pairs keep that true if a tool mixes them.
    pairs = class_map.astype(np.int64) << 32 | np.where(class_map == VOID, 0, object_map)
    segments = []
    for pair in np.unique(pairs):
        value = int(pair >> 32)
        if value not in (BACKGROUND, VOID, *range(1, len(classes) + 1)):
            raise UserError(
                f"{class_png} has the index {value}, and there are {len(classes)} classes: list "
                f"yours in a file {class_png.parent.parent.name}/labelmap.txt"
            )
        if value != BACKGROUND:
            name = None if value == VOID else classes[value - 1]
            segments.append(Segment(name, encode(pairs == pair)))
    return segments


def _read_classes(path: Path, classes: list[str], colors: dict[str, RGB] | None) -> IndexMap:
    """Return the (H, W) map of the classes: 0 for the rest, 255 for void, n for class n - 1."""
    if colors is None:
        return read_index_map(path)
    packed = _read_packed(path)
    indices = {
        _pack(color): classes.index(name) + 1 for name, color in colors.items() if name in classes
    }
    indices |= {0: BACKGROUND, _pack(VOID_COLOR): VOID} | indices
    found, inverse = np.unique(packed, return_inverse=True)
    if unknown := [value for value in found.tolist() if value not in indices]:
        color = (unknown[0] >> 16, unknown[0] >> 8 & 255, unknown[0] & 255)
        raise UserError(f"{path} has the color {color}, which labelmap.txt does not list")
    values = np.array([indices[value] for value in found.tolist()], np.int32)
    return values[inverse].reshape(packed.shape)


def _read_packed(path: Path) -> IndexMap:
    """Return the (H, W) colors of an image as integers."""
    return read_image(path, "RGB").astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)


def _pack(color: RGB) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


# ---------------------------------------------------------------------------
# Cityscapes
# ---------------------------------------------------------------------------

_IDS, _POLYGONS = "_gtFine_instanceIds.png", "_gtFine_polygons.json"


def cityscapes_files(folder: Path) -> list[Path]:
    """Return the annotation of each image below a folder: label images before polygons."""
    files = {path.name.removesuffix(_POLYGONS): path for path in folder.rglob(f"*{_POLYGONS}")}
    files |= {path.name.removesuffix(_IDS): path for path in folder.rglob(f"*{_IDS}")}
    return [files[stem] for stem in sorted(files)]


def read_cityscapes(files: list[Path], index: ImageIndex) -> Source:
    """Read gtFine with the published classes; all other labels are void.

    Args:
        files: ``*_gtFine_instanceIds.png`` or ``*_gtFine_polygons.json``.
        index: the images, ``*_leftImg8bit.png``.
    """
    index.leave_out(*{path.parent for path in files})
    source = Source([dict(category) for category in CITYSCAPES_CATEGORIES], [])
    for category in source.categories:
        category["color"] = list(category["color"])
    for path in files:
        stem = path.name.removesuffix(_IDS).removesuffix(_POLYGONS)
        split = next(filter(None, map(split_of, reversed(path.parent.parts))), None)
        if split == "test":
            source.notes["image of the split test, whose annotation is not public, left out"] += 1
        elif (found := index.find(f"{stem}_leftImg8bit.png", split=split)) is not None:
            read = partial(_ids_segments if path.name.endswith(_IDS) else _polygon_segments, path)
            source.samples.append(Sample(found, read, split))
    return source


def _ids_segments(path: Path, size: Size) -> list[Segment]:
    """Read instanceIds: label, or 1000 label + number of the object."""
    ids = read_index_map(path)
    check_mask_size(path, ids.shape, size)
    classes = {category["id"]: category for category in CITYSCAPES_CATEGORIES}
    segments = []
    for value in np.unique(ids).tolist():
        category = classes.get(value // 1000 if value >= 1000 else value)
        is_group = category is not None and bool(category["isthing"]) and value < 1000
        name = None if category is None else category["name"]
        segments.append(Segment(name, encode(ids == value), is_crowd=is_group))
    return segments


def _polygon_segments(path: Path, size: Size) -> list[Segment]:
    """Read polygons, the later ones on top; the label of a group of things ends with "group"."""
    classes = {category["name"]: category for category in CITYSCAPES_CATEGORIES}
    content = read_json(path)
    check_mask_size(path, (content["imgHeight"], content["imgWidth"]), size)
    segments = []
    for entry in content["objects"]:
        label = entry["label"]
        single = label.removesuffix("group")
        is_group = label not in classes and bool(classes.get(single, {}).get("isthing"))
        name = single if is_group else label if label in classes else None
        if not entry.get("deleted"):
            segments.append(Segment(name, polygon(entry["polygon"], size), is_crowd=is_group))
    return segments
