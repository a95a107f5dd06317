"""What every decoder over a memory takes and returns; those of DETR and Conditional-DETR.

Shapes: B' images times streams, N tokens, Q queries, C channels, L decoder layers.

Encoder and decoder layers of DETR (Carion et al. 2020, appendix A.3) and Conditional-DETR.

Shapes: B' images times streams, N tokens of the encoder, Q queries, C channels. Parameter names
are those of facebookresearch/detr and Atten4Vis/ConditionalDETR.

The encoder of DETR, with a hook after each layer.

Shapes: B images, B' = streams * B, N tokens, C channels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...batchformer import BatchFormerHook, IdentityHook, StreamState
from ...batchformer.batchformer import SINGLE
from ...layers import MLP, TokenLinear, sine_encoding
from ..padding import BatchPadding


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


class DETREncoder(nn.Module):
    """Encoder layers with a hook after each; the hook may open a second stream.

    Args:
        layers: the encoder layers.
        hook: an IdentityHook or a BatchFormerHook.
        norm: applied to the output, or None.
    """

    def __init__(
        self,
        layers: Sequence[EncoderLayer],
        *,
        hook: IdentityHook | BatchFormerHook,
        norm: nn.Module | None,
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


class MemoryGrid(NamedTuple):
    """Where the tokens of a memory lie, for decoders that reckon in cells and pixels.

    Attributes:
        map_sizes: (height, width) in cells of each level, in the order of the tokens.
        padding: the sizes of the images.
        streams: the streams along B'.
    """

    map_sizes: Sequence[tuple[int, int]]
    padding: BatchPadding
    streams: StreamState

    def image_sizes_xy(self, device: torch.device) -> Tensor:
        """(B', 2) float32: width and height in pixels of each image, before padding."""
        sizes = torch.tensor(self.padding.image_sizes, dtype=torch.float32).flip(-1)
        return self.streams.expand(sizes.to(device, non_blocking=True))


class Decoder(nn.Module):
    """Base of the decoders that attend to a whole memory."""

    def forward(
        self,
        query_pos: Tensor,
        memory: Tensor,
        pos: Tensor,
        key_padding_mask: Tensor | None,
        grid: MemoryGrid,
    ) -> tuple[Tensor, Tensor | None]:
        """Decode.

        Args:
            query_pos: (B', Q, C) learned positions of the queries.
            memory: (B', N, C) output of the encoder.
            pos: (B', N, C) position encoding of its tokens.
            key_padding_mask: (B', N) bool, True at padding, or None.
            grid: where the tokens lie.

        Returns:
            (L, B', Q, C) normalised states after each layer, and the reference points as
            (L, B', Q, 2) float32 logits (x, y), or None.
        """
        raise NotImplementedError


class DETRDecoder(Decoder):
    """Decoder layers of DETR; every layer's output is normalised and returned."""

    def __init__(self, layers: Sequence[DecoderLayer], *, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(
        self,
        query_pos: Tensor,
        memory: Tensor,
        pos: Tensor,
        key_padding_mask: Tensor | None,
        grid: MemoryGrid,
    ) -> tuple[Tensor, None]:
        """See :class:`Decoder`; there are no reference points."""
        memory_keys = memory + pos
        queries = torch.zeros_like(query_pos)
        states = []
        for layer in self.layers:
            queries = layer(queries, query_pos, memory, memory_keys, key_padding_mask)
            states.append(self.norm(queries))
        return torch.stack(states), None


class ConditionalDecoder(Decoder):
    """Decoder of Conditional-DETR (Meng et al. 2021, section 3): queries know where to look.

    Each query position gives a reference point, and the spatial part of the cross-attention asks
    for the neighbourhood of that point, scaled by what the query has seen so far. All layers
    regress from the same reference points, as published.
    """

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
        references = self.ref_point_head(query_pos).float()
        # Rows before columns, as the position encoding of the tokens.
        where = sine_encoding(references.sigmoid().flip(-1), query_pos.shape[-1])
        valid_mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
        queries = torch.zeros_like(query_pos)
        states = []
        for index, layer in enumerate(self.layers):
            spatial = where if index == 0 else where * self.query_scale(queries)
            queries = layer(queries, query_pos, spatial, memory, pos, valid_mask)
            states.append(self.norm(queries))
        return torch.stack(states), references.expand(len(states), -1, -1, -1)
