"""Padding masks from image sizes; the same code in training and in evaluation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def padding_mask(
    image_sizes: Sequence[tuple[int, int]],
    padded_size: tuple[int, int],
    map_size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Which cells of a feature map lie in the padding of their image.

    Equal to nearest-neighbour resizing of the full-resolution padding mask, as in DETR, without
    ever making that mask: rows and columns are resized by themselves.

    Args:
        image_sizes: (height, width) in pixels of each of the B images, before padding.
        padded_size: (height, width) in pixels of the batch.
        map_size: (h, w) of the feature map.
        device: where the mask is made.

    Returns:
        (B, h, w) bool, True where the cell is padding.
    """
    valid = [
        _valid_cells([size[axis] for size in image_sizes], padded_size[axis], map_size[axis])
        for axis in (0, 1)
    ]
    rows, columns = (v.to(device, non_blocking=True) for v in valid)
    return ~(rows[:, :, None] & columns[:, None, :])


def has_padding(image_sizes: Sequence[tuple[int, int]], padded_size: tuple[int, int]) -> bool:
    """Whether any image is smaller than the batch it is padded to. Known without the device."""
    return any(tuple(size) != tuple(padded_size) for size in image_sizes)


def _valid_cells(lengths: list[int], padded_length: int, num_cells: int) -> Tensor:
    pixel = torch.arange(padded_length)
    inside = (pixel < torch.tensor(lengths)[:, None]).float()
    return F.interpolate(inside[:, None], size=num_cells, mode="nearest")[:, 0].bool()
