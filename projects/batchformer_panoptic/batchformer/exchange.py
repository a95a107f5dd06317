"""The batch attention over the images of all processes, for cards that hold one or two images.

Attention over the batch is separate at each position, so the processes divide the positions among
them. Each is sent the tokens of all images at its positions, applies the block to them, and returns
the results. A process then projects as many tokens as those of its own images, and sends each of
these once, whatever the number of processes.

The backward pass sends gradients the same way. The gradients of a process are those of the sum of
all processes' losses, through its own positions; averaged over the processes, as by
``DistributedDataParallel``, they are those of one process that has all images. Not published.

Shapes: B images of this process, A of all, N positions, n of this process, C channels.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError

T = TypeVar("T")

MapSizes = Sequence[tuple[int, int]]
"""(height, width) of the maps whose cells are the positions, map after map, row after row."""


def num_processes() -> int:
    """Number of processes of the run; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_objects(value: T) -> list[T]:
    """Host values of all processes, by rank.

    A collective operation, in which the host does not wait for its device.
    """
    if num_processes() == 1:
        return [value]
    gathered: list[Any] = [None] * num_processes()
    dist.all_gather_object(gathered, value, group=_host_group())
    return gathered


@torch.compiler.disable  # collectives of host values cannot be traced
def over_all_processes(
    block: Callable[[Tensor, Tensor | None], Tensor],
    tokens: Tensor,
    key_padding_mask: Tensor | None,
    map_sizes: MapSizes | None = None,
) -> Tensor:
    """Apply a block to the images of all processes, which have to call this together.

    The processes may have different numbers of images. With ``map_sizes``, their maps may differ in
    size: cells of the same row and column meet, and only images that have the cell take part in it.

    Args:
        block: (A, n, C) tokens and an (A, n) bool mask or None -> (A, n, C), separately for each
            position; a :class:`BatchFormerV2`.
        tokens: (B, N, C) of this process.
        key_padding_mask: (B, N) bool, True where a token must not be attended to, or None.
        map_sizes: of the maps that the N positions are the cells of. None: position i of one
            process is position i of the others, and all have as many.

    Returns:
        (B, N, C): the result for the images of this process.

    Raises:
        UserError: in all processes, the positions of two of them cannot be paired.
        ValueError: the cells of the maps are not N.
    """
    batch, num_positions, _ = tokens.shape
    own = ((1, num_positions),) if map_sizes is None else tuple((h, w) for h, w in map_sizes)
    if _num_cells(own) != num_positions:
        raise ValueError(f"maps of sizes {list(own)} do not have {num_positions} cells")
    everyone = gather_objects(
        _Batch(batch, own, map_sizes is not None, key_padding_mask is not None)
    )
    common = _common_sizes(everyone)
    if key_padding_mask is None and any(x.is_masked or x.map_sizes != common for x in everyone):
        key_padding_mask = tokens.new_zeros(tokens.shape[:2], dtype=torch.bool)

    division = _Division([x.num_images for x in everyone], _num_cells(common), dist.get_rank())
    tokens = division.of_positions(_enlarge(tokens, own, common))
    if key_padding_mask is not None:
        mask = _enlarge(key_padding_mask[..., None], own, common, value=True)
        key_padding_mask = division.of_positions(mask)[..., 0]
    attended = division.of_images(block(tokens, key_padding_mask))
    return _reduce(attended, own, common)


# --- the positions of a process ------------------------------------------------------------------


class _Batch(NamedTuple):
    """What the processes need to know of each other."""

    num_images: int
    map_sizes: MapSizes
    has_rows: bool
    is_masked: bool


