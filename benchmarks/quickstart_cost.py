"""Training step of the quickstart config with each transformer."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from detectron2.modeling import build_model
from tabulate import tabulate

from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.setup import at_least
from batchformer_panoptic.engine.threads import limit_threads
from helpers.tiny_model import NUM_CLASSES, NUM_THINGS, random_inputs

from . import ROOT
from .measure import in_turns, median_ratio
from .transformers_cost import training_step

CONFIG = ROOT / "configs" / "quickstart" / "batchformer_conditional_detr_shapes.yaml"
TRANSFORMERS = ("detr", "conditional", "smca", "deformable")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=at_least(1), default=16, help="default: %(default)s, as trained"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    batch = random_inputs([(96, 96)] * args.images)
    steps, parameters = {}, {}
    for name in TRANSFORMERS:
        model = make_model(name)
        limit_threads(load_config(str(CONFIG)), model, args.images, training=True, workers=1)
        steps[name] = partial(training_step, model, batch)
        parameters[name] = sum(p.numel() for p in model.parameters())
    times = in_turns(steps, args.rounds)
    rows = [
        {
            "transformer": name,
            "parameters": parameters[name],
            "step_against_first": median_ratio(times[name], times[TRANSFORMERS[0]]),
        }
        for name in TRANSFORMERS
    ]
    return {"images": args.images, "rounds": args.rounds, "rows": rows}


def make_model(name: str, opts: Sequence[str] = ()) -> torch.nn.Module:
    cfg = load_config(str(CONFIG), ["MODEL.DETR.TRANSFORMER_NAME", name, *opts])
    cfg.MODEL.DETR.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(NUM_THINGS))
    torch.manual_seed(0)
    return build_model(cfg)


def table(result: dict[str, Any]) -> str:
    first = result["rows"][0]["transformer"]
    rows = [
        [row["transformer"], f"{row['parameters'] / 1e6:.2f}", f"{row['step_against_first']:.2f}"]
        for row in result["rows"]
    ]
    header = ["transformer", "parameters (million)", f"training step ÷ that of {first}"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
