"""Cost of each transformer with and without BatchFormerV2: parameters, operations, step time.

Box detection as in configs/coco/detection (100 queries for DETR, 300 for the others), random
weights. Multiply-adds are those of evaluating one image of 480 x 640. A training step is forward,
losses and backward on two images of --size pixels.
"""

import argparse
import statistics
from typing import Any

import torch
from analyze_model import flop_analysis
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from tabulate import tabulate

from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.setup import add_opts_argument, at_least

from . import ROOT
from .measure import in_turns, median_ratio

CONFIGS = ROOT / "configs" / "coco" / "detection"
SYSTEMS = {
    "DETR": "detr_R50_50ep.yaml",
    "Conditional-DETR": "conditional_detr_R50_50ep.yaml",
    "SMCA": "smca_R50_50ep.yaml",
    "SMCA multi-scale": "smca_multiscale_R50_50ep.yaml",
    "Deformable-DETR": "deformable_detr_R50_50ep.yaml",
}
NUM_CLASSES, EVALUATION_SIZE, OBJECTS = 80, (480, 640), 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=at_least(1), nargs=2, default=[256, 320], metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    add_opts_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return the rows of the table and the settings of the measurement."""
    rows, steps = [], {}
    batch = [random_input(args.size, seed) for seed in range(2)]
    for system in args.systems:
        for with_block in (False, True):
            model = make_model(SYSTEMS[system], with_block, args.opts)
            rows.append({"system": system, "block": with_block, **static_costs(model)})
            steps[system, with_block] = lambda model=model: training_step(model, batch)
    times = in_turns({f"{s} {b}": step for (s, b), step in steps.items()}, args.rounds)
    reference = times[f"{args.systems[0]} False"]
    for row in rows:
        mine = times[f"{row['system']} {row['block']}"]
        row["step_seconds"] = statistics.median(mine)
        row["step_against_first"] = median_ratio(mine, reference)
        row["step_against_plain"] = median_ratio(mine, times[f"{row['system']} False"])
    return {"size": list(args.size), "opts": args.opts, "rounds": args.rounds, "rows": rows}


def make_model(config: str, with_block: bool, opts: list[str]) -> torch.nn.Module:
    cfg: CfgNode = load_config(str(CONFIGS / config), opts)
    cfg.MODEL.BATCHFORMER.ENABLED = with_block
    cfg.MODEL.DETR.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(NUM_CLASSES))
    torch.manual_seed(0)
    return build_model(cfg)


def static_costs(model: torch.nn.Module) -> dict[str, float]:
    """Count all parameters, those of the block, and multiply-adds of one image in evaluation."""
    named = list(model.named_parameters())
    image = torch.zeros(3, *EVALUATION_SIZE, dtype=torch.uint8)
    model.eval()
    return {
        "parameters": sum(p.numel() for _, p in named),
        "parameters_of_block": sum(p.numel() for name, p in named if "batchformer" in name),
        "multiply_adds": flop_analysis(model, [{"image": image}]).total(),
    }


def training_step(model: torch.nn.Module, batch: list[dict[str, Any]]) -> None:
    model.train()
    torch.manual_seed(0)  # dropout
    losses = model(batch)
    torch.stack(list(losses.values())).sum().backward()
    model.zero_grad(set_to_none=True)


def random_input(size: list[int], seed: int) -> dict[str, Any]:
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(OBJECTS, 2, 2, generator=generator).sort(dim=1).values
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(corners.flatten(1) * torch.tensor([width, height] * 2))
    instances.gt_classes = torch.randint(NUM_CLASSES, (OBJECTS,), generator=generator)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances}


def table(result: dict[str, Any]) -> str:
    """Format the rows as a Markdown table."""
    first = result["rows"][0]["system"]
    header = [
        "system",
        "BatchFormerV2",
        "parameters (million)",
        "multiply-adds in evaluation (10⁹)",
        f"training step ÷ {first}'s",
        "÷ its own without",
    ]
    rows = [
        [
            row["system"],
            "yes" if row["block"] else "no",
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['multiply_adds'] / 1e9:.1f}",
            f"{row['step_against_first']:.2f}",
            f"{row['step_against_plain']:.2f}" if row["block"] else "",
        ]
        for row in result["rows"]
    ]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
