"""Readers of tools that store shapes: labelme, CVAT, Label Studio, Supervisely, YOLO.

A reader takes coordinates as its tool does: continuous, with (0, 0) at the corner of the image and
pixel 0 from 0 to 1; only Supervisely's are pixels that belong to the shape.
"""

import base64
import io
import math
import re
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import yaml

from ...errors import UserError
from ..images import open_image
from ..io import read_json
from .source import (
    ImageIndex,
    Rle,
    Sample,
    Segment,
    Size,
    Source,
    ellipse,
    encode,
    images_below,
    malformed,
    only_file,
    paste,
    polygon,
    polygon_of_pixels,
    rectangle,
    rotate,
    split_of,
    things,
)

Record = dict[str, Any]
Notes = Counter[str]


def _no_area(what: str) -> str:
    return f"{what} without an area, left out"


def _as_rectangle(what: str) -> str:
    return f"{what} taken as a filled rectangle"


# ---------------------------------------------------------------------------
# labelme
# ---------------------------------------------------------------------------


def is_labelme(content: Any) -> bool:
    """Return whether parsed JSON is an annotation of labelme."""
    return isinstance(content, dict) and {"shapes", "imagePath"} <= content.keys()


def read_labelme(files: list[Path], index: ImageIndex) -> Source:
    """Read one JSON for each image; shapes with one label and group_id are one object."""
    contents = {path: read_json(path) for path in files}
    names = {shape["label"] for content in contents.values() for shape in content["shapes"]}
    source = Source(things(sorted(names)), [])
    for path, content in contents.items():
        embedded = content.get("imageData")
        name = content["imagePath"].replace("\\", "/")
        near = path.parent / name
        split = split_of(path.parent.name)
        if embedded and not near.is_file():
            image: Path | None = near
        else:
            image = index.find(name, near=path.parent, split=split)
            embedded = None
        if image is not None:
            read = partial(_labelme_segments, content["shapes"], source.notes)
            size = (content["imageHeight"], content["imageWidth"])  # of the turned image
            data = base64.b64decode(embedded) if embedded else None
            source.samples.append(Sample(image, read, split, size, data))
    return source


def _labelme_segments(shapes: list[Record], notes: Notes, size: Size) -> list[Segment]:
    segments = []
    for shape in shapes:
        kind, points = shape.get("shape_type") or "polygon", shape["points"]
        if kind in ("polygon", "oriented_rectangle"):
            rle = polygon(points, size)
        elif kind == "rectangle":
            (x0, y0), (x1, y1) = points
            rle = polygon(rectangle(x0, y0, x1 - x0, y1 - y0), size)
            notes[_as_rectangle("rectangle")] += 1
        elif kind == "circle":
            center, edge = points
            radius = math.dist(center, edge)
            rle = polygon(ellipse(center[0], center[1], radius, radius), size)
        elif kind == "mask":
            left, top = (int(value) for value in points[0])
            rle = paste(_decode_png(base64.b64decode(shape["mask"])), left, top, size)
        else:
            notes[_no_area(kind)] += 1
            continue
        segments.append(Segment(shape["label"], rle, group=shape.get("group_id")))
    return segments


def _decode_png(data: bytes) -> npt.NDArray[np.bool_]:
    """Return a (h, w) mask from an encoded image: its alpha channel, or what is not black."""
    image = open_image(io.BytesIO(data))
    if image.mode in ("LA", "RGBA"):
        image = image.getchannel("A")
    return np.asarray(image.convert("L")) > 0


# ---------------------------------------------------------------------------
# CVAT for images 1.1
# ---------------------------------------------------------------------------


def is_cvat(path: Path) -> bool:
    """Return whether an XML file is CVAT's, of images or of a video.

    Raises:
        UserError: the file is not XML.
    """
    with malformed(str(path)):
        root = ElementTree.parse(path).getroot()
    return root.tag == "annotations" and root.find("meta") is not None


