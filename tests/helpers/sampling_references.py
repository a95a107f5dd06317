"""Slow references of deformable sampling: the definition as loops, and ``grid_sample``."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = [
    [(5, 7)],
    [(4, 6), (2, 3), (1, 1)],
    [(1, 5), (3, 1)],
]


def random_inputs(shapes, *, batch=2, queries=3, heads=2, head_dim=3, points=2, spread=0.7):
    """Locations around the centre; with ``spread`` 0.7 many of them are outside."""
    generator = torch.Generator().manual_seed(0)

    def rand(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    num_tokens = sum(h * w for h, w in shapes)
    value = rand(batch, num_tokens, heads, head_dim) - 0.5
    where = (batch, queries, heads, len(shapes), points)
    locations = 0.5 + spread * 2 * (rand(*where, 2) - 0.5)
    weights = rand(*where)
    return value, locations, weights


def cell(value: Tensor, row: int, column: int, height: int, width: int) -> Tensor:
    """One cell of a (height * width, D) level, zero outside."""
    if 0 <= row < height and 0 <= column < width:
        return value[row * width + column]
    return torch.zeros_like(value[0])


def bilinear(value: Tensor, x: float, y: float, height: int, width: int) -> Tensor:
    """The sample at (x, y); centres of cells are at halves, cells have sides of 1 / size."""
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column), math.floor(row)
    right_part, lower_part = column - left, row - top
    return (
        (1 - lower_part) * (1 - right_part) * cell(value, top, left, height, width)
        + (1 - lower_part) * right_part * cell(value, top, left + 1, height, width)
        + lower_part * (1 - right_part) * cell(value, top + 1, left, height, width)
        + lower_part * right_part * cell(value, top + 1, left + 1, height, width)
    )


def plain_loops(value, shapes, locations, weights):
    """Equation 3 without its projections: loops over queries, heads, levels and points."""
    batch, _, heads, head_dim = value.shape
    out = value.new_zeros(batch, locations.shape[1], heads, head_dim)
    for b in range(batch):
        for q in range(locations.shape[1]):
            for h in range(heads):
                start = 0
                for level, (height, width) in enumerate(shapes):
                    cells = value[b, start : start + height * width, h]
                    start += height * width
                    for p in range(locations.shape[4]):
                        x, y = locations[b, q, h, level, p].tolist()
                        sample = bilinear(cells, x, y, height, width)
                        out[b, q, h] += weights[b, q, h, level, p] * sample
    return out.flatten(2)


def by_grid_sample(value, shapes, locations, weights):
    """The usual formulation: a grid sample on each level."""
    sampled = []
    parts = value.split([h * w for h, w in shapes], dim=1)
    for level, (height, width) in enumerate(shapes):
        level_map = parts[level].permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, (height, width))
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples = F.grid_sample(level_map, grid, padding_mode="zeros", align_corners=False)
        sampled.append(samples.unflatten(0, value.shape[:1] + value.shape[2:3]))
    stacked = torch.stack(sampled, dim=4)  # (B, h, D, Q, L, P)
    return torch.einsum("bhdqlp,bqhlp->bqhd", stacked, weights).flatten(2)
