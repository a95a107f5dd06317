"""Mask2Former (Cheng et al. 2022): a pixel decoder and a decoder that attends within its masks.

Queries predict classes and masks, and no boxes. Published: facebookresearch/Mask2Former, whose
pixel decoder is ``MSDeformAttnPixelDecoder`` and whose decoder is
``MultiScaleMaskedTransformerDecoder``. As published, there is no padding mask.

Shapes: B images, B' = streams * B, N tokens of all levels, S tokens of one level, Q queries,
C channels, L predictions: one before the first decoder layer and one after each.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F

from ...batchformer import BatchFormerHook, IdentityHook, StreamState
from ...errors import UserError
from ...layers import MLP, SinePositionEncoding
from ..set_prediction.targets import ImageTarget
from .base import (
    TRANSFORMER_REGISTRY,
    BoxPredictor,
    Transformer,
    TransformerOutput,
    build_batchformer_hook,
    feature_shapes,
)
from .deformable import DeformableEncoder, DeformableEncoderLayer, xavier_except_deformable
from .layers import BatchPadding, FeedForwardLayer, attend
from .mask_pilot import MaskPilot, PilotOutput, PilotQueries
from .multi_scale import describe_levels, flatten_maps

_KEY = "MODEL.MASK2FORMER.IN_FEATURES"
_STRIDE = 32  # of the coarsest level; published: images are padded to a multiple of it


# --- pixel decoder (section 3.2.1) ---------------------------------------------------------------


class PixelFeatures(NamedTuple):
    """The output of the pixel decoder.

    Attributes:
        levels: maps (B', C, H_l, W_l), coarse to fine, which the decoder attends to.
        mask_features: (B', C_m, h, w) at the stride of the finest backbone map.
        coarsest: (B, C, H_1, W_1), the projected coarsest map before the encoder; not expanded.
        streams: the streams along B'.
    """

    levels: list[Tensor]
    mask_features: Tensor
    coarsest: Tensor
    streams: StreamState


class PixelDecoder(nn.Module):
    """Deformable encoder over the coarse maps, then one feature pyramid step to the finest map.

    Args:
        in_channels: names and channels of the backbone maps, fine to coarse; all but the first
            become tokens.
        embed_dim: channels C.
        mask_dim: channels C_m of the per-pixel features.
    """

    def __init__(self, *, in_channels: Mapping[str, int], embed_dim: int, mask_dim: int) -> None:
        super().__init__()
        self.finest, *self.token_maps = in_channels
        self.token_maps = self.token_maps[::-1]  # coarse to fine, as published
        groups = math.gcd(32, embed_dim)
        self.input_proj = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels[name], embed_dim, kernel_size=1),
                nn.GroupNorm(groups, embed_dim),
            )
            for name in self.token_maps
        )
        self.position_encoding = SinePositionEncoding(num_channels=embed_dim)
        self.level_embed = nn.Parameter(torch.randn(len(self.token_maps), embed_dim))
        self.lateral = nn.Conv2d(in_channels[self.finest], embed_dim, kernel_size=1, bias=False)
        self.lateral_norm = nn.GroupNorm(groups, embed_dim)
        self.output = nn.Conv2d(embed_dim, embed_dim, kernel_size=3, padding=1, bias=False)
        self.output_norm = nn.GroupNorm(groups, embed_dim)
        self.mask_features = nn.Conv2d(embed_dim, mask_dim, kernel_size=1)
        for projection in self.input_proj:
            assert isinstance(projection, nn.Sequential)
            conv = projection[0]
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        for conv in (self.lateral, self.output, self.mask_features):
            # Published: c2_xavier_fill, which is Kaiming with a = 1.
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(
        self,
        features: Mapping[str, Tensor],
        encoder: DeformableEncoder,
        padding: BatchPadding | None = None,
    ) -> PixelFeatures:
        """Decode backbone maps.

        Args:
            features: maps (B, C_i, H_i, W_i) by name.
            encoder: tokens to tokens; its hook may open a second stream.
            padding: the padding of the batch, for the hook only: nothing else distinguishes
                padding, as published.
        """
        maps = [
            projection(features[name])
            for name, projection in zip(self.token_maps, self.input_proj, strict=True)
        ]
        masks = [x.new_zeros((x.shape[0], *x.shape[-2:]), dtype=torch.bool) for x in maps]
        levels = describe_levels(
            maps, masks, self.position_encoding, self.level_embed, is_padded=False
        )
        hook_padding = None
        if padding is not None and padding.is_padded:
            hook_padding = torch.cat([padding.mask_like(x).flatten(1) for x in maps], dim=1)
        tokens, levels, streams = encoder(flatten_maps(maps), levels, hook_padding)
        decoded = [
            tokens[:, levels.token_range(index)].transpose(1, 2).unflatten(2, shape)
            for index, shape in enumerate(levels.shapes)
        ]
        finest = features[self.finest]
        # The finest map is the same for all streams: it is projected once, then expanded.
        lateral = streams.expand(self.lateral_norm(self.lateral(finest)))
        upsampled = F.interpolate(
            decoded[-1], size=finest.shape[-2:], mode="bilinear", align_corners=False
        )
        x = F.relu(self.output_norm(self.output(lateral + upsampled)))
        return PixelFeatures(decoded, self.mask_features(x), maps[0], streams)


# --- decoder with masked attention (section 3.2) -------------------------------------------------


class MaskedDecoderLayer(FeedForwardLayer):
    """Cross-attention within the masks, self-attention, feed-forward network; post-norm."""

    def __init__(
        self, *, embed_dim: int, num_heads: int, dim_feedforward: int, dropout: float
    ) -> None:
        super().__init__(
            embed_dim=embed_dim, dim_feedforward=dim_feedforward, dropout=dropout, pre_norm=False
        )
        attention = {"dropout": dropout, "batch_first": True}
        self.cross_attn = nn.MultiheadAttention(embed_dim, num_heads, **attention)
        self.self_attn = nn.MultiheadAttention(embed_dim, num_heads, **attention)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        pos: Tensor,
        visible: Tensor,
        visible_queries: Tensor | None = None,
    ) -> Tensor:
        """Update the queries.

        Args:
            queries: (B', Q, C) content of the queries.
            query_pos: (B', Q, C) learned positions, added to queries and keys of attention.
            memory: (B', S, C) tokens of one level.
            pos: (B' or 1, S, C) their position encoding.
            visible: (B', Q, S) bool, True where a query may attend.
            visible_queries: (B', Q, Q) bool, the same for self-attention; None is everywhere.

        Returns:
            (B', Q, C).
        """
        attended = attend(self.cross_attn, queries + query_pos, memory + pos, memory, visible)
        queries = self.norm1(queries + self.dropout(attended))
        keys = queries + query_pos
        attended = attend(self.self_attn, keys, keys, queries, visible_queries)
        queries = self.norm2(queries + self.dropout(attended))
        return self._feed_forward(queries, self.norm3)


class MaskedDecoder(nn.Module):
    """Decoder layers over the levels in turn; each attends within the masks predicted before it.

    Args:
        layers: the decoder layers.
        num_levels: levels of the pixel decoder.
        num_queries: queries Q.
        embed_dim: channels C.
        mask_dim: channels C_m of the per-pixel features.
    """

    def __init__(
        self,
        layers: Sequence[MaskedDecoderLayer],
        *,
        num_levels: int,
        num_queries: int,
        embed_dim: int,
        mask_dim: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.norm = nn.LayerNorm(embed_dim)
        self.query_feat = nn.Embedding(num_queries, embed_dim)
        self.query_embed = nn.Embedding(num_queries, embed_dim)
        self.level_embed = nn.Embedding(num_levels, embed_dim)
        self.mask_embed = MLP(
            input_dim=embed_dim, hidden_dim=embed_dim, output_dim=mask_dim, num_layers=3
        )
        self.position_encoding = SinePositionEncoding(num_channels=embed_dim)

    def forward(
        self, pixels: PixelFeatures, pilot: PilotQueries | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            pixels: output of the pixel decoder.
            pilot: P queries with given masks, which follow the others.

        Returns:
            (L, B', Q + P, C) normalised states and (L, B', Q + P, C_m) mask embeddings.
        """
        batch = pixels.mask_features.shape[0]
        memories, positions, small = [], [], []
        for level, embedding in zip(pixels.levels, self.level_embed.weight, strict=True):
            memories.append(level.flatten(2).transpose(1, 2) + embedding)
            no_padding = level.new_zeros((1, *level.shape[-2:]), dtype=torch.bool)
            positions.append(self.position_encoding(no_padding).flatten(1, 2).to(level.dtype))
            # Resizing is linear: resized features give resized masks, at a fraction of the cost.
            size = level.shape[-2:]
            resized = F.interpolate(
                pixels.mask_features.detach(), size=size, mode="bilinear", align_corners=False
            )
            small.append(resized.flatten(2))
        queries = self.query_feat.weight.expand(batch, -1, -1)
        query_pos = self.query_embed.weight.expand(batch, -1, -1)
        num_queries, visible_queries = queries.shape[1], None
        if pilot is not None:
            visible_queries = pilot.visible_queries(num_queries)
            queries = torch.cat([queries, pilot.content], dim=1)
            # Positions tell learned queries apart. Published: no query has one.
            query_pos = torch.cat([query_pos, torch.zeros_like(pilot.content)], dim=1)
        states = [self.norm(queries)]
        embeddings = [self.mask_embed(states[0])]
        for index, layer in enumerate(self.layers):
            turn = index % len(memories)
            visible = visible_tokens(embeddings[-1][:, :num_queries].detach(), small[turn])
            if pilot is not None:
                visible = torch.cat([visible, pilot.visible_tokens(turn)], dim=1)
            queries = layer(
                queries, query_pos, memories[turn], positions[turn], visible, visible_queries
            )
            states.append(self.norm(queries))
            embeddings.append(self.mask_embed(states[-1]))
        return torch.stack(states), torch.stack(embeddings)


def visible_tokens(embeddings: Tensor, features: Tensor) -> Tensor:
    """The tokens within the masks of the queries (equation 2).

    Args:
        embeddings: (B', Q, C_m).
        features: (B', C_m, S), per-pixel features at the size of a level.

    Returns:
        (B', Q, S) bool. A query whose mask is empty may attend to all tokens.
    """
    visible = embeddings @ features >= 0  # the logit of one half
    return visible | ~visible.any(-1, keepdim=True)


# --- the transformer -----------------------------------------------------------------------------


class Mask2Former(Transformer):
    """Pixel decoder and masked-attention decoder.

    Args:
        encoder: the encoder of the pixel decoder; its hook may open a second stream.
        pixel_decoder: backbone maps to levels and per-pixel features.
        decoder: queries to states and mask embeddings.
        pilot: makes pilot queries in training, or None.
    """

    predicts_boxes = False
    embeds_masks = True
    size_divisibility = _STRIDE

    @configurable
    def __init__(
        self,
        *,
        encoder: DeformableEncoder,
        pixel_decoder: PixelDecoder,
        decoder: MaskedDecoder,
        pilot: MaskPilot | None = None,
    ) -> None:
        super().__init__()
        self.in_features = (pixel_decoder.finest, *pixel_decoder.token_maps)
        self.encoder = encoder
        xavier_except_deformable(encoder)
        self.pixel_decoder = pixel_decoder
        self.decoder = decoder
        self.pilot = pilot
        self.uses_targets = pilot is not None

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Translate ``MODEL.DETR`` and ``MODEL.MASK2FORMER`` into constructor arguments."""
        detr, node = cfg.MODEL.DETR, cfg.MODEL.MASK2FORMER
        shapes = feature_shapes(_KEY, node.IN_FEATURES, input_shape)
        if len(shapes) < 2:
            raise UserError(f"{_KEY} is {node.IN_FEATURES}; name at least two maps, fine to coarse")
        num_levels = len(shapes) - 1
        hook: IdentityHook | BatchFormerHook = build_batchformer_hook(cfg)
        encoder_layers = [
            DeformableEncoderLayer(
                embed_dim=detr.HIDDEN_DIM,
                num_heads=detr.NHEADS,
                num_levels=num_levels,
                num_points=node.ENC_POINTS,
                dim_feedforward=node.ENC_DIM_FEEDFORWARD,
                dropout=detr.DROPOUT,
            )
            for _ in range(detr.ENC_LAYERS)
        ]
        decoder_layers = [
            MaskedDecoderLayer(
                embed_dim=detr.HIDDEN_DIM,
                num_heads=detr.NHEADS,
                dim_feedforward=detr.DIM_FEEDFORWARD,
                dropout=detr.DROPOUT,
            )
            for _ in range(detr.DEC_LAYERS)
        ]
        return {
            "encoder": DeformableEncoder(encoder_layers, hook=hook),
            "pixel_decoder": PixelDecoder(
                in_channels={
                    name: shape.channels
                    for name, shape in zip(node.IN_FEATURES, shapes, strict=True)
                },
                embed_dim=detr.HIDDEN_DIM,
                mask_dim=node.MASK_DIM,
            ),
            "decoder": MaskedDecoder(
                decoder_layers,
                num_levels=num_levels,
                num_queries=detr.NUM_OBJECT_QUERIES,
                embed_dim=detr.HIDDEN_DIM,
                mask_dim=node.MASK_DIM,
            ),
            "pilot": _build_pilot(cfg) if node.PILOT.ENABLED else None,
        }

    def forward(
        self,
        features: dict[str, Tensor],
        padding: BatchPadding,
        box_head: BoxPredictor,
        targets: Sequence[ImageTarget] | None = None,
    ) -> TransformerOutput:
        """See :data:`TRANSFORMER_REGISTRY`."""
        pixels = self.pixel_decoder(features, self.encoder, padding)
        queries = None
        if self.pilot is not None and targets is not None:
            sizes = [(level.shape[-2], level.shape[-1]) for level in pixels.levels]
            queries = self.pilot(targets, pixels.streams, sizes, padding.padded_size)
        states, embeddings = self.decoder(pixels, queries)
        pilot = None
        if queries is not None:
            parts = [states.shape[2] - queries.content.shape[1], queries.content.shape[1]]
            states, pilot_states = states.split(parts, dim=2)
            embeddings, pilot_embeddings = embeddings.split(parts, dim=2)
            pilot = PilotOutput(pilot_states, pilot_embeddings, queries.layout)
        return TransformerOutput(
            states,
            None,
            projected_map=pixels.coarsest,
            memory_map=pixels.levels[0],
            padding_mask=padding.mask_like(pixels.coarsest),
            streams=pixels.streams,
            mask_embeddings=embeddings,
            mask_features=pixels.mask_features,
            padded_size=padding.padded_size,
            pilot=pilot,
        )


def _build_pilot(cfg: CfgNode) -> MaskPilot:
    """Pilot queries, as ``MODEL.MASK2FORMER.PILOT`` describes them."""
    node = cfg.MODEL.MASK2FORMER.PILOT
    if node.NUM_QUERIES < 1:
        raise UserError(
            f"MODEL.MASK2FORMER.PILOT.NUM_QUERIES is {node.NUM_QUERIES}; it must be at least 1"
        )
    for key in ("LABEL_NOISE", "MASK_NOISE"):
        if not 0 <= node[key] <= 1:
            raise UserError(f"MODEL.MASK2FORMER.PILOT.{key} is {node[key]}; it must be from 0 to 1")
    return MaskPilot(
        num_classes=cfg.MODEL.DETR.NUM_CLASSES,
        embed_dim=cfg.MODEL.DETR.HIDDEN_DIM,
        num_queries=node.NUM_QUERIES,
        label_noise=node.LABEL_NOISE,
        mask_noise=node.MASK_NOISE,
    )


@TRANSFORMER_REGISTRY.register()
def mask2former(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> Mask2Former:
    """Mask2Former, with the settings of ``MODEL.MASK2FORMER``."""
    return Mask2Former(cfg, input_shape)
