"""Deformable attention's sampling in pure PyTorch against the usual grid_sample formulation.

Results and gradients are asserted equal in the same run.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import in_turns, median_ratio
from tabulate import tabulate
from torch import Tensor

from batchformer_panoptic.layers.ms_deform_attn import deform_attn_torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from sampling_references import by_grid_sample

HEADS, HEAD_DIM, POINTS = 8, 32, 4
Shapes = list[tuple[int, int]]
# Name: level shapes, images, queries (None: one for each token, as in the encoder).
CASES: dict[str, tuple[Shapes, int, int | None]] = {
    "encoder, 480 x 640": ([(60, 80), (30, 40), (15, 20), (8, 10)], 1, None),
    "encoder, 800 x 1066": ([(100, 134), (50, 67), (25, 34), (13, 17)], 1, None),
    "decoder, 300 queries, 800 x 1066": ([(100, 134), (50, 67), (25, 34), (13, 17)], 1, 300),
    "encoder, 4 images of 128 x 128": ([(16, 16), (8, 8), (4, 4), (2, 2)], 4, None),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))


def run(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in args.cases:
        shapes, batch, queries = CASES[name]
        inputs = random_inputs(shapes, batch, queries)
        difference = largest_difference(shapes, inputs)
        row: dict[str, Any] = {"case": name, "largest_difference": difference}
        for what, step in (("forward", forward), ("with_backward", with_backward)):
            times = in_turns(
                {
                    key: partial(step, f, shapes, inputs)
                    for key, f in (("ours", deform_attn_torch), ("usual", by_grid_sample))
                },
                args.rounds,
            )
            row[what] = median_ratio(times["usual"], times["ours"])
            row[f"{what}_seconds"] = statistics.median(times["ours"])
        rows.append(row)
    return {"rounds": args.rounds, "rows": rows}


def random_inputs(shapes: Shapes, batch: int, queries: int | None) -> tuple[Tensor, ...]:
    """Values, locations around each query's own place, and weights; all ask for gradients."""
    torch.manual_seed(0)
    tokens = sum(height * width for height, width in shapes)
    queries = tokens if queries is None else queries
    value = torch.randn(batch, tokens, HEADS, HEAD_DIM)
    cells = torch.tensor([(width, height) for height, width in shapes])[:, None]
    where = (batch, queries, HEADS, len(shapes), POINTS)
    places = torch.rand(batch, queries, 1, 1, 1, 2)
    locations = places + 2.5 * torch.randn(*where, 2) / cells
    weights = torch.rand(where).flatten(-2).softmax(-1).view(where)
    return value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()


def forward(function: Callable[..., Tensor], shapes: Shapes, inputs: tuple[Tensor, ...]) -> Tensor:
    value, locations, weights = inputs
    with torch.no_grad():
        return function(value, shapes, locations, weights)


def with_backward(
    function: Callable[..., Tensor], shapes: Shapes, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    value, locations, weights = inputs
    return torch.autograd.grad(function(value, shapes, locations, weights).square().sum(), inputs)


def largest_difference(shapes: Shapes, inputs: tuple[Tensor, ...]) -> float:
    """Of results and gradients, relative to the largest value of each; small or an error."""
    ours, usual = (
        [forward(f, shapes, inputs), *with_backward(f, shapes, inputs)]
        for f in (deform_attn_torch, by_grid_sample)
    )
    differences = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, usual, strict=True)
    ]
    assert max(differences) < 1e-4, differences
    return max(differences)


def table(result: dict[str, Any]) -> str:
    header = ["case", "forward: times as fast", "with backward", "largest relative difference"]
    rows = [
        [
            row["case"],
            f"{row['forward']:.2f}",
            f"{row['with_backward']:.2f}",
            f"{row['largest_difference']:.0e}",
        ]
        for row in result["rows"]
    ]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
