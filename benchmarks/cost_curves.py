"""Growth of time and memory with images, pixels, segments, kept queries, objects and batch size.

Each curve doubles one number per step, and the steps are measured in turns. The model is that of
the quickstart with random weights. The same run asserts that results do not depend on the batch,
that the stated number of queries is kept, and that the mapper finds every segment.
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import prepare_shapes_panoptic
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.evaluation import inference_on_dataset
from panopticapi.utils import id2rgb
from PIL import Image
from tabulate import tabulate
from torch.nn import functional as F

from batchformer_panoptic.data import PanopticDatasetMapper, register_panoptic_dataset
from batchformer_panoptic.data.loader import build_test_loader
from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.setup import at_least
from batchformer_panoptic.evaluation import build_evaluator
from helpers.tiny_model import random_inputs

from .measure import exponent, in_turns, median_ratio, peak_bytes, python_peak_bytes
from .quickstart_cost import CONFIG, make_model
from .transformers_cost import training_step

Function = Callable[[], object]
Inputs = list[dict[str, Any]]
SIDE, OBJECTS, QUERIES = 96, 8, 64
MORE_QUERIES = ["MODEL.DETR.NUM_OBJECT_QUERIES", str(QUERIES)]
HEADS, HEAD_DIM = 8, 32  # of the curve for attention
PANOPTIC_ONLY = ["MODEL.PANOPTIC.INSTANCES_TEST", "False"]


class Curve(NamedTuple):
    """A function for each step, and the function that measures its memory."""

    steps: dict[int, Function]
    peak: Callable[[Function], int] = peak_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument(
        "--points", type=at_least(1), default=9, help="largest number of steps of a curve"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for name in args.curves:
            curve = CURVES[name](args.points, Path(folder))
            rows.append({"curve": name, **measured(curve, args.rounds)})
    return {"rounds": args.rounds, "rows": rows}


def measured(curve: Curve, rounds: int) -> dict[str, Any]:
    """Medians, their ratios at each doubling, and the exponent fitted to all steps."""
    times = in_turns({str(x): step for x, step in curve.steps.items()}, rounds)
    peaks = [curve.peak(step) for step in curve.steps.values()]
    seconds = [statistics.median(values) for values in times.values()]
    return {
        "steps": list(curve.steps),
        "seconds": seconds,
        "time_ratios": [median_ratio(b, a) for a, b in itertools.pairwise(times.values())],
        "time_exponent": exponent(list(curve.steps), seconds),
        "peak_bytes": peaks,
        "peak_ratios": [b / a for a, b in itertools.pairwise(peaks)],
        "peak_exponent": exponent(list(curve.steps), peaks),
    }


def evaluation_by_images(points: int, folder: Path) -> Curve:
    """Loading, inference and panoptic quality of a data set, in batches as in the quickstart."""
    counts = doublings(16, 4, points)
    with contextlib.redirect_stdout(io.StringIO()):
        numbers = ["--num-train", "1", "--num-val", str(max(counts))]
        assert prepare_shapes_panoptic.main(["--output", str(folder / "shapes"), *numbers]) == 0
    model = make_model("conditional", PANOPTIC_ONLY)
    model.inference_options = with_threshold(model, 0.0)
    steps = {n: partial(evaluate, model, registered(folder, n), folder) for n in counts}
    return Curve(steps, python_peak_bytes)


def registered(folder: Path, number: int) -> str:
    """Register the first images of the folder as a data set; return its name."""
    shapes, name = folder / "shapes", f"cost_curves_{number}"
    content = json.loads((shapes / "annotations" / "panoptic_val.json").read_text())
    for key in ("images", "annotations"):
        content[key] = content[key][:number]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)
    register_panoptic_dataset(name, str(shapes / "val"), str(shapes / "panoptic_val"), str(path))
    return name


def evaluate(model: torch.nn.Module, name: str, folder: Path) -> None:
    cfg = load_config(str(CONFIG), [*PANOPTIC_ONLY, "DATALOADER.NUM_WORKERS", "0"])
    evaluator = build_evaluator(cfg, name, str(folder))
    results = inference_on_dataset(model, build_test_loader(cfg, name), evaluator)
    assert results["panoptic_seg"]["PQ"] >= 0


def mapper_by_segments(points: int, folder: Path) -> Curve:
    """The training mapper on one image of 480 x 640 cut into rectangles."""
    flip = [T.HFlipTransform(640)]
    mapper = PanopticDatasetMapper(is_train=True, augmentations=flip, image_format="RGB")
    steps: dict[int, Function] = {}
    for count in doublings(16, 7, points):
        image = cut_image(folder, count)
        assert len(mapper(image)["instances"]) == count
        steps[count] = partial(mapper, image)
    return Curve(steps, python_peak_bytes)


def cut_image(folder: Path, segments: int) -> dict[str, Any]:
    """Return a dataset dict whose PNG has ``segments`` rectangles, a power of two."""
    down = 2 ** ((segments.bit_length() - 1) // 2)
    rows, columns = np.mgrid[:480, :640]
    ids = 1 + (rows * down // 480) * (segments // down) + columns * (segments // down) // 640
    png, image = folder / f"{segments}.png", folder / "image.png"
    Image.fromarray(id2rgb(ids)).save(png)
    Image.fromarray(np.zeros((480, 640, 3), dtype=np.uint8)).save(image)
    infos = [{"id": k, "iscrowd": 0, "category_id": 0} for k in range(1, segments + 1)]
    names = {"file_name": str(image), "pan_seg_file_name": str(png)}
    return {**names, "image_id": segments, "segments_info": infos}


def inference_by_pixels(points: int, _: Path) -> Curve:
    """One image, OBJECTS kept queries."""
    model = make_model("conditional", PANOPTIC_ONLY)
    return Curve(
        {h * w: inference(model, noise([(h, w)]), OBJECTS) for h, w in image_sizes(6, points)}
    )


def training_by_pixels(points: int, _: Path) -> Curve:
    """Two images, two streams, OBJECTS objects in each."""
    model = make_model("conditional")
    return Curve(
        {
            h * w: partial(training_step, model, noise([(h, w)] * 2))
            for h, w in image_sizes(5, points)
        }
    )


def attention_by_tokens(points: int, _: Path) -> Curve:
    """Self-attention of the encoder, the only part that is quadratic in the number of pixels."""

    def step(tokens: int) -> Function:
        x = torch.randn(1, HEADS, tokens, HEAD_DIM)
        return partial(F.scaled_dot_product_attention, x, x, x)

    return Curve({tokens: step(tokens) for tokens in doublings(256, 5, points)})


def inference_by_kept_queries(points: int, _: Path) -> Curve:
    """One image of 192 x 192 and QUERIES queries; the kept ones are decoded to masks."""
    model = make_model("conditional", PANOPTIC_ONLY + MORE_QUERIES)
    batch = noise([(2 * SIDE, 2 * SIDE)])
    return Curve({kept: inference(model, batch, kept) for kept in doublings(2, 5, points)})


def training_by_objects(points: int, _: Path) -> Curve:
    """Two images of 192 x 192 with equal numbers of objects, QUERIES queries."""
    model, sizes = make_model("conditional", MORE_QUERIES), [(2 * SIDE, 2 * SIDE)] * 2
    return Curve(
        {n: partial(training_step, model, noise(sizes, n)) for n in doublings(2, 6, points)}
    )


def inference_by_batch(points: int, _: Path) -> Curve:
    """Images of 96 x 96 in one batch."""
    model = make_model("conditional", PANOPTIC_ONLY)
    counts = doublings(1, 6, points)
    batch = noise([(SIDE, SIDE)] * max(counts))
    assert_batch_does_not_matter(model, batch)
    return Curve({n: inference(model, batch[:n], OBJECTS) for n in counts})


def training_by_batch(points: int, _: Path) -> Curve:
    """Images of 96 x 96 in one step, two streams."""
    model, counts = make_model("conditional"), doublings(1, 6, points)
    batch = noise([(SIDE, SIDE)] * max(counts))
    return Curve({n: partial(training_step, model, batch[:n]) for n in counts})


# Name in the table: function that builds the curve.
CURVES: dict[str, Callable[[int, Path], Curve]] = {
    "evaluation loop, images": evaluation_by_images,
    "training mapper, segments of an image": mapper_by_segments,
    "inference, pixels": inference_by_pixels,
    "training step, pixels": training_by_pixels,
    "attention of one encoder layer, tokens": attention_by_tokens,
    "inference, kept queries": inference_by_kept_queries,
    "training step, objects of an image": training_by_objects,
    "inference, images of a batch": inference_by_batch,
    "training step, images of a batch": training_by_batch,
}


def doublings(first: int, number: int, points: int) -> list[int]:
    return [first * 2**k for k in range(min(number, points))]


def image_sizes(number: int, points: int) -> list[tuple[int, int]]:
    """Heights and widths from 96 x 192 on, doubling the number of pixels."""
    sides = [SIDE * 2 ** ((k + 1) // 2) for k in range(number + 1)]
    return list(itertools.pairwise(sides))[: min(number, points)]


def noise(sizes: list[tuple[int, int]], objects: int = OBJECTS) -> Inputs:
    return random_inputs(sizes, [objects] * len(sizes))


def inference(model: torch.nn.Module, batch: Inputs, kept: int) -> Function:
    """Return a call of the model that keeps ``kept`` queries per image on average."""
    total, scores = kept * len(batch), model.scoring.decode(class_logits(model, batch)).scores
    scores = scores.flatten().sort(descending=True).values
    threshold = scores[total - 1 : total + 1].mean().item()
    assert (scores > threshold).sum() == total, "queries of equal scores"
    options = with_threshold(model, threshold)

    def call() -> object:
        model.inference_options = options
        return model.eval()(batch)

    return call


def with_threshold(model: torch.nn.Module, threshold: float) -> Any:
    options = model.inference_options
    return options._replace(panoptic=options.panoptic._replace(score_threshold=threshold))


def class_logits(model: torch.nn.Module, batch: Inputs) -> torch.Tensor:
    """(B, Q, K) of the last decoder layer in evaluation."""
    found: list[torch.Tensor] = []
    hook = model.box_head.register_forward_hook(lambda _, __, output: found.append(output[0][-1]))
    model.eval()(batch)
    hook.remove()
    return torch.cat(found).float()


def assert_batch_does_not_matter(model: torch.nn.Module, batch: Inputs) -> None:
    together = class_logits(model, batch)
    single = torch.cat([class_logits(model, [image]) for image in batch])
    assert torch.allclose(together, single, rtol=1e-4, atol=1e-4), (together - single).abs().max()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(disabled)


def table(result: dict[str, Any]) -> str:
    header = ["what, and what grows", "from, to", "time: times at each doubling", "exponent"]
    header += ["peak memory: times at each doubling", "exponent of memory"]
    rows = [
        [
            row["curve"],
            f"{row['steps'][0]}, {row['steps'][-1]}",
            " ".join(f"{ratio:.2f}" for ratio in row["time_ratios"]),
            f"{row['time_exponent']:.2f}",
            " ".join(f"{ratio:.2f}" for ratio in row["peak_ratios"]),
            f"{row['peak_exponent']:.2f}",
        ]
        for row in result["rows"]
    ]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
