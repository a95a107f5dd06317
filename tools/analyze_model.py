"""Count operations, parameters and activations of a model, print its structure, time it.

    python tools/analyze_model.py --config-file F --tasks flop parameter activation structure speed

Works on any device. Weights are random if MODEL.WEIGHTS is not a file, and inputs are random if the
test data set is not on disk.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from collections import Counter
from typing import Any

import batchformer_panoptic  # noqa: F401  before Detectron2, whose import would warn

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count_table
from fvcore.nn import ActivationCountAnalysis, flop_count_table
from fvcore.nn.jit_handles import get_shape
from tabulate import tabulate
from torch import nn

from batchformer_panoptic.checkpoint import PanopticCheckpointer, SettingsRecord, read_class_table
from batchformer_panoptic.data import build_test_loader, class_section, setup_datasets
from batchformer_panoptic.engine.setup import at_least, command_parser, load_config
from batchformer_panoptic.engine.threads import limit_threads
from batchformer_panoptic.errors import UserError, command

Inputs = list[dict[str, Any]]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", required=True, choices=sorted(TASKS))
    parser.add_argument(
        "--num-inputs",
        type=at_least(1),
        default=5,
        metavar="N",
        help="images to average over (default: 5)",
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    notes = fill_classes(cfg)
    model = build_model(cfg).eval()
    limit_threads(cfg, model)
    notes += load_weights(cfg, model)
    inputs: list[Inputs] = []
    if not set(args.tasks) <= {"parameter", "structure"}:
        inputs, note = load_inputs(cfg, args.num_inputs)
        notes.append(note)
    print("\n".join(f"note: {note}" for note in notes))
    for task in args.tasks:
        print(f"\n== {task} ==\n{TASKS[task](model, inputs)}", flush=True)
    return 0


def fill_classes(cfg: CfgNode) -> list[str]:
    """Take the classes from the data sets, or else from the weights; return notes for the user."""
    try:
        setup_datasets(cfg)
    except UserError as error:
        section = class_section(cfg)
        table = read_class_table(cfg.MODEL.WEIGHTS) if is_file(cfg.MODEL.WEIGHTS) else None
        if table is not None:
            cfg.MODEL[section].NUM_CLASSES = table.num_classes
            cfg.MODEL.PANOPTIC.THING_CLASS_IDS = table.thing_class_ids
        elif cfg.MODEL[section].NUM_CLASSES == 0:
            raise UserError(f"{error}; or give --opts MODEL.{section}.NUM_CLASSES N") from error
        return [f"classes are not taken from the data sets: {error}"]
    return []


def load_weights(cfg: CfgNode, model: nn.Module) -> list[str]:
    if not is_file(cfg.MODEL.WEIGHTS):
        return [f"weights are random (MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r} is not a file)"]
    settings = SettingsRecord(cfg)
    PanopticCheckpointer(model, training=True, settings=settings).load(cfg.MODEL.WEIGHTS)
    return [f"weights are those of {cfg.MODEL.WEIGHTS}"]


def is_file(path: str) -> bool:
    return os.path.isfile(path)


def load_inputs(cfg: CfgNode, num_inputs: int) -> tuple[list[Inputs], str]:
    """Load batches of one image from the test data set, or make random ones of the test size."""
    cfg.TEST.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 1, 0
    if cfg.DATASETS.TEST:
        try:
            loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
            inputs = list(itertools.islice(loader, num_inputs))
        except UserError as error:
            reason = str(error)
        else:
            return inputs, f"{len(inputs)} images of {cfg.DATASETS.TEST[0]}{sizes(inputs)}"
    else:
        reason = "no test data set"
    inputs = [random_input(cfg, seed) for seed in range(num_inputs)]
    return inputs, f"{num_inputs} random images{sizes(inputs)} ({reason})"


def random_input(cfg: CfgNode, seed: int) -> Inputs:
    """Make noise of the test size: 4 to 3, or square for a classifier."""
    short = cfg.INPUT.MIN_SIZE_TEST or 480
    long = min(short * 4 // 3, max(short, cfg.INPUT.MAX_SIZE_TEST))
    if class_section(cfg) == "CLASSIFIER":
        short = long = cfg.MODEL.CLASSIFIER.IMAGE_SIZE
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, short, long), generator=generator, dtype=torch.uint8)
    return [{"image": image, "height": short, "width": long}]


def sizes(inputs: list[Inputs]) -> str:
    shapes = Counter(tuple(batch[0]["image"].shape[1:]) for batch in inputs)
    (height, width), _ = shapes.most_common(1)[0]
    return f", {'mostly ' if len(shapes) > 1 else ''}{height}x{width} pixels"


def count_flops(model: nn.Module, inputs: list[Inputs]) -> str:
    """Multiply-adds of one image, by module and by operator."""
    totals: Counter[str] = Counter()
    per_image = []
    for batch in inputs:
        analysis = flop_analysis(model, batch)
        by_operator = analysis.by_operator()
        totals.update(by_operator)
        per_image.append(sum(by_operator.values()))
    table = flop_count_table(analysis, max_depth=3, show_param_shapes=False)
    return (
        f"{table}\n\nthe table is for the last image; "
        f"{per_operator(totals, len(inputs), 1e9, 'G multiply-adds')}\n"
        f"total {mean_and_spread(per_image, 1e9)} G multiply-adds an image\n"
        f"not counted: {', '.join(sorted(analysis.unsupported_ops()))}"
    )


def count_activations(model: nn.Module, inputs: list[Inputs]) -> str:
    """Number of output elements of convolutions and matrix products for one image."""
    totals: Counter[str] = Counter()
    per_image = []
    for batch in inputs:
        by_operator = activation_analysis(model, batch).by_operator()
        totals.update(by_operator)
        per_image.append(sum(by_operator.values()))
    return (
        f"{per_operator(totals, len(inputs), 1e6, 'million activations')}\n"
        f"total {mean_and_spread(per_image, 1e6)} million activations an image"
    )


def count_parameters(model: nn.Module, _: list[Inputs]) -> str:
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"{parameter_count_table(model, max_depth=3)}\n"
        f"total {total / 1e6:.3f} million parameters, {trained / 1e6:.3f} million of them trained"
    )


def show_structure(model: nn.Module, _: list[Inputs]) -> str:
    return str(model)


def measure_speed(model: nn.Module, inputs: list[Inputs]) -> str:
    """Median time of one image, after one untimed run."""
    with torch.inference_mode():
        seconds_each(model, inputs[0])
        seconds = [seconds_each(model, batch) for batch in inputs]
    device = next(model.parameters()).device
    return (
        f"median {statistics.median(seconds):.4f} s an image over {len(seconds)} images "
        f"(fastest {min(seconds):.4f}, slowest {max(seconds):.4f}) on {device}, "
        f"{torch.get_num_threads()} CPU threads"
    )


def seconds_each(model: nn.Module, batch: Inputs) -> float:
    is_cuda = next(model.parameters()).is_cuda
    start = time.perf_counter()
    model(batch)
    if is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(batch)


def flop_analysis(model: nn.Module, batch: Any) -> FlopCountAnalysis:
    """Detectron2's analysis of ``model(batch)``, with fused operators that fvcore does not count.

    These are scaled dot-product attention and the sampling of deformable attention.
    """
    analysis = FlopCountAnalysis(model, batch)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
    analysis.set_op_handle("aten::embedding_bag", weighted_sum_flops)
    # Tracing a model whose output depends on its input warns on every branch.
    analysis.tracer_warnings("none")
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


def attention_flops(inputs: list[Any], _outputs: list[Any]) -> int:
    """Multiply-adds of both matrix products: queries (..., L, E), keys (..., S, E)."""
    query, key = get_shape(inputs[0]), get_shape(inputs[1])
    return 2 * math.prod(query) * key[-2]


def weighted_sum_flops(inputs: list[Any], _outputs: list[Any]) -> int:
    """Deformable attention: each index adds a weighted row of the table (rows, channels)."""
    table, indices = get_shape(inputs[0]), get_shape(inputs[1])
    return math.prod(indices) * table[-1]


def activation_analysis(model: nn.Module, batch: Inputs) -> ActivationCountAnalysis:
    """fvcore's analysis; Detectron2's own helper only accepts models that return only tensors."""
    adapter = TracingAdapter(model, batch, allow_non_tensor=True)
    analysis = ActivationCountAnalysis(adapter, adapter.flattened_inputs)
    analysis.tracer_warnings("none")
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


def per_operator(totals: Counter[str], images: int, unit: float, name: str) -> str:
    rows = [(key, value / images / unit) for key, value in totals.most_common() if value]
    return f"mean over {images} images:\n{tabulate(rows, ['operator', name], floatfmt='.4f')}"


def mean_and_spread(values: list[float], unit: float) -> str:
    mean = statistics.fmean(values) / unit
    return f"{mean:.4f} (standard deviation {statistics.pstdev(values) / unit:.4f})"


TASKS = {
    "flop": count_flops,
    "parameter": count_parameters,
    "activation": count_activations,
    "structure": show_structure,
    "speed": measure_speed,
}


if __name__ == "__main__":
    sys.exit(main())