class _Division(NamedTuple):
    """The division of the positions among processes.

    Attributes:
        images: number of images of each process.
        num_positions: N.
        rank: of this process.
    """

    images: Sequence[int]
    num_positions: int
    rank: int

    @property
    def shares(self) -> list[int]:
        """Positions of each process; with fewer positions than processes, some are dummies."""
        world = len(self.images)
        num_positions = max(self.num_positions, world)
        return [b - a for a, b in pairwise(num_positions * i // world for i in range(world + 1))]

    def of_positions(self, tokens: Tensor) -> Tensor:
        """(B, N, C) of the own images -> (A, n, C) of the own positions."""
        shares = self.shares
        # A block without positions would leave its parameters without a gradient.
        tokens = F.pad(tokens, (0, 0, 0, sum(shares) - self.num_positions))
        rows = torch.cat([part.flatten(0, 1) for part in tokens.split(shares, dim=1)])
        received = _Exchange.apply(rows, self._rows_of_images, self._rows_of_positions)
        return received.unflatten(0, (-1, shares[self.rank]))

    def of_images(self, tokens: Tensor) -> Tensor:
        """(A, n, C) of the own positions -> (B, N, C) of the own images."""
        rows = _Exchange.apply(tokens.flatten(0, 1), self._rows_of_positions, self._rows_of_images)
        parts = rows.split(self._rows_of_images)
        num_images = self.images[self.rank]
        joined = torch.cat([part.unflatten(0, (num_images, -1)) for part in parts], dim=1)
        return joined[:, : self.num_positions]

    @property
    def _rows_of_images(self) -> list[int]:
        """Tokens of the own images at the positions of each process."""
        return [self.images[self.rank] * share for share in self.shares]

    @property
    def _rows_of_positions(self) -> list[int]:
        """Tokens of the images of each process at the own positions."""
        return [images * self.shares[self.rank] for images in self.images]


class _Exchange(torch.autograd.Function):
    """Rows for each process -> rows from each process; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), received, sent)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Exchange.apply(gradient, ctx.received, ctx.sent), None, None


# --- maps of different sizes ---------------------------------------------------------------------


def _num_cells(map_sizes: MapSizes) -> int:
    return sum(height * width for height, width in map_sizes)


def _common_sizes(everyone: Sequence[_Batch]) -> MapSizes:
    """Sizes of the maps that hold those of all processes."""
    sizes = [x.map_sizes for x in everyone]
    different = next((x for x in sizes if x != sizes[0]), sizes[0])
    can_pair = all(x.has_rows for x in everyone) and len({len(x) for x in sizes}) == 1
    if different != sizes[0] and not can_pair:
        counts = [_num_cells(x) for x in (sizes[0], different)]
        raise UserError(
            f"attention over the images of all processes cannot pair {counts[0]} and {counts[1]} "
            "tokens of two processes: pad the images of all processes to one size, or state the "
            "sizes of the maps (map_sizes)"
        )
    levels = zip(*sizes, strict=True)
    return tuple((max(h for h, _ in level), max(w for _, w in level)) for level in levels)


def _enlarge(tokens: Tensor, own: MapSizes, common: MapSizes, value: float = 0) -> Tensor:
    """(B, N, C) on maps of one size -> (B, N', C) on larger maps, ``value`` in new cells."""
    if own == common:
        return tokens
    parts = tokens.split([height * width for height, width in own], dim=1)
    return torch.cat(
        [
            F.pad(part.unflatten(1, (h, w)), (0, 0, 0, W - w, 0, H - h), value=value).flatten(1, 2)
            for part, (h, w), (H, W) in zip(parts, own, common, strict=True)
        ],
        dim=1,
    )


def _reduce(tokens: Tensor, own: MapSizes, common: MapSizes) -> Tensor:
    """The inverse of :func:`_enlarge`."""
    if own == common:
        return tokens
    parts = tokens.split([height * width for height, width in common], dim=1)
    return torch.cat(
        [
            part.unflatten(1, size)[:, :height, :width].flatten(1, 2)
            for part, size, (height, width) in zip(parts, common, own, strict=True)
        ],
        dim=1,
    )


# --- process groups ------------------------------------------------------------------------------

# Weak, because a reference to a group keeps its threads alive.
_HOST_GROUPS: "weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]"
_HOST_GROUPS = weakref.WeakKeyDictionary()


def _host_group() -> "dist.ProcessGroup":
    """All processes, for values of the host."""
    world = dist.group.WORLD
    assert world is not None
    if dist.get_backend() == dist.Backend.GLOO:
        return world
    if world not in _HOST_GROUPS:
        group = dist.new_group(backend=dist.Backend.GLOO)
        assert isinstance(group, dist.ProcessGroup)  # this process is a member
        _HOST_GROUPS[world] = group
    return _HOST_GROUPS[world]
