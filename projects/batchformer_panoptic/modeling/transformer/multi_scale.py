"""Feature levels: projects backbone maps to one sequence of tokens (Deformable-DETR, SMCA).

Shapes: B images, B' = streams * B, N tokens of L levels one after the other, C channels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...layers import SinePositionEncoding
from .layers import BatchPadding


class Levels(NamedTuple):
    """Positions, padding and sizes of the tokens of all levels, for attention.

    Attributes:
        shapes: (height, width) of each level.
        pos: (B', N, C) position encoding plus level embedding.
        key_padding_mask: (B', N) bool, True where a token is padding; None without padding.
        valid_ratios: (B', L, 2) float32, the share of the width and of the height of a level that
            is not padding.
        centers: (B', N, 2) float32, centre of each token's cell as (x, y), in 0 to 1 over the
            image without padding; beyond 1 in the padding.
    """

    shapes: tuple[tuple[int, int], ...]
    pos: Tensor
    key_padding_mask: Tensor | None
    valid_ratios: Tensor
    centers: Tensor

    def on_each_level(self, points: Tensor) -> Tensor:
        """(B', K, 2 or 4) over the image -> (B', K, L, 2 or 4) over each level with its padding."""
        ratios = self.valid_ratios.repeat(1, 1, points.shape[-1] // 2)
        return points[:, :, None] * ratios[:, None]

    def cell_centers(self) -> Tensor:
        """(B', N, L, 2): the position of each token on every level, as its reference points."""
        return self.on_each_level(self.centers)

    def token_range(self, level: int) -> slice:
        """The slice of the tokens of a level."""
        areas = [height * width for height, width in self.shapes]
        return slice(sum(areas[:level]), sum(areas[: level + 1]))


def describe_levels(
    maps: Sequence[Tensor],
    masks: Sequence[Tensor],
    position_encoding: SinePositionEncoding,
    level_embed: Tensor,
    *,
    is_padded: bool,
) -> Levels:
    """Describe L projected maps.

    Args:
        maps: L maps (B, C, H_l, W_l).
        masks: their masks (B, H_l, W_l) bool, True at padding.
        position_encoding: the position encoding of the cells of a map.
        level_embed: (L, C), added to the position encoding of each level.
        is_padded: whether any mask has padding.
    """
    pos = [
        (position_encoding(mask) + embedding).flatten(1, 2)
        for mask, embedding in zip(masks, level_embed, strict=True)
    ]
    shapes = tuple((x.shape[-2], x.shape[-1]) for x in maps)
    sizes = torch.tensor([(width, height) for height, width in shapes])
    valid = torch.stack([valid_sizes(mask) for mask in masks], dim=1)
    return Levels(
        shapes=shapes,
        pos=torch.cat(pos, dim=1).to(maps[0].dtype),
        key_padding_mask=torch.cat([m.flatten(1) for m in masks], 1) if is_padded else None,
        valid_ratios=valid / sizes.to(valid.device, non_blocking=True),
        centers=torch.cat([cell_centers(mask) for mask in masks], dim=1),
    )


def valid_sizes(mask: Tensor) -> Tensor:
    """(B, H, W) bool, True at padding -> (B, 2) float32: width and height in valid cells."""
    valid = ~mask
    return torch.stack([valid[:, 0].sum(-1), valid[:, :, 0].sum(-1)], dim=-1).float()


def cell_centers(mask: Tensor) -> Tensor:
    """(B, H, W) bool, True at padding -> (B, H * W, 2) centres (x, y), 1 being the valid edge."""
    height, width = mask.shape[-2:]
    y = torch.arange(height, device=mask.device) + 0.5
    x = torch.arange(width, device=mask.device) + 0.5
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], dim=-1).flatten(0, 1) / valid_sizes(mask)[:, None]


class LevelProjection(nn.Module):
    """Projects backbone maps, and further strided maps, to C channels (appendix A.4).

    Each backbone map has a 1x1 convolution; further levels come from the last map by 3x3
    convolutions of stride 2. Every level ends in a group norm (32 groups where they divide C, else
    the greatest common divisor). Parameter names are those of fundamentalvision/Deformable-DETR.

    As published, the statistics of the group norms include the padding, and the strided
    convolutions read it, so a padded image depends on the other images of its batch.
    ``see_padding`` keeps that. Without it, the convolutions read zeros there, and the norms exclude
    it. Batches without padding are the same either way.

    Args:
        in_channels: channels of the backbone maps, fine to coarse.
        embed_dim: channels C.
        num_levels: levels L, at least as many as backbone maps.
        see_padding: let padding influence valid cells, as published.
    """

    def __init__(
        self, *, in_channels: Sequence[int], embed_dim: int, num_levels: int, see_padding: bool
    ) -> None:
        super().__init__()
        self.see_padding = see_padding
        strided = [in_channels[-1], *[embed_dim] * num_levels][: num_levels - len(in_channels)]
        convs = [nn.Conv2d(channels, embed_dim, kernel_size=1) for channels in in_channels]
        convs += [
            nn.Conv2d(channels, embed_dim, kernel_size=3, stride=2, padding=1)
            for channels in strided
        ]
        groups = math.gcd(32, embed_dim)
        self.levels = nn.ModuleList(
            nn.Sequential(conv, nn.GroupNorm(groups, embed_dim)) for conv in convs
        )
        for conv in convs:
            nn.init.xavier_uniform_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(
        self, maps: Sequence[Tensor], padding: BatchPadding
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Project.

        Args:
            maps: backbone maps (B, C_i, H_i, W_i), fine to coarse.
            padding: the padding of the batch.

        Returns:
            L maps (B, C, H_l, W_l) and their masks (B, H_l, W_l) bool, True at padding.
        """
        hide_padding = padding.is_padded and not self.see_padding
        source, source_mask = maps[-1], padding.mask_like(maps[-1])
        projected, masks = [], []
        for index, level in enumerate(self.levels):
            assert isinstance(level, nn.Sequential)
            conv, norm = level
            assert isinstance(norm, nn.GroupNorm)
            if index < len(maps):
                x = conv(maps[index])
            else:
                x = conv(source.masked_fill(source_mask[:, None], 0.0) if hide_padding else source)
            mask = padding.mask_like(x)
            x = _masked_group_norm(x, norm, mask) if hide_padding else norm(x)
            if index >= len(maps):
                source, source_mask = x, mask
            projected.append(x)
            masks.append(mask)
        return projected, masks


def _masked_group_norm(x: Tensor, norm: nn.GroupNorm, mask: Tensor) -> Tensor:
    """Group norm over the cells of (B, C, H, W) where ``mask`` (B, H, W) is False."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    valid = (~mask).flatten(1)[:, None].to(dtype)  # (B, 1, cells)
    groups = x.to(dtype).unflatten(1, (norm.num_groups, -1)).flatten(3)  # (B, G, C / G, cells)
    count = valid.sum(-1) * groups.shape[2]  # (B, 1)
    weights = valid[:, None]
    mean = (groups * weights).sum((2, 3)) / count
    centered = groups - mean[..., None, None]
    variance = (centered.square() * weights).sum((2, 3)) / count
    normed = centered * (variance + norm.eps).rsqrt()[..., None, None]
    normed = normed.flatten(1, 2).unflatten(-1, x.shape[-2:]).to(x.dtype)
    return normed * norm.weight[:, None, None] + norm.bias[:, None, None]


def flatten_maps(maps: Sequence[Tensor]) -> Tensor:
    """L maps (B, C, H_l, W_l) -> (B, N, C)."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
