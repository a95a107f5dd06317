"""Multi-scale deformable attention (Zhu et al. 2021, "Deformable DETR", section 4.1).

Shapes: B entries (images times streams), N tokens of L levels one after the other, Q queries, h
heads, P points of each head and level, C channels, D = C / h channels of a head.
"""

import functools
import importlib
import math
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LevelShapes = Sequence[tuple[int, int]]

_COMPILED_OP = "MultiScaleDeformableAttention"
_IMAGES_PER_STEP = 64  # maximum batch of one call of the compiled operator, as published


class MSDeformAttn(nn.Module):
    """Each query samples a few points around its reference point, on every level (equation 3).

    Offsets and weights of the points are linear functions of the query. Parameter names and
    initialisation are those of fundamentalvision/Deformable-DETR: the heads start in different
    directions, with point k at a distance of k cells, and with equal weights.

    Args:
        embed_dim: channels C.
        num_heads: heads h; divides ``embed_dim``.
        num_levels: feature levels L.
        num_points: points P of each head on each level.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, 2 * samples)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published (appendix A.4)."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1).float()
        offsets = direction[:, None, None] * distance[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        queries: Tensor,
        reference_points: Tensor,
        tokens: Tensor,
        level_shapes: LevelShapes,
        key_padding_mask: Tensor | None,
    ) -> Tensor:
        """Attend.

        Args:
            queries: (B, Q, C).
            reference_points: (B, Q, L, 2) float32 as (x, y), or (B, Q, L, 4) as cxcywh, in 0 to 1
                over each level with its padding. The unit of offsets is a cell around a point;
                around a box it is half the box's size, divided by P.
            tokens: (B, N, C).
            level_shapes: (height, width) of each level.
            key_padding_mask: (B, N) bool, True where a token is padding and reads as zero, or None.

        Returns:
            (B, Q, C).
        """
        value = self.value_proj(tokens)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        grid = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(queries).unflatten(-1, (*grid, 2))
        weights = self.attention_weights(queries).unflatten(-1, (self.num_heads, -1))
        weights = weights.softmax(-1).unflatten(-1, grid[1:])

        reference = reference_points[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
        if reference.shape[-1] == 2:
            cells = _like(reference, [(width, height) for height, width in level_shapes])
            moves = offsets / cells[:, None]
        else:
            moves = offsets * reference[..., 2:] * (0.5 / self.num_points)
        locations = reference[..., :2] + moves
        return self.output_proj(deform_attn(value, level_shapes, locations, weights))


def deform_attn(
    value: Tensor, level_shapes: LevelShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples, by the compiled operator if it is available.

    The operator is the module ``MultiScaleDeformableAttention`` of the published code, for CUDA
    tensors.

    Args:
        value: (B, N, h, D), the levels one after the other, each row by row.
        level_shapes: (height, width) of each level; their areas sum to N.
        locations: (B, Q, h, L, P, 2) as (x, y): 0 and 1 are the outer edges of a level. Samples
            outside are zero.
        weights: (B, Q, h, L, P).

    Returns:
        (B, Q, C) in the dtype of ``value``.
    """
    if value.is_cuda:
        compiled = _compiled_op()
        if compiled is not None:
            return deform_attn_compiled(compiled, value, level_shapes, locations, weights)
    return deform_attn_torch(value, level_shapes, locations, weights)


