"""Conditional-DETR (Meng et al. 2021): content and position are attended to separately.

Shapes: B' = streams * B entries, N tokens of the encoder, Q queries, C channels, D channels of a
head, L decoder layers. Parameter names are those of Atten4Vis/ConditionalDETR.
"""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers import MLP, joint_linear, sine_encoding
from .base import TRANSFORMER_REGISTRY
from .detr import SingleScaleTransformer, post_norm_arguments
from .layers import Decoder, FeedForwardLayer, MemoryGrid, for_products


class ConditionalAttention(nn.Module):
    """Attention between projected heads, followed by the output projection ``out_proj``.

    The input projections belong to the decoder layer, which combines them before it splits heads.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.zeros_(self.out_proj.bias)  # as in nn.MultiheadAttention, and as published

    def split_heads(self, x: Tensor) -> Tensor:
        """(B', N, C) -> (B', heads, N, C / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, valid_mask: Tensor | None = None
    ) -> Tensor:
        """(B', heads, Q or N, D) each; ``valid_mask`` True where attended to -> (B', Q, C)."""
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=valid_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))


class ConditionalDecoderLayer(FeedForwardLayer):
    """Decoder layer of Conditional-DETR (section 3.3).

    Cross-attention scores are the sum of a content term and a position term: the two are
    concatenated in each head instead of added. Only the first layer also adds the query position
    to the content, since its content is zero.

    Args:
        embed_dim: channels C.
        num_heads: attention heads; must divide ``embed_dim``.
        dim_feedforward: hidden width of the feed-forward network.
        dropout: of attention weights and residual branches.
        is_first: whether this is the first layer.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        is_first: bool,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim, dim_feedforward=dim_feedforward, dropout=dropout, pre_norm=False
        )
        self.sa_qcontent_proj = nn.Linear(embed_dim, embed_dim)
        self.sa_qpos_proj = nn.Linear(embed_dim, embed_dim)
        self.sa_kcontent_proj = nn.Linear(embed_dim, embed_dim)
        self.sa_kpos_proj = nn.Linear(embed_dim, embed_dim)
        self.sa_v_proj = nn.Linear(embed_dim, embed_dim)
        self.ca_qcontent_proj = nn.Linear(embed_dim, embed_dim)
        self.ca_qpos_proj = nn.Linear(embed_dim, embed_dim) if is_first else None
        self.ca_kcontent_proj = nn.Linear(embed_dim, embed_dim)
        self.ca_kpos_proj = nn.Linear(embed_dim, embed_dim)
        self.ca_v_proj = nn.Linear(embed_dim, embed_dim)
        self.ca_qpos_sine_proj = nn.Linear(embed_dim, embed_dim)
        attention = {"embed_dim": embed_dim, "num_heads": num_heads}
        self.self_attn = ConditionalAttention(**attention, dropout=dropout)
        self.cross_attn = ConditionalAttention(**attention, dropout=dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        queries: Tensor,
        positions: Sequence[Tensor],
        spatial_query: Tensor,
        key: Tensor,
        key_pos: Tensor,
        value: Tensor,
        valid_mask: Tensor | None,
    ) -> Tensor:
        """Update the queries.

        Args:
            queries: (B', Q, C) content of the queries.
            positions: outputs (B', Q, C) of :meth:`position_layers` for the learned positions.
            spatial_query: (B', Q, C) sine encoding of the reference points, scaled.
            key: (B', N, C) output of ``ca_kcontent_proj`` for the memory.
            key_pos: (B', N, C) output of ``ca_kpos_proj`` for the position encoding of the tokens.
            value: (B', N, C) output of ``ca_v_proj`` for the memory.
            valid_mask: (B', 1, 1, N) bool, False at padding, or None.

        Returns:
            (B', Q, C).
        """
        split = self.self_attn.split_heads
        self_attention = [self.sa_qcontent_proj, self.sa_kcontent_proj, self.sa_v_proj]
        q, k, v = joint_linear(queries, self_attention)
        attended = self.self_attn(split(q + positions[0]), split(k + positions[1]), split(v))
        queries = self.norm1(queries + self.dropout(attended))

        content = self.ca_qcontent_proj(queries)
        if self.ca_qpos_proj is not None:
            content, key = content + positions[2], key + key_pos
        spatial = self.ca_qpos_sine_proj(spatial_query)
        attended = self.cross_attn(
            torch.cat([split(content), split(spatial)], dim=-1),
            torch.cat([split(key), split(key_pos)], dim=-1),
            split(value),
            valid_mask,
        )
        queries = self.norm2(queries + self.dropout(attended))
        return self._feed_forward(queries, self.norm3)

    def position_layers(self) -> list[nn.Linear]:
        """The projections of the learned positions, of which the first layer has one more."""
        layers = [self.sa_qpos_proj, self.sa_kpos_proj, self.ca_qpos_proj]
        return [layer for layer in layers if layer is not None]


class ConditionalDecoder(Decoder):
    """Decoder of Conditional-DETR (section 3): each query attends around a reference point.

    The reference point is predicted from the query position. Its sine encoding is the spatial part
    of the cross-attention's query; from the second layer on it is scaled by a function of the query
    content. All layers regress boxes from the same reference points, as published.
    """

    box_bias = (0.0, 0.0, 0.0, 0.0)  # boxes start at their reference points

    def __init__(self, layers: Sequence[ConditionalDecoderLayer], *, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(embed_dim)
        self.query_scale = MLP(
            input_dim=embed_dim, hidden_dim=embed_dim, output_dim=embed_dim, num_layers=2
        )
        self.ref_point_head = MLP(
            input_dim=embed_dim, hidden_dim=embed_dim, output_dim=2, num_layers=2
        )

    def forward(
        self,
        query_pos: Tensor,
        memory: Tensor,
        pos: Tensor,
        key_padding_mask: Tensor | None,
        grid: MemoryGrid,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Decoder`."""
        queries = torch.zeros_like(query_pos)
        query_pos = for_products(query_pos)
        references = self.ref_point_head(query_pos).float()
        # The position encoding of the tokens starts with the rows, reference points with x.
        where = sine_encoding(references.sigmoid().flip(-1), query_pos.shape[-1])
        valid_mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
        # All layers read the same positions and the same memory: each is projected at once.
        layers: list[Any] = list(self.layers)
        positions = joint_linear(
            query_pos, chain.from_iterable(x.position_layers() for x in layers)
        )
        of_memory = [x.ca_kcontent_proj for x in layers] + [x.ca_v_proj for x in layers]
        keys_and_values = joint_linear(memory, of_memory)
        keys, values = keys_and_values[: len(layers)], keys_and_values[len(layers) :]
        keys_pos = joint_linear(pos, (x.ca_kpos_proj for x in layers))
        of_layer = iter(positions)
        states = []
        for index, layer in enumerate(layers):
            spatial = where if index == 0 else where * self.query_scale(queries)
            own = tuple(islice(of_layer, len(layer.position_layers())))
            memories = keys[index], keys_pos[index], values[index]
            queries = layer(queries, own, spatial, *memories, valid_mask)
            states.append(queries)
        return self.norm(torch.stack(states)), references.expand(len(states), -1, -1, -1)


@TRANSFORMER_REGISTRY.register()
def conditional(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> SingleScaleTransformer:
    """Conditional-DETR: one reference point for each query."""
    arguments = post_norm_arguments(cfg)
    layers = [
        ConditionalDecoderLayer(**arguments, is_first=index == 0)
        for index in range(cfg.MODEL.DETR.DEC_LAYERS)
    ]
    decoder = ConditionalDecoder(layers, embed_dim=cfg.MODEL.DETR.HIDDEN_DIM)
    return SingleScaleTransformer(cfg, input_shape, decoder)
