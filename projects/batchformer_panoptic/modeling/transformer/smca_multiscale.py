"""Multi-scale SMCA, as gaopengcuhk/SMCA-DETR publishes it in Multi_scale_SMCA.zip.

Instead of the paper's self-attention within and across scales, the encoder has depth-wise
convolutions within a scale and between neighbouring scales.

Shapes: B images, B' = streams * B, L levels from fine to coarse, each half the size of the one
before, N tokens of all levels together, C channels.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F

from ...batchformer import BatchFormerHook, IdentityHook, StreamState, encode
from ...batchformer.batchformer import SINGLE
from ...errors import UserError
from ...layers import SinePositionEncoding
from .base import (
    TRANSFORMER_REGISTRY,
    BoxPredictor,
    Transformer,
    TransformerOutput,
    build_batchformer_hook,
    feature_shapes,
    mask_level,
)
from .detr import post_norm_arguments
from .layers import BatchPadding, FeedForwardLayer, MemoryGrid
from .multi_scale import flatten_maps, valid_sizes
from .smca import SMCADecoder, build_smca_decoder

_KERNEL = 5


class ScaleMixingLayer(FeedForwardLayer):
    """Encoder layer: convolutions over the neighbours of a cell on its own and the adjacent levels.

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
            hidden: (B', N) bool, True at padding that the convolutions read as zero, or None.

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
        """Add to each level the features of the next finer and the next coarser one."""
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
    """Layers over the tokens of all levels, with BatchFormerV2's hook after each.

    The tokens of all levels are concatenated, (B, N, C), as in Deformable-DETR: in a BatchFormerV2
    block a token attends over the batch at its own cell of its own level.

    Args:
        layers: the encoder layers.
        hook: an IdentityHook or a BatchFormerHook.
        see_padding: as published, convolutions read the padding and resizing depends on its
            size, so a padded image depends on the other images of its batch. False: convolutions
            read zeros there, and each image is resized by its own size. Batches without padding
            are the same either way.
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
        hidden = None if self.see_padding else key_padding_mask
        tokens, streams, _ = encode(
            self.layers,
            self.batchformer,
            tokens,
            pos,
            map_sizes,
            hidden,
            key_padding_mask=key_padding_mask,
        )
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
        coarse_mask: (B, h, w) bool, True at padding; the valid area is a rectangle at the origin.
        fine_mask: (B, H, W) bool, the same of the finer level.

    Returns:
        (B, C, H, W); meaningless at padding.
    """
    coarse_steps, fine_steps = valid_sizes(coarse_mask) - 1, valid_sizes(fine_mask) - 1
    ratio = coarse_steps / fine_steps.clamp(min=1.0)  # (B, 2): coarse cells per fine cell
    axes = []
    for axis, size, coarse_size in ((0, fine_mask.shape[2], 3), (1, fine_mask.shape[1], 2)):
        cell = torch.arange(size, device=coarse.device) * ratio[:, axis, None]
        last = max(coarse.shape[coarse_size] - 1, 1)
        axes.append(2 * cell / last - 1)  # -1 and 1 are the outermost cells of the padded map
    x = axes[0][:, None, :].expand(-1, fine_mask.shape[1], -1)
    y = axes[1][:, :, None].expand(-1, -1, fine_mask.shape[2])
    # Half precision does not resolve the positions of cells.
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


_FEATURES_KEY = "MODEL.SMCA.IN_FEATURES"


class MultiScaleSMCA(Transformer):
    """Projections, level embedding, convolutional encoder and SMCA decoder over several maps.

    The levels are the backbone maps and a further one of half the size. A convolution halves the
    finest level before the decoder, as published.

    Args:
        in_features: backbone maps from fine to coarse, each half the size of the one before.
        in_channels: their channels.
        embed_dim: channels C of tokens and queries.
        num_queries: object queries Q.
        encoder: tokens of all levels to memory; its hook may open a second stream.
        decoder: over the strides of :func:`decoder_strides`.
        mask_level: index among ``in_features`` of the level for the mask head.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        in_channels: Sequence[int],
        embed_dim: int,
        num_queries: int,
        encoder: ScaleMixingEncoder,
        decoder: SMCADecoder,
        mask_level: int = -1,
    ) -> None:
        super().__init__()
        self.in_features = tuple(in_features)
        self.mask_level = range(len(self.in_features))[mask_level]
        self.position_encoding = SinePositionEncoding(num_channels=embed_dim)
        self.encoder = encoder
        self.decoder = decoder
        self._reset_parameters()
        decoder.start_at_unit_scale()
        self.level_embed = nn.Parameter(torch.randn(len(in_features) + 1, embed_dim))
        self.query_embed = nn.Embedding(num_queries, embed_dim)
        self.input_proj = nn.ModuleList(
            nn.Conv2d(channels, embed_dim, kernel_size=1) for channels in in_channels
        )
        self.extra_proj = _halving(in_channels[-1], embed_dim)
        self.finest_reduction = _halving(embed_dim, embed_dim)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Translate ``MODEL.SMCA`` and ``MODEL.DETR`` into constructor arguments."""
        names = list(cfg.MODEL.SMCA.IN_FEATURES)
        shapes = _level_shapes(names, input_shape)
        arguments = post_norm_arguments(cfg)
        del arguments["num_heads"]  # the encoder has no attention
        layers = [
            ScaleMixingLayer(**arguments, num_levels=len(names) + 1)
            for _ in range(cfg.MODEL.DETR.ENC_LAYERS)
        ]
        return {
            "in_features": names,
            "in_channels": [shape.channels for shape in shapes],
            "mask_level": mask_level(cfg, _FEATURES_KEY, names),
            "embed_dim": cfg.MODEL.DETR.HIDDEN_DIM,
            "num_queries": cfg.MODEL.DETR.NUM_OBJECT_QUERIES,
            "encoder": ScaleMixingEncoder(
                layers, hook=build_batchformer_hook(cfg), see_padding=cfg.MODEL.SMCA.SEE_PADDING
            ),
            "decoder": build_smca_decoder(cfg, decoder_strides([s.stride for s in shapes])),
        }

    def forward(
        self, features: dict[str, Tensor], padding: BatchPadding, box_head: BoxPredictor
    ) -> TransformerOutput:
        """See :data:`TRANSFORMER_REGISTRY`."""
        inputs = [features[name] for name in self.in_features]
        maps = [project(x) for project, x in zip(self.input_proj, inputs, strict=True)]
        maps.append(self.extra_proj(self._visible(inputs[-1], padding, SINGLE)))
        map_sizes = [_size(x) for x in maps]
        masks = [padding.mask_like(x) for x in maps]

        memory, streams = self.encoder(
            flatten_maps(maps),
            self._positions(masks, self.level_embed),
            map_sizes,
            _flat(masks) if padding.is_padded else None,
        )
        memories = to_maps(memory, map_sizes)
        memory_map = memories[self.mask_level]
        memories[0] = self.finest_reduction(self._visible(memories[0], padding, streams))
        key_masks = [padding.mask_like(memories[0]), *masks[1:]]
        hidden_states, references = self.decoder(
            self.query_embed.weight.expand(memory.shape[0], -1, -1),
            flatten_maps(memories),
            # No level embedding: a constant does not change the softmax of a level.
            streams.expand(self._positions(key_masks, None)),
            streams.expand(_flat(key_masks)) if padding.is_padded else None,
            MemoryGrid([_size(x) for x in memories], padding, streams),
        )
        return TransformerOutput(
            hidden_states,
            references,
            projected_map=maps[self.mask_level],
            memory_map=memory_map,
            padding_mask=masks[self.mask_level],
            streams=streams,
        )

    def _visible(self, x: Tensor, padding: BatchPadding, streams: StreamState) -> Tensor:
        """(B', C, H, W) with zeros in the padding, unless ``see_padding``."""
        if self.encoder.see_padding or not padding.is_padded:
            return x
        return x.masked_fill(streams.expand(padding.mask_like(x))[:, None], 0.0)

    def _positions(self, masks: Sequence[Tensor], level_embed: Tensor | None) -> Tensor:
        """Masks (B, H_l, W_l) -> (B, N, C) position encodings, plus the level's embedding."""
        encodings = [self.position_encoding(mask).flatten(1, 2) for mask in masks]
        if level_embed is not None:
            encodings = [x + level for x, level in zip(encodings, level_embed, strict=True)]
        return torch.cat(encodings, dim=1)

    def _reset_parameters(self) -> None:
        # Published: Xavier for every tensor with more than one dimension, depth-wise convolutions
        # included. Their weights are (C, 1, 5, 5), of which Xavier counts 25 inputs and 25 * C
        # outputs: the bound is sqrt(6 / (25 + 25 * C)), 6.5 times below PyTorch's at C = 256.
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


def decoder_strides(strides: Sequence[int]) -> list[int]:
    """Strides of the decoder's levels: the halved finest one, the others, and a further one."""
    return [2 * strides[0], *strides[1:], 2 * strides[-1]]


def _flat(masks: Sequence[Tensor]) -> Tensor:
    return torch.cat([mask.flatten(1) for mask in masks], dim=1)


def _size(feature_map: Tensor) -> tuple[int, int]:
    height, width = feature_map.shape[-2:]
    return height, width


def _halving(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)


def _level_shapes(names: Sequence[str], input_shape: dict[str, ShapeSpec]) -> list[ShapeSpec]:
    shapes = feature_shapes(_FEATURES_KEY, names, input_shape)
    strides = [shape.stride for shape in shapes]
    if any(2 * fine != coarse for fine, coarse in pairwise(strides)):
        raise UserError(
            f"{_FEATURES_KEY} is {list(names)} with strides {strides}; each map must have "
            "twice the stride of the one before"
        )
    return shapes


@TRANSFORMER_REGISTRY.register()
def smca_multiscale(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> MultiScaleSMCA:
    """SMCA over several maps."""
    return MultiScaleSMCA(cfg, input_shape)
