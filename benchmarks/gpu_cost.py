"""Training and inference of the panoptic DETR on a GPU, in at most eight minutes.

DETR R50 with random weights, on images of 800 x 1066 with 12 objects. A step is that of the trainer
(forward, losses, backward, clipping, optimizer and logging) on a batch that is in memory. "As
published" decodes the masks of all queries with copies of the maps of an image for every query, and
stands for the published code. Number formats differ in nothing else: TF32 is off except where it is
named. Inference ends with the merged segments, and its threshold keeps 12 queries of an image.

An arm that fails, does not fit into memory or would begin after its share of the time has no
numbers but the reason. "--device cpu --tiny" rehearses the run, with numbers that mean nothing and
are saved only where --results says.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from batchformer_panoptic import prepare_for_inference
from batchformer_panoptic.engine import PanopticTrainer, load_config
from batchformer_panoptic.errors import UserError, one_line
from helpers.tiny_model import random_inputs

from .inference import (
    CONFIGS,
    NUM_CLASSES,
    NUM_THINGS,
    PLAIN,
    keep_best,
    random_input,
    random_weights,
)
from .inference import WITH_BLOCK as TWO_STREAMS
from .inference_ways import Case, Naive, with_head
from .measure import in_turns, median_ratio, peak_bytes, seconds
from .quickstart_cost import CONFIG as QUICKSTART
from .training_step import plain_mask_losses

Way = Callable[[], object]

LIMIT = 360.0  # seconds until the last arm begins
WARM_UP, FEWEST_ROUNDS = 2, 3
OBJECTS, KEPT = 12, 12
FULL_SIZE, TINY_SIZE = (800, 1066), (32, 64)
PUBLISHED, ONE, TWO = "as published, one stream", "one stream", "two streams"
TRAINING = [
    (PUBLISHED, "float32"),
    (PUBLISHED, "bfloat16"),
    (ONE, "float32"),
    (ONE, "bfloat16"),
    (TWO, "float32"),
    (TWO, "TF32"),
    (TWO, "float16"),
    (TWO, "bfloat16"),
    (TWO, "bfloat16, compiled"),
]
INFERENCE = {
    "default": None,
    "fast": {},
    "fast, TF32": {},
    "fast, bfloat16": {"bfloat16": True},
    "fast, bfloat16, compiled": {"bfloat16": True, "compile": True},
}
RATIOS = {
    "bfloat16 against float32, two streams": (f"{TWO}, float32", f"{TWO}, bfloat16"),
    "two streams against one, float32": (f"{TWO}, float32", f"{ONE}, float32"),
    "two streams against one, bfloat16": (f"{TWO}, bfloat16", f"{ONE}, bfloat16"),
}
# A model of seconds on a CPU.
TINY: list[Any] = ["MODEL.BACKBONE.NAME", "build_small_resnet_backbone"]
TINY += ["MODEL.SMALL_RESNET.STEM_CHANNELS", 8]
TINY += ["MODEL.SMALL_RESNET.STAGE_CHANNELS", [8, 12, 16, 20]]
TINY += ["MODEL.DETR.HIDDEN_DIM", 32, "MODEL.DETR.NHEADS", 4, "MODEL.DETR.DIM_FEEDFORWARD", 48]
TINY += ["MODEL.DETR.ENC_LAYERS", 1, "MODEL.DETR.DEC_LAYERS", 1]
TINY += ["MODEL.DETR.NUM_OBJECT_QUERIES", 16]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="rehearse on a tiny model")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; --device cpu --tiny rehearses the run")
    if args.device == "cpu" and not args.tiny:
        raise UserError("--device cpu takes hours at full size: add --tiny")
    start = time.monotonic()
    register_classes()
    with tempfile.TemporaryDirectory() as folder:
        groups = make_groups(args, folder)
        rows, ratios = [], {}
        rounds = args.rounds
        for number, (what, (images, builders)) in enumerate(groups.items()):
            remaining = start + LIMIT - time.monotonic()
            end = time.monotonic() + remaining / (len(groups) - number)
            found, times = measure(builders, args.rounds, end)
            rows += [{"what": what, "images": images, **row} for row in found]
            ratios[what] = {
                name: median_ratio(times[a], times[b])
                for name, (a, b) in RATIOS.items()
                if a in times and b in times
            }
            rounds = min([rounds, *map(len, times.values())])
    return {
        "size": list(TINY_SIZE if args.tiny else FULL_SIZE),
        "tiny": args.tiny,
        "rounds": rounds,
        "minutes": (time.monotonic() - start) / 60,
        "rows": rows,
        "ratios": {what: found for what, found in ratios.items() if found},
    }


def make_groups(
    args: argparse.Namespace, folder: str
) -> dict[str, tuple[int, dict[str, Callable[[], Way]]]]:
    """Groups of arms that take turns: the images of a call, and what builds each arm."""
    groups: dict[str, tuple[int, dict[str, Callable[[], Way]]]] = {}
    size = TINY_SIZE if args.tiny else FULL_SIZE
    for images in (2, 8):
        batch = random_inputs([size] * images, [OBJECTS] * images)
        arms = {}
        for kind, numbers in TRAINING:
            cfg = training_cfg(CONFIGS / (TWO_STREAMS if kind == TWO else PLAIN), args, folder)
            if set_numbers(cfg, numbers):
                arms[f"{kind}, {numbers}"] = partial(training, cfg, batch, kind, numbers)
        groups[f"training step, {images} images"] = images, arms
    batch = random_inputs([(96, 96)] * (2 if args.tiny else 16))
    arms = {}
    for numbers in ("float32", "bfloat16"):
        cfg = training_cfg(QUICKSTART, args, folder)
        if set_numbers(cfg, numbers):
            arms[numbers] = partial(training, cfg, batch, TWO, numbers)
    groups["training step of the quickstart"] = len(batch), arms
    case = make_case(args)
    for images in (1, 8):
        inputs = case.inputs * images
        published = partial(with_head, case.model, Naive)
        arms = {"as published": partial(inference, published, inputs, "float32")}
        for name, options in INFERENCE.items():
            # A rehearsal would wait for a compiler.
            if not (args.tiny and "compiled" in name):
                model = partial(evaluated, case.model, options)
                arms[name] = partial(inference, model, inputs, name)
        groups[f"inference, batch of {images}"] = images, arms
    return groups


def measure(
    builders: Mapping[str, Callable[[], Way]], rounds: int, end: float
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Rows of a group of arms, and the seconds of each; no arm begins after ``end``."""
    rows: dict[str, dict[str, Any]] = {}
    ways: dict[str, Way] = {}
    of_round = 0.0
    for name, build in builders.items():
        if time.monotonic() > end:
            rows[name] = {"missing": "no time"}
            continue
        try:
            way = build()
            for _ in range(WARM_UP):
                way()
            rows[name] = {"peak_gigabytes": peak_bytes(way) / 1e9}
            of_round += seconds(way)
            ways[name] = way
        except torch.cuda.OutOfMemoryError:
            rows[name] = {"missing": "out of memory"}
        except (RuntimeError, UserError) as error:  # such as a compiler that fails
            rows[name] = {"missing": f"failed: {one_line(error, first_line_only=True)}"}
        way = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    affordable = int((end - time.monotonic()) / max(of_round, 1e-9))
    times = in_turns(ways, min(rounds, max(FEWEST_ROUNDS, affordable)))
    first = next(iter(times.values()), [])
    for name, one in times.items():
        rows[name] |= {"seconds": statistics.median(one), "as_fast": median_ratio(first, one)}
    return [{"arm": name, **row} for name, row in rows.items()], times


