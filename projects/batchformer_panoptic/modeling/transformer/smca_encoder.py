"""The convolutional multi-scale encoder of SMCA, with a hook after each layer.

gaopengcuhk/SMCA-DETR ships it in Multi_scale_SMCA.zip: instead of the paper's self-attention
within and across scales, depth-wise convolutions within and between neighbouring scales.

Shapes: B images, B' = streams * B, L levels from fine to coarse, each half the size of the one
before, N tokens of all levels together, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...batchformer import BatchFormerHook, IdentityHook, StreamState
from ...batchformer.streams import SINGLE
from .deformable_levels import flatten_maps, valid_sizes
from .layers import FeedForwardLayer

_KERNEL = 5


class ScaleMixingLayer(FeedForwardLayer):
    """Encoder layer: every cell hears its neighbours on its own level and on the next ones.

    Args:
        embed_dim: channels C.
        num_levels: levels L.
        dim_feedforward: hidden width of the feed-forward network.
        dropout: of residual branches.
    """

    def __init__(
        self, *, embed_dim: int, num_levels: int, dim_feedforward: int, dropout: float
    ) -> None:
        super().__init__(
            embed_dim=embed_dim, dim_feedforward=dim_feedforward, dropout=dropout, pre_norm=False
        )
        between = num_levels - 1
        self.mix_in = nn.Conv2d(embed_dim, embed_dim, kernel_size=1)
        self.within = nn.ModuleList(_depthwise(embed_dim) for _ in range(num_levels))
        self.to_coarser = nn.ModuleList(_depthwise(embed_dim, stride=2) for _ in range(between))
        self.to_finer = nn.ModuleList(_depthwise(embed_dim) for _ in range(between))
        self.mix_out = nn.Conv2d(embed_dim, embed_dim, kernel_size=1)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        tokens: Tensor,
        pos: Tensor,
        map_sizes: Sequence[tuple[int, int]],
        hidden: Tensor | None,
    ) -> Tensor:
        """Update the tokens.

        Args:
            tokens: (B', N, C), level after level.
            pos: (B', N, C) position encoding plus level embedding.
            map_sizes: (height, width) of each level.
            hidden: (B', N) bool, True at padding that convolutions must not see; or None.

        Returns:
            (B', N, C).
        """
        masks = None if hidden is None else to_maps(hidden[..., None], map_sizes)
        maps = hide([self.mix_in(x) for x in to_maps(tokens + pos, map_sizes)], masks)
        maps = [within(x) for within, x in zip(self.within, maps, strict=True)]
        mixed = flatten_maps([self.mix_out(x) for x in self._mix(maps, hide(maps, masks), masks)])
        tokens = self.norm1(tokens + self.dropout(mixed))
        return self._feed_forward(tokens, self.norm2)

    def _mix(
        self, maps: list[Tensor], sources: list[Tensor], masks: list[Tensor] | None
    ) -> list[Tensor]:
        """Add to each level what the next finer and the next coarser one have to say."""
        mixed = list(maps)
        for level, (to_coarser, to_finer) in enumerate(
            zip(self.to_coarser, self.to_finer, strict=True)
        ):
            coarse = to_finer(sources[level + 1])
            if masks is None:
                coarse = F.interpolate(
                    coarse, size=maps[level].shape[-2:], mode="bilinear", align_corners=True
                )
            else:
                coarse = resize_valid(coarse, masks[level + 1][:, 0], masks[level][:, 0])
            mixed[level] = mixed[level] + coarse
            mixed[level + 1] = mixed[level + 1] + to_coarser(sources[level])
        return mixed


class ScaleMixingEncoder(nn.Module):
    """Layers over the tokens of all levels, with a hook after each.

    A BatchFormerV2 block sees the levels flattened and concatenated, (B, N, C), as for
    Deformable-DETR: a token attends over the batch at its own cell of its own level.

    Args:
        layers: the encoder layers.
        hook: an IdentityHook or a BatchFormerHook.
        see_padding: as published, convolutions see what lies in the padding and resizing depends
            on its amount, so that a padded image depends on its batch mates. False: padding is
            zero to convolutions, and images are resized each by its own size. Nothing differs in
            batches without padding.
    """

    def __init__(
        self,
        layers: Sequence[ScaleMixingLayer],
        *,
        hook: IdentityHook | BatchFormerHook,
        see_padding: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.batchformer = hook
        self.see_padding = see_padding

    def forward(
        self,
        tokens: Tensor,
        pos: Tensor,
        map_sizes: Sequence[tuple[int, int]],
        key_padding_mask: Tensor | None,
    ) -> tuple[Tensor, StreamState]:
        """Encode (B, N, C) tokens into (B', N, C); ``pos`` (B, N, C), mask (B, N) or None."""
        streams = SINGLE
        layer_pos, layer_mask = pos, key_padding_mask
        for index, layer in enumerate(self.layers):
            hidden = None if self.see_padding else layer_mask
            tokens = layer(tokens, layer_pos, map_sizes, hidden)
            tokens, now = self.batchformer.after_layer(index, tokens, streams, layer_mask)
            if now != streams:
                streams = now
                layer_pos = streams.expand(pos)
                layer_mask = None if key_padding_mask is None else streams.expand(key_padding_mask)
        return tokens, streams


def to_maps(tokens: Tensor, map_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(B, N, C) -> L maps (B, C, H_l, W_l), the inverse of :func:`flatten_maps`."""
    levels = tokens.transpose(1, 2).split([height * width for height, width in map_sizes], dim=2)
    return [x.unflatten(2, size) for x, size in zip(levels, map_sizes, strict=True)]


def hide(maps: list[Tensor], masks: Sequence[Tensor] | None) -> list[Tensor]:
    """Zero where masks (B, 1, H_l, W_l) bool are True; the maps themselves without masks."""
    if masks is None:
        return maps
    return [x.masked_fill(mask, 0.0) for x, mask in zip(maps, masks, strict=True)]


def resize_valid(coarse: Tensor, coarse_mask: Tensor, fine_mask: Tensor) -> Tensor:
    """Resize each image's valid area to that of a finer level, bilinear with corners aligned.

    Args:
        coarse: (B, C, h, w).
        coarse_mask: (B, h, w) bool, True at padding; what is valid is a rectangle at the origin.
        fine_mask: (B, H, W) bool, the same of the finer level.

    Returns:
        (B, C, H, W); meaningless at padding.
    """
    coarse_steps, fine_steps = valid_sizes(coarse_mask) - 1, valid_sizes(fine_mask) - 1
    ratio = coarse_steps / fine_steps.clamp(min=1.0)  # (B, 2): cells of coarse a cell of fine
    axes = []
    for axis, size, coarse_size in ((0, fine_mask.shape[2], 3), (1, fine_mask.shape[1], 2)):
        cell = torch.arange(size, device=coarse.device) * ratio[:, axis, None]
        last = max(coarse.shape[coarse_size] - 1, 1)
        axes.append(2 * cell / last - 1)  # -1 and 1 are the outermost cells of the padded map
    x = axes[0][:, None, :].expand(-1, fine_mask.shape[1], -1)
    y = axes[1][:, :, None].expand(-1, -1, fine_mask.shape[2])
    # Places of cells need more digits than half precision has.
    resized = F.grid_sample(
        coarse.float(),
        torch.stack([x, y], dim=-1),
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )
    return resized.to(coarse.dtype)


def _depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        channels, channels, _KERNEL, stride=stride, padding=_KERNEL // 2, groups=channels
    )
