"""The transformer of DETR (Carion et al. 2020) with a hook in its encoder.

Shapes: B images, B' = streams * B, N = H * W tokens, Q queries, C channels, L decoder layers.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...batchformer.streams import SINGLE, StreamState
from ...errors import UserError
from ...layers import SinePositionEncoding
from .base import TRANSFORMER_REGISTRY, TransformerOutput, build_batchformer_hook
from .layers import DecoderLayer, EncoderLayer


class DETREncoder(nn.Module):
    """Encoder layers with a hook after each; the hook may open a second stream."""

    def __init__(
        self, layers: list[EncoderLayer], *, hook: nn.Module, norm: nn.Module | None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.batchformer = hook
        self.norm = norm

    def forward(
        self, tokens: Tensor, pos: Tensor, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, StreamState]:
        """Encode (B, N, C) tokens into (B', N, C); ``pos`` (B, N, C), mask (B, N) or None."""
        streams = SINGLE
        layer_pos, layer_mask = pos, key_padding_mask
        for index, layer in enumerate(self.layers):
            tokens = layer(tokens, layer_pos, layer_mask)
            tokens, now = self.batchformer.after_layer(index, tokens, streams, layer_mask)
            if now != streams:
                streams = now
                layer_pos = streams.expand(pos)
                layer_mask = None if key_padding_mask is None else streams.expand(key_padding_mask)
        return (tokens if self.norm is None else self.norm(tokens)), streams


class DETRDecoder(nn.Module):
    """Decoder layers; every layer's output is normalised and returned."""

    def __init__(self, layers: list[DecoderLayer], *, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(
        self, query_pos: Tensor, memory: Tensor, pos: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """(B', Q, C) query positions, (B', N, C) memory and positions -> (L, B', Q, C)."""
        memory_keys = memory + pos
        queries = torch.zeros_like(query_pos)
        states = []
        for layer in self.layers:
            queries = layer(queries, query_pos, memory, memory_keys, key_padding_mask)
            states.append(self.norm(queries))
        return torch.stack(states)


class DETRTransformer(nn.Module):
    """Projection, sine positions, encoder and decoder of DETR; absolute boxes, no references.

    Differs from facebookresearch/detr in nothing but names: ``query_embed`` and ``input_proj``
    live here and not in the model around it.
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        in_channels: int,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        num_queries: int,
        dropout: float,
        pre_norm: bool,
        hook: nn.Module,
    ) -> None:
        super().__init__()
        layer_args: dict[str, Any] = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "pre_norm": pre_norm,
        }
        self.in_features = (in_feature,)
        self.embed_dim = embed_dim
        self.position_encoding = SinePositionEncoding(num_channels=embed_dim)
        self.encoder = DETREncoder(
            [EncoderLayer(**layer_args) for _ in range(num_encoder_layers)],
            hook=hook,
            norm=nn.LayerNorm(embed_dim) if pre_norm else None,
        )
        self.decoder = DETRDecoder(
            [DecoderLayer(**layer_args) for _ in range(num_decoder_layers)], embed_dim=embed_dim
        )
        for name, parameter in self.named_parameters():
            # As published; the blocks of the hook are initialised likewise there.
            if parameter.dim() > 1 and "position_encoding" not in name:
                nn.init.xavier_uniform_(parameter)
        self.query_embed = nn.Embedding(num_queries, embed_dim)
        self.input_proj = nn.Conv2d(in_channels, embed_dim, kernel_size=1)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Translate ``MODEL.DETR`` into constructor arguments."""
        node = cfg.MODEL.DETR
        if node.IN_FEATURE not in input_shape:
            raise UserError(
                f"MODEL.DETR.IN_FEATURE is {node.IN_FEATURE!r}, but the backbone returns "
                f"{', '.join(sorted(input_shape))}"
            )
        return {
            "in_feature": node.IN_FEATURE,
            "in_channels": input_shape[node.IN_FEATURE].channels,
            "embed_dim": node.HIDDEN_DIM,
            "num_heads": node.NHEADS,
            "dim_feedforward": node.DIM_FEEDFORWARD,
            "num_encoder_layers": node.ENC_LAYERS,
            "num_decoder_layers": node.DEC_LAYERS,
            "num_queries": node.NUM_OBJECT_QUERIES,
            "dropout": node.DROPOUT,
            "pre_norm": node.PRE_NORM,
            "hook": build_batchformer_hook(cfg),
        }

    def forward(
        self, features: dict[str, Tensor], padding_masks: dict[str, Tensor], any_padding: bool
    ) -> TransformerOutput:
        """See :data:`TRANSFORMER_REGISTRY`."""
        name = self.in_features[0]
        projected, mask = self.input_proj(features[name]), padding_masks[name]
        height, width = projected.shape[-2:]
        tokens = projected.flatten(2).transpose(1, 2)
        pos = self.position_encoding(mask).flatten(1, 2).to(tokens.dtype)
        key_padding_mask = mask.flatten(1) if any_padding else None

        memory, streams = self.encoder(tokens, pos, key_padding_mask)
        query_pos = self.query_embed.weight.expand(memory.shape[0], -1, -1)
        hidden_states = self.decoder(
            query_pos,
            memory,
            streams.expand(pos),
            None if key_padding_mask is None else streams.expand(key_padding_mask),
        )
        memory_map = memory.transpose(1, 2).unflatten(2, (height, width))
        return TransformerOutput(hidden_states, None, projected, memory_map, mask, streams)


@TRANSFORMER_REGISTRY.register()
def detr(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> DETRTransformer:
    """``MODEL.DETR.TRANSFORMER_NAME: "detr"``."""
    return DETRTransformer(cfg, input_shape)
