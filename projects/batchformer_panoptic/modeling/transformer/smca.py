"""SMCA (Gao et al. 2021, arXiv 2101.07448): cross-attention with a Gaussian spatial prior.

Each head of each query predicts a place and a width; a Gaussian reduces its attention to cells far
from that place. The decoder serves one map (``smca``) and several (``smca_multiscale``).

Shapes: B' = streams * B entries, Q queries, N tokens of all L levels, C channels, H heads, K
numbers that shape a Gaussian.
"""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError
from ...layers import MLP
from .base import TRANSFORMER_REGISTRY
from .detr import SingleScaleTransformer, in_feature_shape, post_norm_arguments
from .layers import Decoder, FeedForwardLayer, MemoryGrid, attend, for_products

# Numbers that shape the Gaussian of a head, for each choice of ``dynamic_scale``.
DYNAMIC_SCALES = {"fixed": 0, "isotropic": 1, "per_axis": 2, "per_axis_and_product": 3}
# The stride of the map for which the published divisor of distances ("smooth", 8) is meant.
_SMOOTH_STRIDE = 32
# Low enough that the softmax weight is zero, even at half this value, and still representable in
# half precision.
_LOWEST_BIAS = -3e4


def gaussian_bias(centers: Tensor, weights: Tensor, map_size: tuple[int, int]) -> Tensor:
    """Additive attention bias: minus the weighted squared distance of each cell to the centre.

    Terms of rows and of columns are computed separately and broadcast once, in the result. Cells
    have integer coordinates, as published, without an offset of half a cell.

    Args:
        centers: (..., 2) float, x and y in cells.
        weights: (..., K) non-negative float, of the squared distances: K = 1 for both axes, 2 for x
            and y, 3 for x, y and the product of the squared distances.
        map_size: (height, width) in cells.

    Returns:
        (..., height * width) from -3e4 to 0.
    """
    height, width = map_size
    rows = torch.arange(height, device=centers.device)
    columns = torch.arange(width, device=centers.device)
    weights = weights.neg()
    dx = (centers[..., 0, None] - columns).square()
    dy = (centers[..., 1, None] - rows).square()
    weight_x = weights[..., :1]
    weight_y = weights[..., 1:2] if weights.shape[-1] > 1 else weight_x
    # Clamped before the sum: a clamp of the sum would keep a second full-size copy for backward.
    of_rows = (weight_y * dy).clamp(min=_LOWEST_BIAS / 2)
    of_columns = (weight_x * dx).clamp(min=_LOWEST_BIAS / 2)
    bias = of_rows[..., :, None] + of_columns[..., None, :]
    if weights.shape[-1] > 2:
        bias = bias + (weights[..., 2:] * dy)[..., :, None] * dx[..., None, :]
        bias = bias.clamp(min=_LOWEST_BIAS)
    return bias.flatten(-2)


