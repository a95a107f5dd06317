"""Encoder and decoder layers of DETR (Carion et al. 2020, appendix A.3).

Shapes: B' images times streams, N tokens of the encoder, Q queries, C channels. Parameter names
are those of facebookresearch/detr.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class _FeedForwardLayer(nn.Module):
    """The feed-forward half that encoder and decoder layers share."""

    def __init__(
        self, *, embed_dim: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def _feed_forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        inner = norm(x) if self.pre_norm else x
        out = x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(inner)))))
        return out if self.pre_norm else norm(out)


class EncoderLayer(_FeedForwardLayer):
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


class DecoderLayer(_FeedForwardLayer):
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
