"""A training step with two streams against one with a single stream, for each transformer.

The joint configs of configs/coco with random weights differ only in MODEL.BATCHFORMER.ENABLED. The
run asserts that the backbone runs once for both streams.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from detectron2.modeling import build_model
from tabulate import tabulate

from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.run import tune_allocation
from batchformer_panoptic.engine.setup import add_opts_argument

from . import ROOT
from .measure import in_turns, median_ratio
from .training_step import add_batch_arguments, make_batch
from .transformers_cost import training_step

CONFIGS = ROOT / "configs" / "coco" / "panoptic"
SYSTEMS = {
    "DETR": "detr_R50_joint_300ep.yaml",
    "Conditional-DETR": "conditional_R50_joint_50ep.yaml",
    "SMCA": "smca_R50_joint_50ep.yaml",
    "Deformable-DETR": "deformable_R50_joint_50ep.yaml",
    "Mask2Former": "mask2former_R50_50ep.yaml",
}
WITHOUT_BOXES = ("Mask2Former",)
TASKS = {"boxes": False, "panoptic": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_batch_arguments(parser)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add_opts_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    tune_allocation()
    keys = ("size", "images", "objects", "opts")
    settings = {key: getattr(args, key) for key in keys}
    batch = make_batch(settings)
    rows = []
    for system in args.systems:
        for task in args.tasks:
            if task == "boxes" and system in WITHOUT_BOXES:
                continue
            models = {
                name: make_model(SYSTEMS[system], with_block, TASKS[task], args.opts)
                for name, with_block in (("one", False), ("two", True))
            }
            assert backbone_entries(models["two"], batch) == [len(batch)]
            steps = {n: partial(training_step, model, batch) for n, model in models.items()}
            times = in_turns(steps, args.rounds)
            ratio = median_ratio(times["two"], times["one"])
            seconds = statistics.median(times["one"])
            rows.append(
                {"system": system, "task": task, "times_as_long": ratio, "one_seconds": seconds}
            )
    return {**settings, "rounds": args.rounds, "rows": rows}


def make_model(config: str, with_block: bool, masks: bool, opts: list[str]) -> torch.nn.Module:
    cfg = load_config(str(CONFIGS / config), opts)
    cfg.MODEL.BATCHFORMER.ENABLED, cfg.MODEL.MASK_ON = with_block, masks
    cfg.MODEL.DETR.NUM_CLASSES = 133
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(80))
    torch.manual_seed(0)
    return build_model(cfg)


def backbone_entries(model: torch.nn.Module, batch: list[dict[str, Any]]) -> list[int]:
    """Number of images in each call of the backbone in a step."""
    seen: list[int] = []
    hook = model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    training_step(model, batch)
    hook.remove()
    return seen


def ratio_of(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def table(result: dict[str, Any]) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    ratios = {(row["system"], row["task"]): row["times_as_long"] for row in result["rows"]}
    rows = [
        [system, *(ratio_of(ratios.get((system, task))) for task in tasks)]
        for system in dict.fromkeys(row["system"] for row in result["rows"])
    ]
    header = ["two streams ÷ one", *tasks]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