class SpatialPrior(nn.Module):
    """Spatial prior of one decoder layer: attention biases, and the weights of the levels.

    Args:
        embed_dim: channels C of a query.
        num_heads: attention heads H.
        strides: pixels per cell, of each level.
        dynamic_scale: a key of :data:`DYNAMIC_SCALES`.
        smooth: positive divisor of squared distances in cells of stride 32; inversely proportional
            to the stride on other levels, as published.

    Raises:
        ValueError: an unknown ``dynamic_scale``.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        strides: Sequence[int],
        dynamic_scale: str,
        smooth: float,
    ) -> None:
        super().__init__()
        if dynamic_scale not in DYNAMIC_SCALES:
            raise ValueError(
                f"dynamic_scale is {dynamic_scale!r}; known: {', '.join(DYNAMIC_SCALES)}"
            )
        self.strides = tuple(strides)
        self.num_heads = num_heads
        self.smooths = [smooth * _SMOOTH_STRIDE / stride for stride in strides]
        num_gaussians = len(self.strides) * num_heads
        num_scales = DYNAMIC_SCALES[dynamic_scale]
        self.offset_head = nn.Linear(embed_dim, 2 * num_gaussians)
        self.scale_head = nn.Linear(embed_dim, num_scales * num_gaussians) if num_scales else None
        self.level_head = nn.Linear(embed_dim, len(self.strides)) if len(self.strides) > 1 else None

    def start_at_unit_scale(self) -> None:
        """Start with a width of one for every query, as published."""
        if self.scale_head is not None:
            nn.init.zeros_(self.scale_head.weight)
            nn.init.ones_(self.scale_head.bias)

    def biases(
        self,
        where: Tensor,
        centers: Tensor,
        map_sizes: Sequence[tuple[int, int]],
        key_padding_mask: Tensor | None,
    ) -> list[Tensor]:
        """Additive biases of the attention scores of each level.

        Args:
            where: (B', Q, C) normalised queries with their positions.
            centers: (B', Q, 2) float32, x and y in pixels.
            map_sizes: (height, width) in cells of each level.
            key_padding_mask: (B', N) bool over all levels, True at padding, or None.

        Returns:
            L tensors (B', H, Q, height * width) float32, -inf at padding.
        """
        offsets = self._by_level(self.offset_head(where))
        if self.scale_head is None:
            scales = [centers.new_ones(1)] * len(self.strides)
        else:
            scales = [scale.square() for scale in self._by_level(self.scale_head(where))]
        lengths = [height * width for height, width in map_sizes]
        biases = []
        for level, map_size in enumerate(map_sizes):
            places = centers[:, None] / self.strides[level] + offsets[level]
            biases.append(gaussian_bias(places, scales[level] / self.smooths[level], map_size))
        if key_padding_mask is None:
            return biases
        masks = key_padding_mask[:, None, None].split(lengths, dim=-1)
        # The published code adds the Gaussian to scores that are -inf at padding: the same sum.
        return [
            bias.masked_fill(mask, -torch.inf) for bias, mask in zip(biases, masks, strict=True)
        ]

    def level_weights(self, where: Tensor) -> Tensor | None:
        """(B', Q, C) -> (B', Q, L) for each query, positive with sum 1; None for one level.

        The published code applies the weights of the first image to the whole batch.
        """
        return None if self.level_head is None else self.level_head(where).softmax(-1)

    def _by_level(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B', Q, L * H * K) -> L tensors (B', H, Q, K) float32."""
        x = x.float().unflatten(-1, (len(self.strides), self.num_heads, -1))
        return x.transpose(1, 3).unbind(2)


class LevelAttention(nn.MultiheadAttention):
    """Multi-head attention with a softmax over each level, and a weighted sum of the levels."""

    def __init__(self, *, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(embed_dim, num_heads, dropout=dropout, batch_first=True)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        biases: Sequence[Tensor],
        level_weights: Tensor | None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B', Q, C).
            key: (B', N, C), level after level.
            value: (B', N, C).
            biases: L tensors (B', H, Q, N_l) that are added to the scores.
            level_weights: (B', Q, L), or None for the plain sum.

        Returns:
            (B', Q, C).
        """
        weights = self.in_proj_weight.chunk(3)
        offsets = self.in_proj_bias.chunk(3)
        heads = [
            F.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, offsets, strict=True)
        ]
        lengths = [bias.shape[-1] for bias in biases]
        keys, values = heads[1].split(lengths, dim=2), heads[2].split(lengths, dim=2)
        outputs = []
        for level, bias in enumerate(biases):
            attended = F.scaled_dot_product_attention(
                heads[0],
                keys[level],
                values[level],
                attn_mask=bias.to(heads[0].dtype),
                dropout_p=self.dropout if self.training else 0.0,
            )
            if level_weights is not None:
                attended = attended * level_weights[:, None, :, level, None]
            outputs.append(attended)
        return self.out_proj(torch.stack(outputs).sum(0).transpose(1, 2).flatten(2))


class SMCADecoderLayer(FeedForwardLayer):
    """Decoder layer of DETR (norm after attention) whose cross-attention has a spatial prior.

    Args:
        embed_dim: channels C.
        num_heads: attention heads H.
        dim_feedforward: hidden width of the feed-forward network.
        dropout: of attention weights and residual branches.
        strides: pixels per cell, of each level.
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
        """(B', Q, C) queries and positions -> (B', Q, C) input of the heads that predict places."""
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
            centers: (B', Q, 2) float32, x and y in pixels, the centres of the Gaussians.
            map_sizes: (height, width) in cells of each level.
            key_padding_mask: (B', N) bool, True at padding, or None.

        Returns:
            (B', Q, C).
        """
        where = self.locate(queries, query_pos)
        biases = self.prior.biases(where, centers, map_sizes, key_padding_mask)
        keys = queries + query_pos
        attended = attend(self.self_attn, keys, keys, queries)
        queries = self.norm1(queries + self.dropout(attended))
        attended = self.multihead_attn(
            queries + query_pos, memory_keys, memory, biases, self.prior.level_weights(where)
        )
        queries = self.norm2(queries + self.dropout(attended))
        return self._feed_forward(queries, self.norm3)


class SMCADecoder(Decoder):
    """Decoder of SMCA for any number of levels.

    The first layer predicts the centre of each query, as a share of the image's width and height.
    All layers attend around it, each with its own offsets, and all boxes are regressed from it.
    """

    def __init__(self, layers: Sequence[SMCADecoderLayer], *, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(embed_dim)
        self.center_head = MLP(
            input_dim=embed_dim, hidden_dim=embed_dim, output_dim=2, num_layers=3
        )

    def start_at_unit_scale(self) -> None:
        """See :meth:`SpatialPrior.start_at_unit_scale`; called after all other initialisation."""
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
        memory, memory_keys = for_products(memory), for_products(memory + pos)
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
            states.append(queries)
        return self.norm(torch.stack(states)), references.expand(len(states), -1, -1, -1)


def build_smca_decoder(cfg: CfgNode, strides: Sequence[int]) -> SMCADecoder:
    """Build the decoder of ``MODEL.SMCA`` over levels of these strides.

    Raises:
        UserError: an unknown scale, or a divisor that is not positive.
    """
    node = cfg.MODEL.SMCA
    if node.DYNAMIC_SCALE not in DYNAMIC_SCALES:
        known = ", ".join(DYNAMIC_SCALES)
        raise UserError(f"MODEL.SMCA.DYNAMIC_SCALE is {node.DYNAMIC_SCALE!r}; known: {known}")
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