def deform_attn_torch(
    value: Tensor, level_shapes: LevelShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """:func:`deform_attn` in PyTorch.

    Each head of a query reads 4 * L * P rows of one table, as an embedding bag does. Unlike
    ``grid_sample`` on each level, this does not materialise the samples: on a CPU it is faster and
    needs a fraction of the memory.
    """
    batch, num_tokens, num_heads, head_dim = value.shape
    areas = [height * width for height, width in level_shapes]
    starts = [sum(areas[:level]) for level in range(len(areas))]
    # One number for each point, (L, P): broadcasting rows of length 1 is slow on a CPU.
    num_points = locations.shape[-2]
    height, width, first = (
        _like(locations, [[number] * num_points for number in numbers])
        for numbers in (*zip(*level_shapes, strict=True), starts)
    )
    columns, column_shares = _two_nearest(locations[..., 0], width)
    rows, row_shares = _two_nearest(locations[..., 1], height)
    row_shares = row_shares * weights[:, :, :, None]
    shares = row_shares[:, :, :, :, None] * column_shares[:, :, :, None]  # (B, Q, h, 2, 2, L, P)

    images = torch.arange(batch, dtype=torch.int32, device=value.device)[:, None, None, None]
    heads = torch.arange(num_heads, dtype=torch.int32, device=value.device)[:, None, None]
    offset = (images * num_tokens + first.int()) * num_heads + heads  # (B, h, L, P)
    rows = rows * (width.int() * num_heads) + offset[:, None, :, None]
    entries = rows[:, :, :, :, None] + (columns * num_heads)[:, :, :, None]
    weighted_sums = _sums_of_gathered if torch.compiler.is_exporting() else _WeightedBags.apply
    summed = weighted_sums(
        value.reshape(-1, head_dim),
        entries.flatten(3).flatten(0, 2),
        shares.flatten(3).flatten(0, 2).to(value.dtype),
    )
    return summed.view(batch, -1, num_heads * head_dim)


class _WeightedBags(torch.autograd.Function):
    """Weighted sums of rows of a table: ``F.embedding_bag``, with a faster gradient of the table.

    The gradient is an embedding bag too: its bags are the rows of the table, and its entries are
    the bags of the forward pass that read a row.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, entries: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(table, entries, shares)
        return F.embedding_bag(entries, table, per_sample_weights=shares, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        table, entries, shares = ctx.saved_tensors
        gradient = grad_outputs[0].contiguous()
        of_table, of_shares = None, None
        if ctx.needs_input_grad[0]:
            of_table = _gradient_of_table(table, entries, shares, gradient)
        if ctx.needs_input_grad[2]:
            with torch.enable_grad():
                leaf = shares.detach().requires_grad_()
                out = F.embedding_bag(entries, table.detach(), per_sample_weights=leaf, mode="sum")
            (of_shares,) = torch.autograd.grad(out, leaf, gradient)
        return of_table, None, of_shares


# Samples that an exported graph gathers at a time.
_GATHERED = 16


def _sums_of_gathered(table: Tensor, entries: Tensor, shares: Tensor) -> Tensor:
    """`_WeightedBags` in terms of gathering, since formats for deployment have no embedding bag.

    Only a few of the K samples of each bag exist at a time.
    """
    parts = zip(entries.split(_GATHERED, 1), shares.split(_GATHERED, 1), strict=True)
    return sum((share[:, None] @ F.embedding(rows, table))[:, 0] for rows, share in parts)


def _gradient_of_table(table: Tensor, entries: Tensor, shares: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the table (T, D): the weighted sum over the bags that read each row.

    Args:
        table: (T, D).
        entries: (R, K), the rows of the table that each of R bags reads.
        shares: (R, K), their weights.
        gradient: (R, D), gradients of the bags.
    """
    row, order = entries.flatten().sort()
    starts = torch.searchsorted(row, torch.arange(len(table), dtype=row.dtype, device=row.device))
    readers = order // entries.shape[1]
    return F.embedding_bag(
        readers,
        gradient,
        starts,
        per_sample_weights=shares.flatten()[order],
        mode="sum",
    )


def deform_attn_compiled(
    compiled: Any, value: Tensor, level_shapes: LevelShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """:func:`deform_attn` by the operator of the published code, in float32 or float64.

    Args:
        compiled: the module with ``ms_deform_attn_forward`` and ``ms_deform_attn_backward``.
        value: see :func:`deform_attn`.
        level_shapes: see :func:`deform_attn`.
        locations: see :func:`deform_attn`.
        weights: see :func:`deform_attn`.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    shapes = torch.tensor(level_shapes).to(value.device, non_blocking=True)
    areas = shapes.prod(1)
    tensors = [x.to(dtype).contiguous() for x in (value, locations, weights)]
    out = _CompiledOp.apply(compiled, shapes, areas.cumsum(0) - areas, *tensors)
    return out.to(value.dtype)


class _CompiledOp(torch.autograd.Function):
    """The compiled operator and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, compiled: Any, shapes: Tensor, starts: Tensor, *tensors: Tensor
    ) -> Tensor:
        value, locations, weights = tensors
        ctx.compiled = compiled
        ctx.save_for_backward(shapes, starts, *tensors)
        return compiled.ms_deform_attn_forward(
            value, shapes, starts, locations, weights, _images_of_a_step(len(value))
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        shapes, starts, value, locations, weights = ctx.saved_tensors
        gradients = ctx.compiled.ms_deform_attn_backward(
            value,
            shapes,
            starts,
            locations,
            weights,
            grad_outputs[0].contiguous(),
            _images_of_a_step(len(value)),
        )
        return None, None, None, *gradients


def _images_of_a_step(batch: int) -> int:
    """Batch of one call: the largest divisor of ``batch`` within the operator's bound."""
    return max(step for step in range(1, _IMAGES_PER_STEP + 1) if batch % step == 0)


@functools.cache
def _compiled_op() -> ModuleType | None:
    try:
        return importlib.import_module(_COMPILED_OP)
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        warnings.warn(
            f"{_COMPILED_OP} is installed but cannot be imported ({error}); deformable attention "
            "runs in PyTorch",
            stacklevel=2,
        )
        return None


def _two_nearest(locations: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The two cells around each location along one axis, and their weights in the sample.

    Args:
        locations: (B, Q, h, L, P) in units of the axis.
        length: (L, P) number of cells, as a float.

    Returns:
        Cells (B, Q, h, 2, L, P) int32 in [0, length), and their shares: 0 for a cell outside.
    """
    at = locations * length - 0.5
    low = at.detach().floor()
    cells = torch.stack([low, low + 1], dim=3)
    inside = (cells >= 0) & (cells < length)
    part = at - low
    shares = torch.stack([1 - part, part], dim=3) * inside
    return torch.where(inside, cells, 0).int(), shares


def _like(like: Tensor, values: Sequence[Any]) -> Tensor:
    """Host numbers as a tensor of the dtype and device of ``like``, without synchronisation."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