def read_cvat(files: list[Path], index: ImageIndex) -> Source:
    """Read CVAT's XML of images; shapes with one label and group are one object."""
    roots = {path: ElementTree.parse(path).getroot() for path in files}
    names: dict[str, None] = {}  # in the order of the labels in CVAT
    for path, root in roots.items():
        if root.find("track") is not None:
            raise UserError(f"{path} has tracks: export 'CVAT for images 1.1' instead of video")
        names |= dict.fromkeys(label.findtext("name", "") for label in root.iter("label"))
        names |= dict.fromkeys(
            shape.attrib["label"] for shape in root.iterfind("image/*") if "label" in shape.attrib
        )
    source = Source(things([name for name in names if name]), [])
    for path, root in roots.items():
        for image in root.iterfind("image"):
            split = split_of(image.get("subset", ""))
            found = index.find(image.attrib["name"], near=path.parent / "images", split=split)
            if found is not None:
                read = partial(_cvat_segments, image, source.notes)
                size = (int(image.attrib["height"]), int(image.attrib["width"]))
                source.samples.append(Sample(found, read, split, size))
    return source


def _cvat_segments(image: ElementTree.Element, notes: Notes, size: Size) -> list[Segment]:
    segments = []
    for shape in image:
        if (rle := _cvat_mask(shape, size)) is None:
            notes[_no_area(f"CVAT {shape.tag}")] += 1
            continue
        if shape.tag == "box":
            notes[_as_rectangle("box")] += 1
        group = shape.get("group_id", "0")
        segments.append(
            Segment(
                shape.attrib["label"],
                rle,
                z=int(shape.get("z_order", 0)),
                group=None if group == "0" else group,
            )
        )
    return segments


def _cvat_mask(shape: ElementTree.Element, size: Size) -> Rle | None:
    """Return the mask of a shape; None for tags, points, lines and skeletons."""

    def values(*keys: str) -> list[float]:
        return [float(shape.attrib[key]) for key in keys]

    angle = float(shape.get("rotation", 0))
    if shape.tag == "polygon":
        pairs = shape.attrib["points"].split(";")
        return polygon([[float(value) for value in pair.split(",")] for pair in pairs], size)
    if shape.tag == "box":
        x0, y0, x1, y1 = values("xtl", "ytl", "xbr", "ybr")
        center = ((x0 + x1) / 2, (y0 + y1) / 2)
        return polygon(rotate(rectangle(x0, y0, x1 - x0, y1 - y0), angle, center), size)
    if shape.tag == "ellipse":
        x, y, radius_x, radius_y = values("cx", "cy", "rx", "ry")
        return polygon(rotate(ellipse(x, y, radius_x, radius_y), angle, (x, y)), size)
    if shape.tag == "mask":
        left, top, width, height = (
            int(value) for value in values("left", "top", "width", "height")
        )
        lengths = [int(value) for value in shape.attrib["rle"].split(",")]
        # Runs alternate between outside and inside, row by row within the box.
        flat = np.repeat(np.arange(len(lengths)) % 2, lengths)
        return paste(flat.reshape(height, width), left, top, size)
    return None


# ---------------------------------------------------------------------------
# Label Studio
# ---------------------------------------------------------------------------

# The prefix that Label Studio puts before the name of an uploaded file.
_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")


def is_label_studio(content: Any) -> bool:
    """Return whether parsed JSON is a list of Label Studio's tasks."""
    return (
        isinstance(content, list)
        and bool(content)
        and isinstance(content[0], dict)
        and ("annotations" in content[0] and "data" in content[0])
    )


def read_label_studio(files: list[Path], index: ImageIndex) -> Source:
    """Read Label Studio's export "JSON", of each task the ground truth or the latest annotation."""
    source = Source([], [])
    names: set[str] = set()
    for task in (task for path in files for task in read_json(path)):
        results = _label_studio_results(task, source.notes)
        if results is None:
            continue
        url = _label_studio_image(task)
        name = url.rpartition("/")[2]
        image = index.find(url, url.removesuffix(name) + _UPLOAD_PREFIX.sub("", name))
        if image is None:
            continue
        labels = {result["id"]: label for result in results if (label := _label_of(result))}
        names |= set(labels.values())
        sizes = [
            (r["original_height"], r["original_width"]) for r in results if "original_width" in r
        ]
        read = partial(_label_studio_segments, results, labels, source.notes)
        source.samples.append(Sample(image, read, None, sizes[0] if sizes else None))
    source.categories[:] = things(sorted(names))
    return source


def _label_studio_image(task: Record) -> str:
    """Return the path in the URL of a task's image."""
    texts = [value for value in task["data"].values() if isinstance(value, str)]
    url = urlsplit(next((text for text in texts if "/" in text or "." in text), ""))
    # Local storage: /data/local-files/?d=folder/name.jpg
    return parse_qs(url.query).get("d", [unquote(url.path)])[0].lstrip("/")


