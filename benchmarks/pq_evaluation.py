"""Panoptic quality by this project's evaluator, by Detectron2's evaluator and by panopticapi.

The metrics are asserted to be equal in the same run. Memory is measured after few and many images.
"""

import argparse
import contextlib
import gc
import io
import logging
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluator
from panopticapi.evaluation import pq_compute
from tabulate import tabulate

from batchformer_panoptic.engine.setup import at_least
from batchformer_panoptic.evaluation import PanopticEvaluator

from .measure import in_turns, median_ratio
from .panoptic_examples import DATASET, Work, random_example, registered

OURS, DETECTRON2, PANOPTICAPI = "streaming", "detectron2", "panopticapi"
LABELS = {
    OURS: "this project's",
    DETECTRON2: "Detectron2's `COCOPanopticEvaluator`",
    PANOPTICAPI: "only panopticapi's `pq_compute`, predictions already on disk",
}
EVALUATORS: dict[str, Callable[[], DatasetEvaluator]] = {
    OURS: lambda: PanopticEvaluator(DATASET, allow_subset=True),
    DETECTRON2: lambda: COCOPanopticEvaluator(DATASET),
}
GROUPS = {"": "All", "_th": "Things", "_st": "Stuff"}
KEYS = [metric + group for metric in ("PQ", "SQ", "RQ") for group in GROUPS]
PACKAGES = ("numpy", "Pillow", "panopticapi-lite")
Metrics = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=at_least(1), nargs=2, default=[480, 640], metavar=("H", "W"))
    parser.add_argument(
        "--segments", type=at_least(1), default=14, help="of an image, besides void"
    )
    parser.add_argument("--images", type=at_least(1), default=50, help="evaluated in one round")
    parser.add_argument(
        "--memory-images",
        type=at_least(1),
        nargs=2,
        default=[50, 500],
        metavar=("FEW", "MANY"),
        help="after how many images memory is taken",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    examples = [random_example(seed, *args.size, args.segments) for seed in range(args.images)]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        with registered(Path(folder) / "speed", examples, args.images) as work:
            functions: dict[str, Callable[[], Metrics]] = {
                OURS: lambda: by_evaluator(OURS, work),
                DETECTRON2: lambda: by_evaluator(DETECTRON2, work),
                PANOPTICAPI: lambda: by_panopticapi(work),
            }
            metrics = {name: function() for name, function in functions.items()}
            difference = largest_difference(metrics)
            times = in_turns(functions, args.rounds)
        with registered(Path(folder) / "memory", examples, max(args.memory_images)) as work:
            held = {name: held_bytes(name, work, args.memory_images) for name in EVALUATORS}
    rows = [
        {
            "evaluator": name,
            "seconds_per_image": statistics.median(times[name]) / args.images,
            "against_streaming": median_ratio(times[name], times[OURS]),
            "bytes_held": held.get(name),
        }
        for name in functions
    ]
    return {
        "rounds": args.rounds,
        "size": args.size,
        "images": args.images,
        "segments": statistics.mean(len(example.truth.segments) for example in examples),
        "memory_images": args.memory_images,
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "metrics": metrics[OURS],
        "largest_difference": difference,
        "rows": rows,
    }


def by_evaluator(name: str, work: Work) -> Metrics:
    """Evaluate all images one at a time; return the averages in percent."""
    evaluator = EVALUATORS[name]()
    evaluator.reset()
    process(evaluator, work, len(work.inputs))
    return dict(evaluator.evaluate()["panoptic_seg"])


def process(evaluator: DatasetEvaluator, work: Work, num_images: int) -> None:
    for row, output in zip(work.inputs[:num_images], work.outputs[:num_images], strict=True):
        segment_map, segments = output["panoptic_seg"]
        # Copies, because Detectron2's evaluator changes the segments in place.
        copies = [dict(segment) for segment in segments]
        evaluator.process([row], [{"panoptic_seg": (segment_map, copies)}])


def by_panopticapi(work: Work) -> Metrics:
    with contextlib.redirect_stdout(io.StringIO()):
        result = pq_compute(str(work.folder / "truth.json"), str(work.folder / "predicted.json"))
    return {key: 100 * result[GROUPS[key[2:]]][key[:2].lower()] for key in KEYS}


def largest_difference(metrics: dict[str, Metrics]) -> float:
    """Largest difference to the other evaluators, of ratios from 0 to 1; asserted to be small."""
    assert all(set(values) == set(KEYS) for values in metrics.values()), metrics
    difference = max(
        abs(values[key] - metrics[OURS][key]) / 100 for values in metrics.values() for key in KEYS
    )
    assert difference <= 1e-12, metrics
    return difference


def held_bytes(name: str, work: Work, numbers: list[int]) -> list[int]:
    """Bytes of Python and numpy objects that an evaluator keeps after a number of images."""
    held = []
    for number in numbers:
        evaluator = EVALUATORS[name]()
        evaluator.reset()
        gc.collect()
        tracemalloc.start()
        try:
            process(evaluator, work, number)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    return held


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the tables that the evaluators log."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def table(result: dict[str, Any]) -> str:
    few, many = result["memory_images"]
    header = ["evaluator", "ms per image", "÷ the first", f"kB held after {few}", f"after {many}"]
    rows = [
        [
            LABELS[row["evaluator"]],
            f"{1e3 * row['seconds_per_image']:.1f}",
            f"{row['against_streaming']:.2f}",
            *(f"{number / 1e3:.0f}" for number in row["bytes_held"] or ()),
        ]
        for row in result["rows"]
    ]
    difference = f"Largest difference of PQ, SQ and RQ: {result['largest_difference']:.0e}."
    return f"{tabulate(rows, header, tablefmt='github', disable_numparse=True)}\n\n{difference}"
