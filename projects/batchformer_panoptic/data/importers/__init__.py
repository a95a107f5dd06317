"""Annotations as tools write them, converted to COCO's panoptic format.

`recognise` names the format of a file or folder, `read_source` reads it into a `Source`, and
`writing.convert` writes that.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError, one_line
from . import coco, label_images, shapes
from .source import ImageIndex, Source, malformed, visible_below


class Format(NamedTuple):
    """A foreign format.

    Attributes:
        title: the tool, and its name for the format.
        read: reads the files that `recognise` found.
        overlap: default order of overlapping segments, one of `writing.OVERLAPS`.
        is_complete: pixels without a segment are void; False: they are background.
    """

    title: str
    read: Callable[[list[Path], ImageIndex], Source]
    overlap: str = "smaller"
    is_complete: bool = False


FORMATS = {
    "coco": Format("COCO instances", coco.read_coco),
    "roboflow": Format("Roboflow, 'COCO Segmentation'", coco.read_roboflow),
    "panoptic": Format("COCO panoptic", coco.read_panoptic, is_complete=True),
    "labelme": Format("labelme", shapes.read_labelme),
    "cvat": Format("CVAT, 'CVAT for images 1.1'", shapes.read_cvat, overlap="z-order"),
    "label-studio": Format("Label Studio, 'JSON'", shapes.read_label_studio),
    "supervisely": Format("Supervisely", shapes.read_supervisely, overlap="file"),
    "yolo": Format("YOLO segmentation", shapes.read_yolo),
    "voc": Format("Pascal VOC or CVAT, 'Segmentation mask 1.1'", label_images.read_voc),
    "cityscapes": Format(
        "Cityscapes gtFine", label_images.read_cityscapes, overlap="file", is_complete=True
    ),
}


def find_files(path: Path) -> dict[str, list[Path]]:
    """Return the annotation files at a path, by the name of their format.

    Raises:
        UserError: a JSON or XML file is malformed.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for file in visible_below(path) if path.is_dir() else [path]:
        if (name := _format_of(file)) is not None:
            found[name].append(file)
    if path.is_dir() and (files := label_images.cityscapes_files(path)):
        found["cityscapes"] = files
    # COCO's own folder also holds boxes with key points, of the same images.
    instances = [file for file in found["coco"] if file.name.startswith("instances_")]
    found["coco"] = instances or found["coco"]
    return {name: files for name, files in found.items() if files}


def _format_of(path: Path) -> str | None:
    """Return the format of a single file, or of a folder that makes a format."""
    if path.name == "SegmentationClass" and path.is_dir():
        return "voc"
    if path.name == coco.ROBOFLOW_NAME:
        return "roboflow"
    if path.name == "meta.json" and any(path.parent.rglob("ann/*.json")):
        return "supervisely"
    if path.suffix == ".json" and path.is_file():
        return _format_of_json(path)
    if path.suffix == ".xml" and shapes.is_cvat(path):
        return "cvat"
    if path.suffix in (".yaml", ".yml") and shapes.is_yolo(path):
        return "yolo"
    return None


def _format_of_json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from error
    tests = {
        "panoptic": coco.is_panoptic,
        "coco": coco.is_instances,
        "labelme": shapes.is_labelme,
        "label-studio": shapes.is_label_studio,
    }
    return next((name for name, test in tests.items() if test(content)), None)


def recognise(path: Path, name: str | None = None) -> tuple[str, list[Path]]:
    """Return the format of a file or folder and its annotation files.

    Args:
        path: what the user names as the data set.
        name: one of `FORMATS`; None: the only one that is found.

    Raises:
        UserError: the path does not exist, or holds no such format or several.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    found = find_files(path)
    if name is None:
        if len(found) > 1:
            raise UserError(
                f"{path} holds several formats, {', '.join(sorted(found))}: choose one with --from"
            )
        name = next(iter(found), None)
    if name is None or name not in found:
        raise UserError(
            f"{path} holds no {FORMATS[name].title if name else 'annotations of a known format'} "
            f"(known: {', '.join(FORMATS)}); archives have to be unpacked"
        )
    return name, found[name]


def refuse_foreign(path: Path) -> None:
    """Check that a path which should be COCO panoptic is not another format.

    Raises:
        UserError: names the format, and the command that converts it.
    """
    try:
        found = find_files(path) if path.exists() else {}
    except UserError:
        return  # a damaged file has no format; the caller finds the damage itself
    if found and "panoptic" not in found:
        name = next(iter(found))
        # labelme writes a file for each image.
        source = path.parent if name == "labelme" and path.is_file() else path
        raise UserError(
            f"{path} is {FORMATS[name].title} and not COCO panoptic; convert it with: "
            f"python tools/convert_dataset.py {source} DST --from {name}"
        )


def read_source(path: Path, name: str, files: list[Path], images: Path | None = None) -> Source:
    """Read a data set.

    Args:
        path: what the user named as the data set.
        name: its format.
        files: its annotation files.
        images: folder of the images; None: they are below ``path`` or, if that is a file or a
            folder of annotations, beside it.

    Raises:
        UserError: a file is malformed, an image is missing, or an image occurs twice.
    """
    root = path if path.is_dir() else path.parent
    root = root.parent if root.name in ("annotations", "gtFine") else root
    index = ImageIndex([images or root])
    with malformed(f"{path} as {name}"):
        source = FORMATS[name].read(files, index)
    index.check()
    if path.is_dir() and (unused := index.count_unused()):
        source.notes["image file without an annotation, left out"] += unused
    if not source.samples:
        raise UserError(f"{path}: no annotated image")
    seen: set[Path] = set()
    for sample in source.samples:
        if sample.image in seen:
            raise UserError(f"{path}: image {sample.image} is annotated twice; keep one of them")
        seen.add(sample.image)
    return source
