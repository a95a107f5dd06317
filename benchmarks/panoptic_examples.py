"""Random panoptic images like those of COCO, written as a data set with predictions."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from panopticapi.utils import id2rgb
from PIL import Image

DATASET = "benchmark_of_panoptic_quality"
CATEGORIES = [
    {"id": 10 * number + 3, "name": f"class {number}", "isthing": int(number < 12)}
    for number in range(20)
]
_CONTIGUOUS = {category["id"]: index for index, category in enumerate(CATEGORIES)}
_THINGS = {category["id"] for category in CATEGORIES if category["isthing"]}


class Panoptic(NamedTuple):
    """A segment map (H, W) int32 with COCO's ``segments_info``; 0 is void."""

    segment_map: np.ndarray
    segments: list[dict[str, Any]]


class Example(NamedTuple):
    """One image."""

    truth: Panoptic
    prediction: Panoptic


class Work(NamedTuple):
    """A registered data set on disk, with predictions on disk and as model outputs."""

    folder: Path  # truth.json, truth/, predicted.json, predicted/
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]


def random_example(seed: int, height: int, width: int, num_segments: int) -> Example:
    """Return ragged regions with as many changes of id per row as in COCO (about 13).

    The prediction is the ground truth with smoother borders, other ids and some wrong classes.
    """
    rng = np.random.default_rng(seed)
    shape = (num_segments + 1, height, width)  # region 0 is void
    regions = _random_fields(rng, shape, ((3, 1.0), (12, 0.3)))
    fine = _random_fields(rng, shape, ((60, 0.06),))
    other = _random_fields(rng, shape, ((6, 0.12),))
    ids = np.concatenate(([0], rng.choice(2**24 - 1, num_segments, replace=False) + 1))
    all_classes = [category["id"] for category in CATEGORIES]
    classes = rng.choice(all_classes, num_segments + 1)
    guesses = np.where(rng.random(num_segments + 1) < 0.8, classes, rng.choice(all_classes))
    crowd = 1 if rng.random() < 0.3 else None
    true_regions = (regions + fine).argmax(0)
    predicted_regions = np.roll((regions + other).argmax(0), 2, axis=1)
    return Example(
        _panoptic(true_regions, ids, classes, crowd),
        _panoptic(predicted_regions, np.arange(num_segments + 1), guesses, None),
    )


def _random_fields(
    rng: np.random.Generator, shape: tuple[int, int, int], octaves: tuple[tuple[int, float], ...]
) -> np.ndarray:
    """Return smooth noise (C, H, W) float32: a weighted sum of enlarged random grids."""
    total = np.zeros(shape, dtype=np.float32)
    for cells, weight in octaves:
        grid = torch.from_numpy(rng.normal(size=(1, shape[0], cells, cells * 4 // 3))).float()
        resized = torch.nn.functional.interpolate(grid, size=shape[1:], mode="bicubic")
        total += weight * resized[0].numpy()
    return total


def _panoptic(
    regions: np.ndarray, ids: np.ndarray, classes: np.ndarray, crowd: int | None
) -> Panoptic:
    """Assign an id and a class to each region (H, W); 0 is void, ``crowd`` is a crowd."""
    areas = np.bincount(regions.ravel(), minlength=len(ids)).tolist()
    segments = [
        {
            "id": int(ids[region]),
            "category_id": int(classes[region]),
            "area": areas[region],
            "iscrowd": int(region == crowd),
        }
        for region in range(1, len(ids))
        if areas[region]
    ]
    return Panoptic(ids[regions].astype(np.int32), segments)


@contextlib.contextmanager
def registered(folder: Path, examples: list[Example], num_images: int) -> Iterator[Work]:
    """Write and register a data set that repeats the examples in turn."""
    folder.mkdir()
    chosen = [number % len(examples) for number in range(num_images)]
    _write(folder / "truth", [example.truth for example in examples], chosen)
    _write(folder / "predicted", [example.prediction for example in examples], chosen)
    MetadataCatalog.get(DATASET).set(
        panoptic_json=str(folder / "truth.json"),
        panoptic_root=str(folder / "truth"),
        thing_dataset_id_to_contiguous_id={k: v for k, v in _CONTIGUOUS.items() if k in _THINGS},
        stuff_dataset_id_to_contiguous_id={
            k: v for k, v in _CONTIGUOUS.items() if k not in _THINGS
        },
    )
    try:
        yield Work(
            folder,
            [{"image_id": number, "file_name": f"{number}.jpg"} for number in range(num_images)],
            [_model_output(examples[index].prediction) for index in chosen],
        )
    finally:
        MetadataCatalog.pop(DATASET)


def _write(folder: Path, images: list[Panoptic], chosen: list[int]) -> None:
    """Write each PNG once, and one annotation for each number in ``chosen``."""
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(id2rgb(image.segment_map)).save(folder / f"{index}.png")
    annotations = [
        {"image_id": number, "file_name": f"{index}.png", "segments_info": images[index].segments}
        for number, index in enumerate(chosen)
    ]
    content = {"annotations": annotations, "categories": CATEGORIES}
    folder.with_suffix(".json").write_text(json.dumps(content), encoding="utf-8")


def _model_output(prediction: Panoptic) -> dict[str, Any]:
    """Return a prediction in the output format of Detectron2's models."""
    segments = [
        {
            "id": segment["id"],
            "category_id": _CONTIGUOUS[segment["category_id"]],
            "isthing": segment["category_id"] in _THINGS,
        }
        for segment in prediction.segments
    ]
    return {"panoptic_seg": (torch.from_numpy(prediction.segment_map), segments)}
