"""Write the Penn-Fudan pedestrians (Wang et al. 2007) in COCO's panoptic layout.

    python datasets/prepare_pennfudan.py PennFudanPed.zip --output datasets/pennfudan

The download is https://www.cis.upenn.edu/~jshi/ped_html/PennFudanPed.zip: 170 street photographs
with a mask of instance numbers each. A pedestrian is a thing, everything else the stuff class
"background".

    DIR/train, DIR/val, DIR/test             100, 30 and 40 photographs, unchanged
    DIR/panoptic_train, ...                  segment ids (RGB PNG, id = R + 256 G + 256^2 B)
    DIR/annotations/panoptic_{train,val,test}.json
    DIR/manifest.json                        the arguments, marked complete last

The split is always the same: the names in alphabetical order, shuffled with seed 7.
"""

import argparse
import io
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from panopticapi.utils import id2rgb
from PIL import UnidentifiedImageError

from batchformer_panoptic.data.images import open_image, read_image_facts, write_image
from batchformer_panoptic.data.io import PreparedFolder, write_json, writing
from batchformer_panoptic.data.segment_maps import segment_extents
from batchformer_panoptic.errors import UserError, command, one_line

NAMES = [
    *(f"FudanPed{number:05d}" for number in range(1, 75)),
    *(f"PennPed{number:05d}" for number in range(1, 97)),
]
SPLIT_SIZES = {"train": 100, "val": 30, "test": 40}
SPLIT_SEED = 7
CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1, "color": [220, 20, 60]},
    {"id": 2, "name": "background", "isthing": 0, "color": [110, 110, 110]},
]
PERSON, BACKGROUND = (category["id"] for category in CATEGORIES)
FORMAT_VERSION = 1  # increase it when the same download gives other files
TOP_FOLDER = "PennFudanPed"

Folder = Path | zipfile.Path


def find_root(source: Path) -> Folder:
    """Return the folder with PNGImages and PedMasks, in the zip file or on disk.

    Raises:
        UserError: there is none.
    """
    try:
        base: Folder = source if source.is_dir() else zipfile.Path(source)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{source} is no folder or readable zip file: {one_line(error)}") from error
    for root in (base, base / TOP_FOLDER):
        if (root / "PNGImages").is_dir():
            return root
    raise UserError(f"{source} has no folder {TOP_FOLDER}/PNGImages: name PennFudanPed.zip")


def read_bytes(root: Folder, folder: str, name: str) -> bytes:
    file = root / folder / name
    if not file.is_file():
        raise UserError(f"{root} lacks {folder}/{name}: download PennFudanPed.zip again")
    try:
        return file.read_bytes()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{folder}/{name} of {root} cannot be read: {one_line(error)}") from error


def read_instances(content: bytes, name: str) -> np.ndarray:
    """Return the instance number of each pixel (H, W) int64; 0 is background."""
    try:
        instances = np.asarray(open_image(io.BytesIO(content))).astype(np.int64)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"PedMasks/{name} cannot be read: {one_line(error)}") from error
    if instances.ndim != 2:
        raise UserError(f"PedMasks/{name} has {instances.shape[-1]} channels, not one")
    return instances


def split_names() -> dict[str, list[str]]:
    """Return the names of each split, in alphabetical order."""
    shuffled = NAMES.copy()
    random.Random(SPLIT_SEED).shuffle(shuffled)
    splits, start = {}, 0
    for split, size in SPLIT_SIZES.items():
        splits[split] = sorted(shuffled[start : start + size])
        start += size
    return splits


def write_example(root: Folder, output: Path, split: str, name: str) -> dict[str, Any]:
    """Write photograph and PNG; return its records in "images" and "annotations"."""
    file_name, mask_name, image_id = f"{name}.png", f"{name}_mask.png", NAMES.index(name) + 1
    photograph = output / split / file_name
    photograph.parent.mkdir(parents=True, exist_ok=True)
    content = read_bytes(root, "PNGImages", file_name)
    with writing(photograph):
        photograph.write_bytes(content)
    height, width = read_image_facts(photograph).size
    instances = read_instances(read_bytes(root, "PedMasks", mask_name), mask_name)
    if instances.shape != (height, width):
        raise UserError(
            f"PedMasks/{mask_name} has {instances.shape} pixels (height, width), its photograph "
            f"{(height, width)}"
        )
    segment_map = instances + 1  # 0 would be void
    write_image(output / f"panoptic_{split}" / file_name, id2rgb(segment_map))
    segments = [
        {
            "id": segment_id,
            "category_id": BACKGROUND if segment_id == 1 else PERSON,
            "area": extent.area,
            "bbox": extent.bbox_xywh,
            "iscrowd": 0,
        }
        for segment_id, extent in segment_extents(segment_map).items()
    ]
    return {
        "images": {"id": image_id, "file_name": file_name, "height": height, "width": width},
        "annotations": {
            "image_id": image_id,
            "file_name": file_name,
            "segments_info": segments,
        },
    }


def write_split(root: Folder, output: Path, split: str, names: list[str]) -> int:
    """Write photographs, PNGs and JSON of a split; return its number of pedestrians."""
    records = [write_example(root, output, split, name) for name in names]
    content = {key: [record[key] for record in records] for key in ("images", "annotations")}
    write_json(
        output / "annotations" / f"panoptic_{split}.json", {**content, "categories": CATEGORIES}
    )
    segments = (x for row in content["annotations"] for x in row["segments_info"])
    return sum(segment["category_id"] == PERSON for segment in segments)


def is_intact(output: Path) -> bool:
    """Return whether all files of a finished set still exist."""
    return all(
        (output / folder / f"{name}.png").is_file()
        for split, names in split_names().items()
        for folder in (split, f"panoptic_{split}")
        for name in names
    ) and all(
        (output / "annotations" / f"panoptic_{split}.json").is_file() for split in SPLIT_SIZES
    )


def prepare(source: Path, output: Path, overwrite: bool) -> str:
    """Make the set if it does not exist; return one line about the result.

    Raises:
        UserError: ``source`` is not the complete download, ``output`` holds something else, or an
            unfinished set and ``overwrite`` is False.
    """
    folder = PreparedFolder(output, {"generator": "pennfudan", "version": FORMAT_VERSION})
    if folder.is_done(lambda: is_intact(output), overwrite=overwrite):
        return f"{output}: already complete, nothing to do"
    root, splits = find_root(source), split_names()
    with folder.filling([*splits, *(f"panoptic_{split}" for split in splits), "annotations"]):
        counts = {split: write_split(root, output, split, names) for split, names in splits.items()}
    return f"{output}: " + ", ".join(
        f"{len(splits[split])} {split} images with {count} persons"
        for split, count in counts.items()
    )


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="PennFudanPed.zip, or the folder unpacked from it"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write, created if needed"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the set in --output")
    args = parser.parse_args(argv)
    try:
        print(prepare(args.source, args.output, args.overwrite))
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written: {one_line(error)}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
