"""Deformable attention's sampling in pure PyTorch against the usual grid_sample formulation.

Results and gradients are asserted to be equal in the same run.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchformer_panoptic.layers.ms_deform_attn import deform_attn_torch
from helpers.sampling_references import by_grid_sample

from .measure import compared, table_of_compared

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
        ours, usual = (partial(sampled, f, shapes) for f in (deform_attn_torch, by_grid_sample))
        rows.append({"case": name, **compared(ours, usual, inputs, args.rounds)})
    return {"rounds": args.rounds, "rows": rows}


def random_inputs(shapes: Shapes, batch: int, queries: int | None) -> tuple[Tensor, ...]:
    """Values, sampling locations around random points, and weights; all require gradients."""
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


def sampled(function: Callable[..., Tensor], shapes: Shapes, value: Tensor, *how: Tensor) -> Tensor:
    return function(value, shapes, *how)


def table(result: dict[str, Any]) -> str:
    return table_of_compared(result["rows"])
