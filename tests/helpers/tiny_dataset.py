"""A tiny data set in COCO panoptic format."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from batchformer_panoptic.data import register_panoptic_dataset


@dataclass(frozen=True)
class TinyPanopticDataset:
    """A COCO-panoptic data set on disk, registered under `name`."""

    name: str
    image_root: Path
    panoptic_root: Path
    panoptic_json: Path

    @property
    def row(self) -> list[str]:
        """Its row of DATASETS.CUSTOM_PANOPTIC."""
        return [self.name, str(self.image_root), str(self.panoptic_root), str(self.panoptic_json)]


def forget_dataset(name: str) -> None:
    """Remove a name from Detectron2's catalogs, so that other paths can be registered under it."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write_tiny_dataset(root: Path) -> TinyPanopticDataset:
    """Write and register the data set that the fixture ``tiny_panoptic_dataset`` describes."""
    dataset = TinyPanopticDataset(
        f"{root.name}_{id(root)}", root / "images", root / "png", root / "panoptic.json"
    )
    dataset.image_root.mkdir()
    dataset.panoptic_root.mkdir()
    content: dict[str, list[dict[str, object]]] = {
        "images": [],
        "annotations": [],
        # Not in the order of the ids.
        "categories": [
            {"id": 90, "name": "sky", "isthing": 0, "color": [70, 130, 180]},
            {"id": 3, "name": "box", "isthing": 1, "color": [220, 20, 60]},
            {"id": 7, "name": "ground", "isthing": 0, "color": [110, 110, 110]},
            {"id": 12, "name": "disc", "isthing": 1, "color": [0, 0, 142]},
        ],
    }
    for number in range(5):
        height, width = ((48, 64), (40, 32))[number % 2]
        category_ids, ids = _tiny_segments(number, height, width)
        # PNG and JPEG: readers must not assume an extension.
        file_name = f"{number:03d}.{('png', 'jpg')[number % 2]}"
        noise = np.random.default_rng(number).integers(0, 40, (height, width, 3))
        colors = noise + (ids[..., None] * np.array([53, 101, 17])) % 200
        Image.fromarray(colors.astype(np.uint8)).save(dataset.image_root / file_name)
        png = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(png).save(dataset.panoptic_root / f"{number:03d}.png")
        image_id = 100 + number
        content["images"].append(
            {"id": image_id, "file_name": file_name, "height": height, "width": width}
        )
        content["annotations"].append(
            {
                "image_id": image_id,
                "file_name": f"{number:03d}.png",
                "segments_info": [
                    _tiny_segment_info(segment_id, category_id, ids == abs(segment_id))
                    for segment_id, category_id in category_ids.items()
                ],
            }
        )
    dataset.panoptic_json.write_text(json.dumps(content))
    register_panoptic_dataset(*dataset.row)
    return dataset


def _tiny_segments(number: int, height: int, width: int) -> tuple[dict[int, int], np.ndarray]:
    """Category of each segment id (negative: a crowd) and the id of each pixel."""
    ids = np.zeros((height, width), dtype=np.int64)
    if number == 4:
        return {}, ids
    sky, ground, crowd, box, cut_box, disc = (1, 300, 70_000, 5, 6, 200_000 + number)
    rows, columns = np.mgrid[:height, :width]
    ids[:] = np.where(rows < height // 2, sky, ground)
    ids[-6:, :7] = crowd
    ids[4 : 10 + number, 3:9] = box
    ids[height // 2 - 5 : height // 2 + 6, 10:24] = cut_box
    ids[(rows - height // 2) ** 2 + (columns - 16 - number) ** 2 <= 16] = disc
    ids[:, -2:] = 0
    return {sky: 90, ground: 7, -crowd: 3, box: 3, cut_box: 3, disc: 12}, ids


def _tiny_segment_info(segment_id: int, category_id: int, mask: np.ndarray) -> dict[str, object]:
    rows, columns = np.nonzero(mask)
    left, top = int(columns.min()), int(rows.min())
    return {
        "id": abs(segment_id),
        "category_id": category_id,
        "iscrowd": int(segment_id < 0),
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top],
    }