def training_cfg(config: Path, args: argparse.Namespace, folder: str) -> CfgNode:
    opts: list[Any] = ["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", "", "SEED", 0]
    opts += ["DATASETS.TRAIN", (CLASSES,), "OUTPUT_DIR", folder]
    if args.tiny and config != QUICKSTART:
        opts += TINY
    cfg = load_config(str(config), list(map(str, opts)))
    cfg.MODEL.DETR.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(NUM_THINGS))
    return cfg


def set_numbers(cfg: CfgNode, numbers: str) -> bool:
    """Set the keys of a number format; return whether this version and device have it."""
    dtype, _, compiled = numbers.partition(", ")
    solver, on_cpu = cfg.SOLVER, cfg.MODEL.DEVICE == "cpu"
    if "TF32" in solver:
        solver.TF32 = dtype == "TF32"
    if compiled:
        if on_cpu or "COMPILE" not in solver:
            return False
        solver.COMPILE = True
    if dtype in ("float16", "bfloat16"):
        solver.AMP.ENABLED = True
        if "DTYPE" in solver.AMP:
            solver.AMP.DTYPE = dtype
            return not (on_cpu and dtype == "float16")
        return dtype == ("bfloat16" if on_cpu else "float16")
    return True


class BenchmarkTrainer(PanopticTrainer):
    """The trainer without what happens between steps: schedule, checkpoints and files."""

    def build_hooks(self) -> list[Any]:
        return []


