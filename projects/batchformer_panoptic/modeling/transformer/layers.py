"""Encoder and decoder layers of DETR (Carion et al. 2020, appendix A.3) and Conditional-DETR.

Shapes: B' images times streams, N tokens of the encoder, Q queries, C channels. Parameter names
are those of facebookresearch/detr and Atten4Vis/ConditionalDETR.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...layers import TokenLinear


class FeedForwardLayer(nn.Module):
    """The feed-forward half that encoder and decoder layers share.

    Attributes:
        recompute: keep only the inputs for the backward pass, which then runs the layer a second
            time, with the same dropout (activation checkpointing).
    """

    recompute = False

    def __init__(
        self, *, embed_dim: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.linear1 = TokenLinear(embed_dim, dim_feedforward)
        self.linear2 = TokenLinear(dim_feedforward, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def __call__(self, *inputs: Any) -> Any:
        """Run the layer, hooks included."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False)
        return super().__call__(*inputs)

    def _feed_forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        inner = norm(x) if self.pre_norm else x
        out = x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(inner)))))
        return out if self.pre_norm else norm(out)


class EncoderLayer(FeedForwardLayer):
    """Self-attention over the tokens of one image, then the feed-forward network."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool = False,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            pre_norm=pre_norm,
        )
        self.self_attn = nn.MultiheadAttention(
            embed_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(self, tokens: Tensor, pos: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """(B', N, C) tokens and positions, (B', N) bool mask True at padding -> (B', N, C)."""
        inner = self.norm1(tokens) if self.pre_norm else tokens
        query = inner + pos
        attended = self.self_attn(
            query, query, inner, key_padding_mask=key_padding_mask, need_weights=False
        )[0]
        tokens = tokens + self.dropout(attended)
        if not self.pre_norm:
            tokens = self.norm1(tokens)
        return self._feed_forward(tokens, self.norm2)


class DecoderLayer(FeedForwardLayer):
    """Self-attention of the queries, cross-attention to the memory, feed-forward network."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool = False,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            pre_norm=pre_norm,
        )
        self.self_attn = nn.MultiheadAttention(
            embed_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.multihead_attn = nn.MultiheadAttention(
            embed_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        memory_keys: Tensor,
        key_padding_mask: Tensor | None,
    ) -> Tensor:
        """Update the queries.

        Args:
            queries: (B', Q, C) content of the queries.
            query_pos: (B', Q, C) learned positions, added to queries and keys of attention.
            memory: (B', N, C) values of the cross-attention.
            memory_keys: (B', N, C) its keys: memory plus position encoding.
            key_padding_mask: (B', N) bool, True at padding, or None.

        Returns:
            (B', Q, C).
        """
        inner = self.norm1(queries) if self.pre_norm else queries
        keys = inner + query_pos
        attended = self.self_attn(keys, keys, inner, need_weights=False)[0]
        queries = queries + self.dropout(attended)
        if not self.pre_norm:
            queries = self.norm1(queries)

        inner = self.norm2(queries) if self.pre_norm else queries
        attended = self.multihead_attn(
            inner + query_pos,
            memory_keys,
            memory,
            key_padding_mask=key_padding_mask,
            need_weights=False,
        )[0]
        queries = queries + self.dropout(attended)
        if not self.pre_norm:
            queries = self.norm2(queries)
        return self._feed_forward(queries, self.norm3)


class ConditionalAttention(nn.Module):
    """Attention over heads that were projected outside; nothing but dropout and ``out_proj``."""

    def __init__(self, *, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.out_proj = TokenLinear(embed_dim, embed_dim)

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
    """Decoder layer of Conditional-DETR (Meng et al. 2021, section 3.3).

    In the cross-attention content meets content and position meets position: their halves are
    concatenated head by head instead of added. Only the first layer also adds the query position
    to the content, since its content is zero.
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
        self.sa_qcontent_proj = TokenLinear(embed_dim, embed_dim)
        self.sa_qpos_proj = TokenLinear(embed_dim, embed_dim)
        self.sa_kcontent_proj = TokenLinear(embed_dim, embed_dim)
        self.sa_kpos_proj = TokenLinear(embed_dim, embed_dim)
        self.sa_v_proj = TokenLinear(embed_dim, embed_dim)
        self.ca_qcontent_proj = TokenLinear(embed_dim, embed_dim)
        self.ca_qpos_proj = TokenLinear(embed_dim, embed_dim) if is_first else None
        self.ca_kcontent_proj = TokenLinear(embed_dim, embed_dim)
        self.ca_kpos_proj = TokenLinear(embed_dim, embed_dim)
        self.ca_v_proj = TokenLinear(embed_dim, embed_dim)
        self.ca_qpos_sine_proj = TokenLinear(embed_dim, embed_dim)
        attention = {"embed_dim": embed_dim, "num_heads": num_heads}
        self.self_attn = ConditionalAttention(**attention, dropout=dropout)
        self.cross_attn = ConditionalAttention(**attention, dropout=dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        spatial_query: Tensor,
        memory: Tensor,
        pos: Tensor,
        valid_mask: Tensor | None,
    ) -> Tensor:
        """Update the queries.

        Args:
            queries: (B', Q, C) content of the queries.
            query_pos: (B', Q, C) learned positions.
            spatial_query: (B', Q, C) sine encoding of the reference points, scaled.
            memory: (B', N, C).
            pos: (B', N, C) position encoding of the tokens.
            valid_mask: (B', 1, 1, N) bool, False at padding, or None.

        Returns:
            (B', Q, C).
        """
        split = self.self_attn.split_heads
        attended = self.self_attn(
            split(self.sa_qcontent_proj(queries) + self.sa_qpos_proj(query_pos)),
            split(self.sa_kcontent_proj(queries) + self.sa_kpos_proj(query_pos)),
            split(self.sa_v_proj(queries)),
        )
        queries = self.norm1(queries + self.dropout(attended))

        content, key = self.ca_qcontent_proj(queries), self.ca_kcontent_proj(memory)
        key_pos = self.ca_kpos_proj(pos)
        if self.ca_qpos_proj is not None:
            content, key = content + self.ca_qpos_proj(query_pos), key + key_pos
        spatial = self.ca_qpos_sine_proj(spatial_query)
        attended = self.cross_attn(
            torch.cat([split(content), split(spatial)], dim=-1),
            torch.cat([split(key), split(key_pos)], dim=-1),
            split(self.ca_v_proj(memory)),
            valid_mask,
        )
        queries = self.norm2(queries + self.dropout(attended))
        return self._feed_forward(queries, self.norm3)