def _label_studio_results(task: Record, notes: Notes) -> list[Record] | None:
    """Return the regions of the annotation that counts; None if the task has none."""
    usable = [found for found in task["annotations"] if not found.get("was_cancelled")]
    if not usable:
        notes["task without a submitted annotation, left out"] += 1
        return None
    if len(usable) > 1:
        notes["task with several annotations, of which the ground truth or latest is taken"] += 1
    best = max(usable, key=lambda x: (bool(x.get("ground_truth")), str(x.get("updated_at", ""))))
    # Relations between regions have neither.
    return [result for result in best["result"] if {"id", "value"} <= result.keys()]


def _label_of(result: Record) -> str | None:
    """Return the label in a result of any kind of labels."""
    value = result["value"]
    found = value.get(result["type"]) if result["type"].endswith("labels") else None
    return found[0] if found else None


def _label_studio_segments(
    results: list[Record], labels: dict[str, str], notes: Notes, size: Size
) -> list[Segment]:
    segments = []
    for result in results:
        kind = result["type"].removesuffix("labels")
        if kind == "" or "original_width" not in result:
            continue  # the label of another result, or a choice for the whole image
        if result.get("image_rotation"):
            raise UserError("was rotated in Label Studio: turn the image itself and annotate it")
        if result["id"] not in labels:
            notes[f"Label Studio {kind} without a label, left out"] += 1
        elif (rle := _label_studio_mask(kind, result["value"], size)) is None:
            notes[_no_area(f"Label Studio {kind}")] += 1
        else:
            if kind == "rectangle":
                notes[_as_rectangle("rectangle")] += 1
            segments.append(Segment(labels[result["id"]], rle))
    return segments


def _label_studio_mask(kind: str, value: Record, size: Size) -> Rle | None:
    """Return the mask of a region, whose coordinates are percentages of the image."""
    height, width = size
    scale = np.array([width, height]) / 100
    if kind == "polygon":
        return polygon(np.asarray(value["points"], float) * scale, size)
    if kind == "brush":
        flat = decode_brush(value["rle"])
        return encode(flat.reshape(height, width, 4)[..., 3])
    if kind == "bitmask":
        return encode(_decode_png(base64.b64decode(value["imageDataURL"].partition(",")[2])))
    if kind not in ("rectangle", "ellipse"):
        return None
    # The corner of a rectangle, the center of an ellipse: both turn around it.
    x, y = value["x"] * scale[0], value["y"] * scale[1]
    if kind == "rectangle":
        points = rectangle(x, y, value["width"] * scale[0], value["height"] * scale[1])
    else:
        points = ellipse(x, y, value["radiusX"] * scale[0], value["radiusY"] * scale[1])
    return polygon(rotate(points, value.get("rotation", 0), (x, y)), size)


def decode_brush(data: list[int]) -> npt.NDArray[np.uint8]:
    """Decode the run lengths of Label Studio's brush (the format "rle-pack" of thi.ng/umbrella).

    The bits are a header (32: number of values; 5: bits of a value - 1; four times 4: bits of a
    length - 1) and runs: 1 bit, set if one value is repeated; 2 bits that choose one of the four
    lengths; the number of values - 1; then one value, or that many.

    Args:
        data: bytes, 0 to 255.

    Returns:
        (N,) uint8: the values of red, green, blue and alpha of every pixel, row by row.
    """
    bits = "".join(f"{byte:08b}" for byte in data)
    position = 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        return int(bits[position - count : position], 2)

    values = np.zeros(take(32), np.uint8)
    value_bits = take(5) + 1
    length_bits = [take(4) + 1 for _ in range(4)]
    start = 0
    while start < len(values):
        repeated = take(1)
        end = start + take(length_bits[take(2)]) + 1
        if repeated:
            values[start:end] = take(value_bits)
        else:
            values[start:end] = [take(value_bits) for _ in range(end - start)]
        start = end
    return values


# ---------------------------------------------------------------------------
# Supervisely
# ---------------------------------------------------------------------------


def read_supervisely(files: list[Path], index: ImageIndex) -> Source:
    """Read a project: meta.json, and the folders ann and img of its data sets.

    Args:
        files: the meta.json.
        index: the images.
    """
    meta_json = only_file(files)
    classes = [entry["title"] for entry in read_json(meta_json)["classes"]]
    source = Source(things(classes), [])
    for path in sorted(meta_json.parent.rglob("ann/*.json")):
        content = read_json(path)
        split = split_of(path.parents[1].name)
        name = path.name.removesuffix(".json")
        found = index.find(name, near=path.parents[1] / "img", split=split)
        if found is not None:
            size = (content["size"]["height"], content["size"]["width"])
            read = partial(_supervisely_segments, content["objects"], source.notes)
            source.samples.append(Sample(found, read, split, size))
    return source


