"""Small random panoptic data sets on disk, with predictions."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from panopticapi.utils import id2rgb
from PIL import Image

from batchformer_panoptic.evaluation import (
    ClassQuality,
    GroupQuality,
    PanopticEvaluator,
    PanopticQuality,
)

# Stuff between the things, and ids with gaps: nothing may rely on their order.
CATEGORIES = [
    {"id": 3, "name": "cat", "isthing": 1, "color": [255, 0, 0]},
    {"id": 7, "name": "grass", "isthing": 0, "color": [0, 255, 0]},
    {"id": 90, "name": "dog", "isthing": 1, "color": [0, 0, 255]},
    {"id": 200, "name": "sky", "isthing": 0, "color": [0, 255, 255]},
    {"id": 201, "name": "never seen", "isthing": 1, "color": [9, 9, 9]},
]
CONTIGUOUS = {category["id"]: index for index, category in enumerate(CATEGORIES)}
SIZE = (40, 56)
MAX_ID = 256**3 - 1


@dataclass
class PanopticImage:
    """A segment map (H, W) int64 with its segments in COCO's form (data set category ids)."""

    segment_map: np.ndarray
    segments_info: list[dict[str, Any]]


def random_truth(
    rng: np.random.Generator, category_ids: list[int], num_segments: int = 9
) -> PanopticImage:
    """Overlapping rectangles, some void, some crowd."""
    segment_map = np.zeros(SIZE, dtype=np.int64)
    ids = rng.choice(MAX_ID, num_segments, replace=False) + 1
    ids[0] = MAX_ID
    for segment_id in ids:
        top, left = rng.integers(0, SIZE[0] - 8), rng.integers(0, SIZE[1] - 8)
        bottom, right = top + rng.integers(6, 24), left + rng.integers(6, 32)
        segment_map[top:bottom, left:right] = segment_id
    return describe(segment_map, rng, category_ids, crowd_share=0.25)


def random_prediction(
    rng: np.random.Generator, truth: PanopticImage, category_ids: list[int]
) -> PanopticImage:
    """The truth shifted a little, with other ids, some wrong classes, new and lost segments."""
    segment_map = np.roll(truth.segment_map, rng.integers(-2, 3, 2), axis=(0, 1))
    for _ in range(3):
        top, left = rng.integers(0, SIZE[0] - 8), rng.integers(0, SIZE[1] - 8)
        segment_map[top : top + rng.integers(3, 12), left : left + rng.integers(3, 30)] = -top - 1
    classes = {info["id"]: info["category_id"] for info in truth.segments_info}
    values, compact = np.unique(segment_map, return_inverse=True)
    compact = compact.reshape(SIZE) + rng.integers(0, 2)  # with and without void
    prediction = describe(compact, rng, category_ids, crowd_share=0.0)
    offset = int(compact.min())
    for info in prediction.segments_info:
        old_class = classes.get(int(values[info["id"] - offset]))
        if old_class is not None and rng.random() < 0.8:
            info["category_id"] = old_class
    return prediction


def describe(
    segment_map: np.ndarray, rng: np.random.Generator, category_ids: list[int], crowd_share: float
) -> PanopticImage:
    """Give every id but 0 a random class."""
    segments_info = [
        {
            "id": int(segment_id),
            "category_id": int(rng.choice(category_ids)),
            "area": int(area),
            "iscrowd": int(rng.random() < crowd_share),
            "bbox": [0, 0, 1, 1],
        }
        for segment_id, area in zip(*np.unique(segment_map, return_counts=True), strict=True)
        if segment_id != 0
    ]
    rng.shuffle(segments_info)
    return PanopticImage(segment_map, segments_info)


def without_crowd(truth: PanopticImage) -> PanopticImage:
    """The best prediction: the truth without crowds, some of which would count as errors."""
    kept = [info for info in truth.segments_info if not info["iscrowd"]]
    on_kept = np.isin(truth.segment_map, [info["id"] for info in kept])
    return PanopticImage(np.where(on_kept, truth.segment_map, 0), kept)


def random_set(
    seed: int, num_images: int = 4, category_ids: tuple[int, ...] = (3, 7, 90, 200)
) -> tuple[list[PanopticImage], list[PanopticImage]]:
    """Draw truths and predictions."""
    rng = np.random.default_rng(seed)
    truths = [random_truth(rng, list(category_ids)) for _ in range(num_images)]
    return truths, [random_prediction(rng, truth, list(category_ids)) for truth in truths]


