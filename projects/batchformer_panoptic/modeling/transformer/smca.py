"""SMCA (Gao et al. 2021, arXiv 2101.07448): cross-attention looks around a predicted place.

Each head of each query has a place and a width; cells far from it lose attention as in a Gaussian.
The decoder serves one map (``smca``) and several (``smca_multiscale``).

Shapes: B' images times streams, Q queries, N tokens of all levels, C channels.
"""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...errors import UserError
from ...layers import MLP
from .base import TRANSFORMER_REGISTRY
from .decoder import Decoder, MemoryGrid
from .detr import SingleScaleTransformer, in_feature_shape, post_norm_arguments
from .layers import FeedForwardLayer
from .smca_attention import LevelAttention, SpatialPrior


class SMCADecoderLayer(FeedForwardLayer):
    """Decoder layer of DETR (norm after attention) whose cross-attention has a spatial prior.

    Args:
        embed_dim: channels C.
        num_heads: attention heads H.
        dim_feedforward: hidden width of the feed-forward network.
        dropout: of attention weights and residual branches.
        strides: pixels of a cell, of each level.
        dynamic_scale: a key of :data:`DYNAMIC_SCALES`.
        smooth: see :class:`SpatialPrior`.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        strides: Sequence[int],
        dynamic_scale: str,
        smooth: float,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim, dim_feedforward=dim_feedforward, dropout=dropout, pre_norm=False
        )
        self.self_attn = nn.MultiheadAttention(
            embed_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.multihead_attn = LevelAttention(
            embed_dim=embed_dim, num_heads=num_heads, dropout=dropout
        )
        self.prior = SpatialPrior(
            embed_dim=embed_dim,
            num_heads=num_heads,
            strides=strides,
            dynamic_scale=dynamic_scale,
            smooth=smooth,
        )
        self.query_norm = nn.LayerNorm(embed_dim)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def locate(self, queries: Tensor, query_pos: Tensor) -> Tensor:
        """(B', Q, C) queries and positions -> (B', Q, C) from which places are predicted."""
        return self.query_norm(queries + query_pos)

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        memory_keys: Tensor,
        centers: Tensor,
        map_sizes: Sequence[tuple[int, int]],
        key_padding_mask: Tensor | None,
    ) -> Tensor:
        """Update the queries.

        Args:
            queries: (B', Q, C) content of the queries.
            query_pos: (B', Q, C) learned positions.
            memory: (B', N, C) values of the cross-attention.
            memory_keys: (B', N, C) its keys: memory plus position encoding.
            centers: (B', Q, 2) float32, x and y in pixels, around which the queries look.
            map_sizes: (height, width) in cells of each level.
            key_padding_mask: (B', N) bool, True at padding, or None.

        Returns:
            (B', Q, C).
        """
        where = self.locate(queries, query_pos)
        biases = self.prior.biases(where, centers, map_sizes, key_padding_mask)
        keys = queries + query_pos
        attended = self.self_attn(keys, keys, queries, need_weights=False)[0]
        queries = self.norm1(queries + self.dropout(attended))
        attended = self.multihead_attn(
            queries + query_pos, memory_keys, memory, biases, self.prior.level_weights(where)
        )
        queries = self.norm2(queries + self.dropout(attended))
        return self._feed_forward(queries, self.norm3)


class SMCADecoder(Decoder):
    """Decoder of SMCA for any number of levels.

    The first layer predicts the centre of each query, a share of the image's width and height; all
    layers look around it, each with its own offsets, and all boxes are regressed from it.
    """

    def __init__(self, layers: Sequence[SMCADecoderLayer], *, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(embed_dim)
        self.center_head = MLP(
            input_dim=embed_dim, hidden_dim=embed_dim, output_dim=2, num_layers=3
        )

    def start_at_unit_scale(self) -> None:
        """See :meth:`SpatialPrior.start_at_unit_scale`; called after other initialisation."""
        for module in self.modules():
            if isinstance(module, SpatialPrior):
                module.start_at_unit_scale()

    def forward(
        self,
        query_pos: Tensor,
        memory: Tensor,
        pos: Tensor,
        key_padding_mask: Tensor | None,
        grid: MemoryGrid,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Decoder`."""
        memory_keys = memory + pos
        queries = torch.zeros_like(query_pos)
        first = self.layers[0]
        assert isinstance(first, SMCADecoderLayer)
        references = self.center_head(first.locate(queries, query_pos)).float()
        centers = references.sigmoid() * grid.image_sizes_xy(memory.device)[:, None]
        states = []
        for layer in self.layers:
            queries = layer(
                queries,
                query_pos,
                memory,
                memory_keys,
                centers,
                grid.map_sizes,
                key_padding_mask,
            )
            states.append(self.norm(queries))
        return torch.stack(states), references.expand(len(states), -1, -1, -1)


def build_smca_decoder(cfg: CfgNode, strides: Sequence[int]) -> SMCADecoder:
    """The decoder of ``MODEL.SMCA`` over levels of these strides."""
    node = cfg.MODEL.SMCA
    if not node.SMOOTH > 0:
        raise UserError(f"MODEL.SMCA.SMOOTH is {node.SMOOTH}; it must be positive")
    layers = [
        SMCADecoderLayer(
            **post_norm_arguments(cfg),
            strides=strides,
            dynamic_scale=node.DYNAMIC_SCALE,
            smooth=node.SMOOTH,
        )
        for _ in range(cfg.MODEL.DETR.DEC_LAYERS)
    ]
    return SMCADecoder(layers, embed_dim=cfg.MODEL.DETR.HIDDEN_DIM)


@TRANSFORMER_REGISTRY.register()
def smca(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> SingleScaleTransformer:
    """SMCA over one map."""
    decoder = build_smca_decoder(cfg, [in_feature_shape(cfg, input_shape).stride])
    transformer = SingleScaleTransformer(cfg, input_shape, decoder)
    decoder.start_at_unit_scale()
    return transformer