def _supervisely_segments(objects: list[Record], notes: Notes, size: Size) -> list[Segment]:
    segments = []
    for found in objects:
        kind = found.get("geometryType") or ("bitmap" if found.get("bitmap") else "polygon")
        if kind == "bitmap":
            data = base64.b64decode(found["bitmap"]["data"])
            left, top = found["bitmap"]["origin"]
            # A zlib stream begins with 0x78; newer projects store the PNG as it is.
            crop = _decode_png(zlib.decompress(data) if data[0] == 0x78 else data)
            rle = paste(crop, left, top, size)
        elif kind == "polygon":
            rings = [found["points"]["exterior"], *found["points"].get("interior", [])]
            rle = polygon_of_pixels(rings, size)
        elif kind == "rectangle":
            (x0, y0), (x1, y1) = found["points"]["exterior"]
            rle = polygon_of_pixels([rectangle(x0, y0, x1 - x0, y1 - y0)], size)
            notes[_as_rectangle("rectangle")] += 1
        else:
            notes[_no_area(f"Supervisely {kind}")] += 1
            continue
        segments.append(Segment(found["classTitle"], rle, group=found.get("instance")))
    return segments


# ---------------------------------------------------------------------------
# YOLO segmentation
# ---------------------------------------------------------------------------


def is_yolo(path: Path) -> bool:
    """Return whether a YAML file describes a YOLO data set."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        return False
    return isinstance(content, dict) and "names" in content and "train" in content


def read_yolo(files: list[Path], index: ImageIndex) -> Source:
    """Read a data.yaml and its images; the label files are in folders "labels" beside "images".

    An image without a label file is one without objects, as in training with YOLO.

    Args:
        files: the data.yaml.
        index: the images.
    """
    path = only_file(files)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = content["names"]
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    source = Source(things([str(name) for name in names]), [])
    for split in ("train", "val", "test"):
        entries = content.get(split) or []
        for entry in [entries] if isinstance(entries, str) else entries:
            for image in _yolo_images(path, content.get("path") or "", entry):
                if index.find(image.name, near=image.parent) is None:
                    continue
                labels = _yolo_labels(image)
                read = partial(_yolo_segments, labels, [x["name"] for x in source.categories])
                source.samples.append(Sample(image, read, split))
    return source


def _yolo_images(data_yaml: Path, prefix: str, entry: str) -> list[Path]:
    """Return the images that an entry of data.yaml names: a folder, or a text file of paths.

    The path is often one of the machine that trained, so that it is also looked for beside the
    YAML, and without the leading dots that Roboflow writes.
    """
    root = data_yaml.parent
    candidates = [root / prefix / entry, root / entry, root / entry.lstrip("./")]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        raise UserError(f"{data_yaml}: {entry!r} does not exist below {root}")
    if found.is_dir():
        return list(images_below(found))
    lines = found.read_text(encoding="utf-8").splitlines()
    return [found.parent / line.strip() for line in lines if line.strip()]


def _yolo_labels(image: Path) -> Path:
    """Return the label file of an image: the last folder "images" becomes "labels"."""
    parts = list(image.with_suffix(".txt").parts)
    for position in range(len(parts) - 1, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts)


def _yolo_segments(labels: Path, names: list[str], size: Size) -> list[Segment]:
    if not labels.is_file():
        return []
    segments = []
    for number, line in enumerate(labels.read_text(encoding="utf-8").splitlines(), 1):
        fields = [float(text) for text in line.split()]
        if not fields:
            continue
        where = f"{labels}, line {number}"
        if len(fields) == 5:
            raise UserError(
                f"{where} is a box (class x y width height): export 'YOLO segmentation', with "
                "polygons"
            )
        points = np.reshape(fields[1:], (-1, 2))
        if not fields[0].is_integer() or not 0 <= fields[0] < len(names):
            raise UserError(f"{where}: class {fields[0]:g} is not among the {len(names)} names")
        if points.min() < -0.5 or points.max() > 1.5:
            raise UserError(f"{where}: coordinates are not shares of the image from 0 to 1")
        pixels = points.clip(0, 1) * size[::-1]
        segments.append(Segment(names[int(fields[0])], polygon(pixels, size)))
    return segments