def write_panoptic(
    folder: Path, images: list[PanopticImage], categories: list[dict[str, Any]]
) -> Path:
    """Write ``folder``/*.png and ``folder``.json; image ids are 100, 101, ..."""
    folder.mkdir(parents=True)
    annotations = []
    for image_id, image in enumerate(images, 100):
        name = f"{image_id:06d}.png"
        Image.fromarray(id2rgb(image.segment_map)).save(folder / name)
        annotations.append(
            {"image_id": image_id, "file_name": name, "segments_info": image.segments_info}
        )
    path = folder.with_suffix(".json")
    path.write_text(json.dumps({"annotations": annotations, "categories": categories}))
    return path


@contextmanager
def registered(
    name: str,
    folder: Path,
    images: list[PanopticImage],
    categories: list[dict[str, Any]] | None = None,
    **extra: Any,
) -> Iterator[str]:
    """Write a data set and register metadata with one id space until the end of the block."""
    categories = CATEGORIES if categories is None else categories
    contiguous = {category["id"]: index for index, category in enumerate(categories)}
    things = {category["id"] for category in categories if category["isthing"]}
    names = [category["name"] for category in categories]
    metadata = MetadataCatalog.get(name)
    metadata.set(
        panoptic_json=str(write_panoptic(folder, images, categories)),
        panoptic_root=str(folder),
        thing_classes=names,
        stuff_classes=names,
        thing_dataset_id_to_contiguous_id={k: v for k, v in contiguous.items() if k in things},
        stuff_dataset_id_to_contiguous_id=contiguous,
        evaluator_type="coco_panoptic_seg",
        **extra,
    )
    try:
        yield name
    finally:
        MetadataCatalog.pop(name)


def resize_png(path: Path) -> None:
    """Make a panoptic PNG 5 pixels wide and 7 high."""
    Image.open(path).resize((5, 7), Image.Resampling.NEAREST).save(path)


def model_inputs(num_images: int) -> list[dict[str, Any]]:
    """The part of the model's inputs that evaluators read."""
    return [{"image_id": 100 + index, "file_name": f"{index}.jpg"} for index in range(num_images)]


def model_output(image: PanopticImage) -> dict[str, Any]:
    """A prediction in the form of a model output."""
    segments_info = [
        {
            "id": info["id"],
            "category_id": CONTIGUOUS[info["category_id"]],
            "isthing": bool(CATEGORIES[CONTIGUOUS[info["category_id"]]]["isthing"]),
            "area": info["area"],
        }
        for info in image.segments_info
    ]
    return {"panoptic_seg": (torch.from_numpy(image.segment_map).to(torch.int32), segments_info)}


class SavingEvaluator(PanopticEvaluator):
    """Also writes the predictions as annotations: ``folder``/*.png and ``folder``.json."""

    def __init__(self, dataset_name: str, folder: Path) -> None:
        super().__init__(dataset_name)
        self._folder = folder
        self._annotations: list[dict[str, Any]] = []
        folder.mkdir()

    def process(self, inputs: Any, outputs: Any) -> None:
        super().process(inputs, outputs)
        for row, output in zip(inputs, outputs, strict=True):
            segment_map, segments = output["panoptic_seg"]
            name = self._truth.images[row["image_id"]].png_name
            Image.fromarray(id2rgb(segment_map.numpy())).save(self._folder / name)
            infos = [
                {"id": x["id"], "category_id": self._truth.dataset_ids[x["category_id"]]}
                for x in segments
            ]
            self._annotations.append(
                {"image_id": row["image_id"], "file_name": name, "segments_info": infos}
            )

    def evaluate(self) -> Any:
        content = {"annotations": self._annotations}
        self._folder.with_suffix(".json").write_text(json.dumps(content))
        return super().evaluate()


def quality_from_json(values: Mapping[str, Any]) -> PanopticQuality:
    """Invert `PanopticQuality.to_json`; other keys are ignored."""
    groups = {
        name: None if values[name] is None else GroupQuality(**values[name])
        for name in ("all", "things", "stuff")
    }
    return PanopticQuality(
        **groups, per_class=tuple(ClassQuality(**row) for row in values["per_class"])
    )
