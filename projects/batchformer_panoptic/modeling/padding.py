"""Padding masks from image sizes, for training and evaluation alike."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class BatchPadding(NamedTuple):
    """The image sizes of a batch, as host numbers, and the padding masks derived from them.

    Attributes:
        image_sizes: (height, width) in pixels of each of the B images, before padding.
        padded_size: (height, width) in pixels of the batch.
    """

    image_sizes: Sequence[tuple[int, int]]
    padded_size: tuple[int, int]

    @property
    def is_padded(self) -> bool:
        """Whether any image is smaller than the padded size."""
        return any(tuple(size) != tuple(self.padded_size) for size in self.image_sizes)

    def mask_like(self, feature_map: Tensor) -> Tensor:
        """(B, h, w) bool on the device of a (B, C, h, w) map, True where a cell is padding."""
        height, width = feature_map.shape[-2:]
        return padding_mask(self.image_sizes, self.padded_size, (height, width), feature_map.device)


def padding_mask(
    image_sizes: Sequence[tuple[int, int]],
    padded_size: tuple[int, int],
    map_size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Padding masks at the resolution of a feature map.

    Equal to nearest-neighbour resizing of the full-resolution padding mask, as in DETR, but without
    that mask: rows and columns are resized separately.

    Args:
        image_sizes: (height, width) in pixels of each of the B images, before padding.
        padded_size: (height, width) in pixels of the batch.
        map_size: (h, w) of the feature map.
        device: device of the mask.

    Returns:
        (B, h, w) bool, True where the cell is padding.
    """
    valid = [
        _valid_cells([size[axis] for size in image_sizes], padded_size[axis], map_size[axis])
        for axis in (0, 1)
    ]
    rows, columns = (v.to(device, non_blocking=True) for v in valid)
    return ~(rows[:, :, None] & columns[:, None, :])


def _valid_cells(lengths: list[int], padded_length: int, num_cells: int) -> Tensor:
    pixel = torch.arange(padded_length)
    inside = (pixel < torch.tensor(lengths)[:, None]).float()
    return F.interpolate(inside[:, None], size=num_cells, mode="nearest")[:, 0].bool()
