"""Encoder and decoder of Deformable-DETR (Zhu et al. 2021), with a hook after each encoder layer.

Shapes: B images, B' = streams * B, N tokens of L levels one after the other, Q queries, C channels.
Parameter names are those of fundamentalvision/Deformable-DETR.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...batchformer import BatchFormerHook, IdentityHook, StreamState
from ...batchformer.streams import SINGLE
from ...layers import MSDeformAttn
from .base import BoxPredictor
from .deformable_levels import Levels
from .layers import FeedForwardLayer

# Bound of reference points as logits, where the published inverse sigmoid ends (at 1e-5).
_LARGEST_LOGIT = 11.5129


class DeformableEncoderLayer(FeedForwardLayer):
    """Deformable self-attention over the tokens of all levels, then the feed-forward network."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        dim_feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim, dim_feedforward=dim_feedforward, dropout=dropout, pre_norm=False
        )
        self.self_attn = MSDeformAttn(
            embed_dim=embed_dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(self, tokens: Tensor, levels: Levels) -> Tensor:
        """(B', N, C) tokens and what is known of their levels -> (B', N, C)."""
        attended = self.self_attn(
            tokens + levels.pos,
            levels.cell_centers(),
            tokens,
            levels.shapes,
            levels.key_padding_mask,
        )
        return self._feed_forward(self.norm1(tokens + self.dropout(attended)), self.norm2)


class DeformableDecoderLayer(FeedForwardLayer):
    """Self-attention of the queries, deformable cross-attention, feed-forward network."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        dim_feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim, dim_feedforward=dim_feedforward, dropout=dropout, pre_norm=False
        )
        self.cross_attn = MSDeformAttn(
            embed_dim=embed_dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.self_attn = nn.MultiheadAttention(
            embed_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        levels: Levels,
    ) -> Tensor:
        """Update the queries.

        Args:
            queries: (B', Q, C) content of the queries.
            query_pos: (B', Q, C) their positions, added wherever they ask.
            reference_points: (B', Q, 2 or 4) in 0 to 1 over the image without padding.
            memory: (B', N, C).
            levels: of the memory.

        Returns:
            (B', Q, C).
        """
        keys = queries + query_pos
        attended = self.self_attn(keys, keys, queries, need_weights=False)[0]
        queries = self.norm2(queries + self.dropout(attended))
        attended = self.cross_attn(
            queries + query_pos,
            levels.on_each_level(reference_points),
            memory,
            levels.shapes,
            levels.key_padding_mask,
        )
        return self._feed_forward(self.norm1(queries + self.dropout(attended)), self.norm3)


class DeformableEncoder(nn.Module):
    """Encoder layers with a hook after each; the hook may open a second stream."""

    def __init__(
        self,
        layers: Sequence[DeformableEncoderLayer],
        *,
        hook: IdentityHook | BatchFormerHook,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.batchformer = hook

    def forward(self, tokens: Tensor, levels: Levels) -> tuple[Tensor, Levels, StreamState]:
        """Encode.

        Args:
            tokens: (B, N, C).
            levels: what is known of them.

        Returns:
            Memory (B', N, C), its levels, and the streams along B'.
        """
        streams, now = SINGLE, levels
        for index, layer in enumerate(self.layers):
            tokens = layer(tokens, now)
            tokens, state = self.batchformer.after_layer(
                index, tokens, streams, now.key_padding_mask
            )
            if state != streams:
                streams, now = state, levels.expand(state)
        return tokens, now, streams


class DeformableDecoder(nn.Module):
    """Decoder layers over reference points that stay, or that each layer refines.

    Args:
        layers: the decoder layers.
        box_refine: let the box head of each layer move the reference points of the next one
            (appendix A.4, "iterative bounding box refinement"); no gradient flows through them.
    """

    def __init__(self, layers: Sequence[DeformableDecoderLayer], *, box_refine: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.box_refine = box_refine

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        references: Tensor,
        memory: Tensor,
        levels: Levels,
        box_head: BoxPredictor,
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            queries: (B', Q, C) content that the queries start from.
            query_pos: (B', Q, C) their positions.
            references: (B', Q, 2 or 4) reference points of the first layer, as logits.
            memory: (B', N, C).
            levels: of the memory.
            box_head: asked for boxes when they are refined.

        Returns:
            (layers, B', Q, C) states after each layer, and (layers, B', Q, 2 or 4) logits that
            each layer's boxes are offsets from. Refined from points, they are boxes throughout:
            width and height of the first layer's start from the logit 0.
        """
        references = references.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        states, starts = [], []
        for index, layer in enumerate(self.layers):
            queries = layer(queries, query_pos, references.sigmoid(), memory, levels)
            states.append(queries)
            starts.append(references)
            if self.box_refine and index + 1 < len(self.layers):
                # Not under no_grad: autocast of older torch would keep the head's weights, cast
                # without gradients, and give them to the losses as well.
                boxes = box_head.predict_layer(index, queries, references)[1].detach()
                references = boxes.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        width = max(start.shape[-1] for start in starts)
        starts = [nn.functional.pad(start, (0, width - start.shape[-1])) for start in starts]
        return torch.stack(states), torch.stack(starts)
