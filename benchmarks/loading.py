"""CPU time of reading and augmenting an image, in milliseconds, and images per second and core.

The images are random, with noise that makes the JPEGs about as large as COCO's, and segment maps as
ragged as COCO's. They are augmented as for DETR on COCO (`configs/coco/panoptic`).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tabulate import tabulate

from batchformer_panoptic.data import PanopticDatasetMapper
from batchformer_panoptic.data.images import read_image
from batchformer_panoptic.data.loader import seeded
from batchformer_panoptic.data.segment_maps import read_segment_map, write_segment_map
from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.setup import at_least

from .panoptic_examples import random_example
from .training_step import CONFIG

TRAINING = "all of a training image"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=at_least(1), nargs=2, default=[480, 640], metavar=("H", "W"))
    parser.add_argument("--images", type=at_least(1), default=16, help="default: %(default)s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    cfg = load_config(str(CONFIG))
    train, test = (PanopticDatasetMapper(cfg, is_train=is_train) for is_train in (True, False))
    with tempfile.TemporaryDirectory() as folder:
        dicts = [write_example(Path(folder), seed, *args.size) for seed in range(args.images)]
        kilobytes = statistics.mean(Path(x["file_name"]).stat().st_size / 1e3 for x in dicts)
        parts: dict[str, Callable[[dict[str, Any]], object]] = {
            "decoding the JPEG": lambda x: read_image(x["file_name"], "RGB"),
            "decoding the PNG": lambda x: read_segment_map(x["pan_seg_file_name"]),
            TRAINING: train,
            "all of a test image": test,
        }
        times: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(args.rounds):
            for name, part in parts.items():
                times[name].append(cpu_seconds(part, dicts))
    rows = [{"part": name, "seconds": statistics.median(times[name])} for name in parts]
    return {"rounds": args.rounds, "size": args.size, "kilobytes": kilobytes, "rows": rows}


def write_example(folder: Path, seed: int, height: int, width: int) -> dict[str, Any]:
    """Write an image and its segment map; return its dataset dict."""
    truth = random_example(seed, height, width, 14).truth
    generator = np.random.default_rng(seed)
    colors = generator.integers(0, 256, (2**16, 3))
    pixels = colors[truth.segment_map % 2**16] + generator.normal(0, 12, (height, width, 3))
    image, png = folder / f"{seed}.jpg", folder / f"{seed}.png"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(image, quality=90)
    write_segment_map(png, truth.segment_map)
    return {
        "file_name": str(image),
        "pan_seg_file_name": str(png),
        "image_id": seed,
        "segments_info": truth.segments,
    }


def cpu_seconds(part: Callable[[dict[str, Any]], object], dicts: list[dict[str, Any]]) -> float:
    """CPU seconds per image."""
    start = time.process_time()
    for number, dataset_dict in enumerate(dicts):
        with seeded(0, number):
            part(dataset_dict)
    return (time.process_time() - start) / len(dicts)


def table(result: dict[str, Any]) -> str:
    header = ["part", "ms of CPU time", "images per second and core"]
    rows = [
        [row["part"], f"{1e3 * row['seconds']:.1f}", f"{1 / row['seconds']:.0f}"]
        for row in result["rows"]
    ]
    return (
        f"{tabulate(rows, header, tablefmt='github', disable_numparse=True)}\n\n"
        f"JPEGs of {result['kilobytes']:.0f} kB."
    )
