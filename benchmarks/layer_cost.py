"""Convolutions of upsampled maps: the direct computation against upsampling first.

Results and gradients are asserted to be equal in the same run.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from batchformer_panoptic.layers import conv_upsampled

from .measure import compared, table_of_compared


class LayerCase(NamedTuple):
    """Two functions with the same result, and the shapes of their inputs."""

    ours: Callable[..., Tensor]
    usual: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))


def run(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in args.cases:
        case = CASES[name]
        torch.manual_seed(0)
        inputs = [torch.randn(shape).requires_grad_() for shape in case.shapes]
        rows.append({"case": name, **compared(case.ours, case.usual, inputs, args.rounds)})
    return {"rounds": args.rounds, "rows": rows}


def enlarged(maps: int, channels: int, out: int, small: tuple[int, int], odd: int) -> LayerCase:
    size = (2 * small[0] - odd, 2 * small[1] - odd)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return conv_upsampled(x, weight, size)

    def usual(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, padding=1)

    return LayerCase(ours, usual, ((maps, channels, *small), (out, channels, 3, 3)))


CASES = {
    "enlarged to 24 x 32, 8 queries, 128 to 64": enlarged(8, 128, 64, (12, 16), 0),
    "enlarged to 96 x 128, 8 queries, 32 to 16": enlarged(8, 32, 16, (48, 64), 0),
    "enlarged to 95 x 127, 8 queries, 32 to 16": enlarged(8, 32, 16, (48, 64), 1),
}


def table(result: dict[str, Any]) -> str:
    return table_of_compared(result["rows"])
