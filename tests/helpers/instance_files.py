"""A tiny handmade COCO-instances data set on disk."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# Neither contiguous nor in order; contiguous classes are 0 "cat" and 1 "dog".
CATEGORIES = [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}]
SIZES = ((48, 64), (40, 32), (32, 48))  # height, width


class InstanceFiles(NamedTuple):
    """Paths of the data set."""

    image_root: Path
    json_file: Path

    def row(self, name: str) -> list[str]:
        """Its row of DATASETS.CUSTOM_INSTANCES."""
        return [name, str(self.image_root), str(self.json_file)]


def content() -> dict[str, Any]:
    """Two boxes and a crowd in every image except the last one, without area; ids from 0."""
    images = [
        {"id": 10 + k, "file_name": f"{k}.png", "height": height, "width": width}
        for k, (height, width) in enumerate(SIZES)
    ]
    annotations: list[dict[str, Any]] = []
    for image in images[:-1]:
        for category_id, bbox, crowd in (
            (9, [2, 3, 10, 12], 0),
            (4, [15, 8, 14, 20], 0),
            (4, [0, 30, 30, 8], 1),
        ):
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image["id"],
                    "category_id": category_id,
                    "bbox": bbox,
                    "iscrowd": crowd,
                }
            )
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write_instances(folder: Path, **changes: Any) -> InstanceFiles:
    """Write images and JSON; `changes` replace top-level entries of the JSON."""
    files = InstanceFiles(folder / "images", folder / "boxes.json")
    files.image_root.mkdir(parents=True)
    for k, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(files.image_root / f"{k}.png")
    files.json_file.write_text(json.dumps({**content(), **changes}))
    return files
