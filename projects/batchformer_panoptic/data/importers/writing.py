"""Writes a `Source` as COCO panoptic, as COCO instances, or as semantic and instance PNGs.

H, W: height and width of an image in pixels.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from panopticapi.utils import id2rgb
from PIL import Image
from pycocotools import mask as mask_utils
from tqdm import tqdm

from ...errors import UserError, did_you_mean
from ..class_table import ClassTable
from ..images import read_image_facts, write_image
from ..io import write_json, writing
from ..segment_maps import segment_extents, turn_by_exif
from .source import (
    SPLITS,
    Category,
    Sample,
    Segment,
    Size,
    Source,
    decode,
    encode,
    malformed,
    union,
)

SegmentMap = npt.NDArray[np.int32]

# Order of painting: later segments cover earlier ones.
OVERLAPS: dict[str, Callable[[Segment], Any]] = {
    # A crowd is the rest around the objects that are told apart.
    "smaller": lambda segment: (not segment.is_crowd, -int(mask_utils.area(segment.rle))),
    "file": lambda segment: 0,
    "z-order": lambda segment: segment.z,
}

_VOID = -1  # marked as void, which the background must not fill


# ---------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------


def choose_classes(
    source: Source, things: Sequence[str], stuff: Sequence[str], background: str | None
) -> Source:
    """Return the source with complete categories.

    Args:
        source: the data set.
        things: names of classes that become things.
        stuff: names of classes that become stuff.
        background: name of a class for pixels without a segment: a new one, or one of the source,
            which becomes stuff. None: no class.

    Raises:
        UserError: an unknown name, one name for two kinds, or categories that are not usable.
    """
    names = [category["name"] for category in source.categories]
    for name in (*things, *stuff):
        if name not in names:
            raise UserError(f"unknown class {name!r}{did_you_mean(name, names)}")
    stuff = [*stuff, *([] if background is None else [background])]
    if both := sorted(set(things) & set(stuff)):
        raise UserError(f"class {both[0]!r} is both a thing and stuff: name it once")
    if things and not source.has_objects:
        raise UserError(
            f"class {things[0]!r} cannot be a thing: the masks do not tell its objects apart"
        )
    kinds = dict.fromkeys(things, 1) | dict.fromkeys(stuff, 0)
    categories = [
        {**category, "isthing": kinds.get(category["name"], category["isthing"])}
        for category in source.categories
    ]
    if background is not None and background not in names:
        new_id = max((category["id"] for category in categories), default=0) + 1
        categories.append({"id": new_id, "name": background, "isthing": 0})
    return replace(source, categories=ClassTable.from_categories(categories).to_json())


# ---------------------------------------------------------------------------
# Segment maps
# ---------------------------------------------------------------------------


class Picture(NamedTuple):
    """An image with the segments that are visible in it.

    Attributes:
        image_id: unique in the data set.
        file_name: of the image; unique in its split, also without its suffix.
        segment_map: (H, W) int32; 0 is void.
        segments: COCO's ``segments_info``.
    """

    image_id: int
    file_name: str
    segment_map: SegmentMap
    segments: list[dict[str, Any]]


def paint(
    segments: Sequence[Segment],
    size: Size,
    categories: Mapping[str, Category],
    overlap: str,
    background: str | None,
    notes: Counter[str],
) -> tuple[SegmentMap, dict[int, Segment]]:
    """Paint segments over one another, so that each pixel has one.

    Args:
        segments: in the order of the file.
        size: of the image.
        categories: by name. A stuff class becomes one segment.
        overlap: one of `OVERLAPS`.
        background: class of the remaining pixels; None leaves them void.
        notes: counts segments without a pixel.

    Returns:
        (H, W) int32 with ids from 1 on, and a segment with the class of each id.
    """
    segment_map = np.zeros(size, np.int32)
    owners: dict[int, Segment] = {}
    stuff_ids: dict[str, int] = {}
    for segment in sorted(_join_groups(segments), key=OVERLAPS[overlap]):
        name = segment.category
        if mask_utils.area(segment.rle) == 0:
            notes["segment without a pixel, left out"] += 1
            continue
        if name is None:
            segment_map[decode(segment.rle)] = _VOID
            continue
        new_id = len(owners) + 1
        is_stuff = not categories[name]["isthing"]
        number = stuff_ids.setdefault(name, new_id) if is_stuff else new_id
        owners.setdefault(number, segment._replace(is_crowd=segment.is_crowd and not is_stuff))
        segment_map[decode(segment.rle)] = number
    if background is not None and not segment_map.all():
        number = stuff_ids.get(background, len(owners) + 1)
        owners.setdefault(number, Segment(background, {}))
        segment_map[segment_map == 0] = number
    segment_map[segment_map == _VOID] = 0
    return segment_map, owners


def _join_groups(segments: Sequence[Segment]) -> list[Segment]:
    """Return the segments with those of one class and group joined, in place of the first."""
    groups: dict[Any, list[Segment]] = defaultdict(list)
    for number, segment in enumerate(segments):
        key = (number,) if segment.group is None else (segment.category, segment.group)
        groups[key].append(segment)
    return [
        found[0]._replace(rle=union([part.rle for part in found]), z=max(part.z for part in found))
        for found in groups.values()
    ]


# ---------------------------------------------------------------------------
# Files of one split
# ---------------------------------------------------------------------------


def write_panoptic(
    folder: Path, split: str, pictures: Iterator[Picture], categories: list[Category]
) -> None:
    """Write COCO panoptic: ``panoptic_SPLIT/*.png`` and ``annotations/panoptic_SPLIT.json``."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for picture in pictures:
        png = f"{Path(picture.file_name).stem}.png"
        write_image(folder / f"panoptic_{split}" / png, id2rgb(picture.segment_map))
        images.append(_image_record(picture))
        annotations.append(
            {
                "image_id": picture.image_id,
                "file_name": png,
                "segments_info": picture.segments,
            }
        )
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "annotations" / f"panoptic_{split}.json", content)


def write_instances(
    folder: Path, split: str, pictures: Iterator[Picture], categories: list[Category]
) -> None:
    """Write COCO instances, ``annotations/instances_SPLIT.json``: things, as run lengths."""
    things = {category["id"] for category in categories if category["isthing"]}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for picture in pictures:
        images.append(_image_record(picture))
        for segment in picture.segments:
            if segment["category_id"] in things:
                rle = encode(picture.segment_map == segment["id"])
                annotations.append(
                    {
                        **segment,
                        "id": len(annotations) + 1,
                        "image_id": picture.image_id,
                        "segmentation": {**rle, "counts": rle["counts"].decode("ascii")},
                    }
                )
    kept = [category for category in categories if category["id"] in things]
    content = {"images": images, "annotations": annotations, "categories": kept}
    write_json(folder / "annotations" / f"instances_{split}.json", content)


def write_masks(
    folder: Path, split: str, pictures: Iterator[Picture], categories: list[Category]
) -> None:
    """Write ``semantic_SPLIT/*.png``, ``instance_SPLIT/*.png`` and ``classes.json``.

    A semantic PNG has the position of the class in classes.json, and the largest value of its 8
    bits (16 from 256 classes on) for void. An instance PNG, of 16 bits, numbers the things of an
    image from 1 on, crowds included; all else is 0.
    """
    things = {category["id"] for category in categories if category["isthing"]}
    index = {category["id"]: number for number, category in enumerate(categories)}
    kind = np.uint8 if len(categories) < 256 else np.uint16
    folders = [folder / f"{name}_{split}" for name in ("semantic", "instance")]
    for path in folders:
        path.mkdir(parents=True)
    for picture in pictures:
        # One row for each id; 0 is void.
        size = 1 + max((segment["id"] for segment in picture.segments), default=0)
        classes = np.full(size, np.iinfo(kind).max, kind)
        numbers = np.zeros(size, np.uint16)
        for segment in picture.segments:
            classes[segment["id"]] = index[segment["category_id"]]
            if segment["category_id"] in things:
                numbers[segment["id"]] = numbers.max() + 1
        for path, values in zip(folders, (classes, numbers), strict=True):
            png = path / f"{Path(picture.file_name).stem}.png"
            with writing(png):
                Image.fromarray(values[picture.segment_map]).save(png)
    write_json(folder / "classes.json", categories, indent=1)


TARGETS = {"panoptic": write_panoptic, "instances": write_instances, "masks": write_masks}


def _image_record(picture: Picture) -> dict[str, Any]:
    height, width = picture.segment_map.shape
    return {
        "id": picture.image_id,
        "file_name": picture.file_name,
        "height": height,
        "width": width,
    }


# ---------------------------------------------------------------------------
# The whole data set
# ---------------------------------------------------------------------------


@dataclass
class Summary:
    """Numbers of a conversion.

    Attributes:
        images: of each split.
        segments: of each class name.
        pixels: of each class name; None: void.
        most_segments: largest number of segments in one image.
    """

    images: Counter[str] = field(default_factory=Counter)
    segments: Counter[str] = field(default_factory=Counter)
    pixels: Counter[str | None] = field(default_factory=Counter)
    most_segments: int = 0

    def share(self, name: str | None) -> float:
        """Return the share of all pixels that belong to a class or to void, 0 to 1."""
        return self.pixels[name] / max(1, self.pixels.total())


def convert(
    source: Source,
    splits: Sequence[str],
    folder: Path,
    *,
    target: str,
    overlap: str,
    background: str | None,
) -> Summary:
    """Write a data set with its images.

    Args:
        source: the data set, as `choose_classes` returns it; reading it adds to its notes.
        splits: name of the split of each sample.
        folder: receives a folder of images for each split, and the files of the target.
        target: one of `TARGETS`.
        overlap: one of `OVERLAPS`.
        background: class of pixels without a segment; None leaves them void.

    Raises:
        UserError: an image or an annotation cannot be read, or their sizes disagree.
    """
    summary = Summary()
    categories = {category["name"]: category for category in source.categories}
    progress = tqdm(total=len(source.samples), desc="converting", disable=None)

    def pictures(split: str) -> Iterator[Picture]:
        stems: set[str] = set()
        for image_id, (sample, name) in enumerate(zip(source.samples, splits, strict=True), 1):
            if name != split:
                continue
            file_name = _free_name(sample.image, stems)
            path = folder / split / file_name
            _copy_image(sample, path)
            with malformed(f"the annotation of {sample.image}"):
                segment_map, owners = _read(
                    sample, path, categories, overlap, background, source.notes
                )
            segments = _describe(segment_map, owners, categories, source.notes)
            _count(summary, split, segment_map, owners, segments)
            progress.update()
            yield Picture(image_id, file_name, segment_map, segments)

    for split in (split for split in SPLITS if split in splits):
        (folder / split).mkdir(parents=True)
        TARGETS[target](folder, split, pictures(split), source.categories)
    progress.close()
    return summary


def _free_name(image: Path, stems: set[str]) -> str:
    """Return the name of an image, with a number if the stem is taken; case is ignored."""
    stem, number = image.stem, 1
    while stem.lower() in stems:
        number += 1
        stem = f"{image.stem}_{number}"
    stems.add(stem.lower())
    return stem + image.suffix


def _copy_image(sample: Sample, path: Path) -> None:
    with writing(path):
        if sample.content is None:
            shutil.copyfile(sample.image, path)
        else:
            path.write_bytes(sample.content)


def _read(
    sample: Sample,
    path: Path,
    categories: Mapping[str, Category],
    overlap: str,
    background: str | None,
    notes: Counter[str],
) -> tuple[SegmentMap, dict[int, Segment]]:
    """Read and paint a sample; the map has the size of the image after its rotation by EXIF."""
    size = read_image_facts(path, decode=False).size
    stated = sample.size or size
    segments = sample.read_segments(stated)
    segment_map, owners = paint(segments, stated, categories, overlap, background, notes)
    if stated != size:
        segment_map = turn_by_exif(segment_map, path)
        notes["annotation of an image as stored, turned like the image by its EXIF data"] += 1
    if segment_map.shape != size:
        raise UserError(
            f"image {sample.image} is {size[1]}x{size[0]}, but was annotated as "
            f"{stated[1]}x{stated[0]} (width x height): use the image that was annotated"
        )
    return segment_map, owners


def _describe(
    segment_map: SegmentMap,
    owners: Mapping[int, Segment],
    categories: Mapping[str, Category],
    notes: Counter[str],
) -> list[dict[str, Any]]:
    """Return COCO's ``segments_info``, without segments that others cover."""
    extents = segment_extents(segment_map)
    if hidden := len(owners) - len(extents):
        notes["segment completely covered by others, left out"] += hidden
    return [
        {
            "id": number,
            "category_id": categories[str(owners[number].category)]["id"],
            "area": extent.area,
            "bbox": list(extent.bbox_xywh),
            "iscrowd": int(owners[number].is_crowd),
        }
        for number, extent in extents.items()
    ]


def _count(
    summary: Summary,
    split: str,
    segment_map: SegmentMap,
    owners: Mapping[int, Segment],
    segments: Sequence[Mapping[str, Any]],
) -> None:
    summary.images[split] += 1
    summary.most_segments = max(summary.most_segments, len(segments))
    for segment in segments:
        name = owners[segment["id"]].category
        summary.segments[str(name)] += 1
        summary.pixels[name] += segment["area"]
    summary.pixels[None] += segment_map.size - sum(segment["area"] for segment in segments)
