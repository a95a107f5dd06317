"""Multi-scale SMCA as gaopengcuhk/SMCA-DETR ships it in Multi_scale_SMCA.zip.

Shapes: B images, B' = streams * B, L levels from fine to coarse, N tokens of all levels together,
C channels.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...batchformer import StreamState
from ...batchformer.streams import SINGLE
from ...errors import UserError
from ...layers import SinePositionEncoding
from ..padding import BatchPadding
from .base import (
    TRANSFORMER_REGISTRY,
    BoxPredictor,
    Transformer,
    TransformerOutput,
    build_batchformer_hook,
    feature_shapes,
    mask_level,
)
from .decoder import MemoryGrid
from .deformable_levels import flatten_maps
from .detr import post_norm_arguments
from .smca import SMCADecoder, build_smca_decoder
from .smca_encoder import ScaleMixingEncoder, ScaleMixingLayer, to_maps

_FEATURES_KEY = "MODEL.SMCA.IN_FEATURES"


class MultiScaleSMCA(Transformer):
    """Projections, level embedding, convolutional encoder and SMCA decoder over several maps.

    Levels are the backbone maps and one more of half the size. Before decoding, the finest level
    is brought to half its size by a convolution, as published.

    Args:
        in_features: backbone maps from fine to coarse, each half the size of the one before.
        in_channels: their channels.
        embed_dim: channels C of tokens and queries.
        num_queries: object queries Q.
        encoder: tokens of all levels to memory, opening streams on the way.
        decoder: over the strides of :func:`decoder_strides`.
        mask_level: index among ``in_features`` of the level that the mask head is given.
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
            # No level embedding: each level has its own softmax, which a constant cannot change.
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
        """(B', C, H, W) with zeros in the padding, unless the model is to see it."""
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
        # Xavier as in DETR. A depth-wise convolution keeps PyTorch's scale, that of its 25 inputs:
        # Xavier's would count the outputs of all channels.
        depthwise = {
            id(module.weight)
            for module in self.modules()
            if isinstance(module, nn.Conv2d) and module.groups > 1
        }
        for parameter in self.parameters():
            if parameter.dim() > 1 and id(parameter) not in depthwise:
                nn.init.xavier_uniform_(parameter)


def decoder_strides(strides: Sequence[int]) -> list[int]:
    """Strides of the decoder's levels: the finest is halved in size, one more follows the last."""
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