class PublishedTrainer(BenchmarkTrainer):
    """Decodes the masks of all queries, with nothing shared among them."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = with_head(super().build_model(cfg), Naive)
        plain_mask_losses(model)
        return model


def training(cfg: CfgNode, batch: list[dict[str, Any]], kind: str, numbers: str) -> Way:
    """A function that takes one step of a trainer of its own."""
    if kind == PUBLISHED:
        cfg.MODEL.MASK_HEAD.STEP_MEMORY = 1 << 20  # MiB, so that all queries are decoded at once
    torch.manual_seed(0)
    trainer = (PublishedTrainer if kind == PUBLISHED else BenchmarkTrainer)(cfg)
    trainer.data_loader = repeat(batch)
    trainer._trainer.max_iter = trainer.max_iter

    def step() -> None:
        allow_tf32(numbers == "TF32")
        with EventStorage(trainer.iter):
            trainer.run_step()
        trainer.iter += 1

    return step


def inference(
    make_model: Callable[[], nn.Module], inputs: list[dict[str, Any]], numbers: str
) -> Way:
    """A function that predicts the segments of a batch."""
    model = make_model()

    @torch.no_grad()
    def predict() -> None:
        allow_tf32("TF32" in numbers)
        model(inputs)

    return predict


def evaluated(model: nn.Module, options: Mapping[str, bool] | None) -> nn.Module:
    return model if options is None else prepare_for_inference(model, **options)


@torch.no_grad()
def make_case(args: argparse.Namespace) -> Case:
    """The model in evaluation on one image, with a threshold that keeps some of its queries."""
    opts: list[Any] = ["MODEL.PANOPTIC.INSTANCES_TEST", False]
    cfg = load_config(str(CONFIGS / PLAIN), list(map(str, opts + (TINY if args.tiny else []))))
    cfg.MODEL.DEVICE = args.device
    cfg.MODEL.DETR.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(NUM_THINGS))
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if not args.tiny:
        model.load_state_dict(random_weights())
    case = Case(cfg, model, [random_input(*(TINY_SIZE if args.tiny else FULL_SIZE))])
    keep_best(case, KEPT)
    return case


CLASSES = "classes_of_the_gpu_benchmark"


def register_classes() -> None:
    """Name the classes of the checkpoints of a trainer, which the benchmark does not write."""
    names = [str(number) for number in range(NUM_CLASSES)]
    MetadataCatalog.get(CLASSES).set(
        thing_classes=names,
        stuff_classes=names,
        thing_dataset_id_to_contiguous_id={number: number for number in range(NUM_THINGS)},
        stuff_dataset_id_to_contiguous_id={number: number for number in range(NUM_CLASSES)},
    )


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def table(result: dict[str, Any]) -> str:
    header = ["", "arm", "ms", "ms an image", "peak memory of tensors (GB)", "times as fast"]
    rows = [[row["what"], row["arm"], *_numbers(row)] for row in result["rows"]]
    ratios = [
        f"{what}: {name} {ratio:.2f}."
        for what, found in result["ratios"].items()
        for name, ratio in found.items()
    ]
    lines = "\n".join(f"- {line}" for line in ratios)
    return f"{tabulate(rows, header, tablefmt='github', disable_numparse=True)}\n\n{lines}"


def _numbers(row: Mapping[str, Any]) -> list[str]:
    if "missing" in row:
        return [row["missing"], "", "", ""]
    milliseconds = 1e3 * row["seconds"]
    return [
        f"{milliseconds:.1f}",
        f"{milliseconds / row['images']:.1f}",
        f"{row['peak_gigabytes']:.2f}",
        f"{row['as_fast']:.2f}",
    ]


def how_taken(result: dict[str, Any]) -> str:
    height, width = result["size"]
    return (
        f"images of {height} x {width}; medians of {result['rounds']} rounds or more; "
        f"{result['minutes']:.1f} minutes in all."
    )
