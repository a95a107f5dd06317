"""Shared fixtures: seeding, script loading, a tiny synthetic data set."""

import importlib.util
import json
import logging
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.utils.logger import setup_logger
from PIL import Image

REPO_ROOT = Path(__file__).resolve().parents[1]


def load_script(relative_path: str) -> ModuleType:
    """Import a command of this repository (``tools/x.py``, ``train_net.py``) as a module."""
    path = REPO_ROOT / relative_path
    name = "script_" + relative_path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _log_handlers_end_with_the_test() -> Iterator[None]:
    """Detectron2 leaves handlers on a test's captured streams, which are closed afterwards."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "batchformer_panoptic")]
    before = [list(logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.propagate = True  # fixtures of a module have run before this one
    yield
    for logger, handlers in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.propagate = True
    setup_logger.cache_clear()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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


@pytest.fixture(scope="session")
def tiny_panoptic_dataset(tmp_path_factory: pytest.TempPathFactory) -> TinyPanopticDataset:
    """Five images of 48x64 and 40x32 pixels (height x width); the last one has no segments.

    Contiguous classes: 0 "box" and 2 "disc" are things, 1 "ground" and 3 "sky" are stuff. Images
    0 to 3 each have two boxes (one of them cut by a disc), a disc, ground, sky, a crowd of boxes
    and a void column at the right edge. Tests that change files work on a copy.
    """
    from batchformer_panoptic.data import register_panoptic_dataset

    root = tmp_path_factory.mktemp("tiny_panoptic")
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
        # One kind of file each: readers must not assume an extension.
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
