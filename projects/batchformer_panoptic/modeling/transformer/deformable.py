"""Deformable-DETR (Zhu et al. 2021): attention at a few points of several feature levels.

Shapes: B images, B' = streams * B, N tokens of L levels one after the other, Q queries, C channels,
K class logits. Parameter names are those of fundamentalvision/Deformable-DETR.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...batchformer import BatchFormerHook, IdentityHook, StreamState, encode
from ...errors import UserError
from ...layers import MSDeformAttn, SinePositionEncoding, sine_encoding
from .base import (
    TRANSFORMER_REGISTRY,
    BoxPredictor,
    Proposals,
    Transformer,
    TransformerOutput,
    build_batchformer_hook,
    feature_shapes,
    mask_level,
)
from .detr import post_norm_arguments
from .layers import BatchPadding, FeedForwardLayer, attend, for_products
from .multi_scale import LevelProjection, Levels, describe_levels, flatten_maps

_FEATURES_KEY = "MODEL.DEFORMABLE.IN_FEATURES"
_BASE_SIZE = 0.05  # side of a proposal on the finest level; doubles from level to level
_MARGIN = 0.01  # tokens this close to the edge of the image have no proposal
# Bound of reference points as logits, where the published inverse sigmoid ends (at 1e-5).
_LARGEST_LOGIT = 11.5129


# --- layers --------------------------------------------------------------------------------------


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
        """(B', N, C) tokens and their levels -> (B', N, C)."""
        attended = self.self_attn(
            for_products(tokens + levels.pos),
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
            query_pos: (B', Q, C) their positions, added to the queries of both attentions.
            reference_points: (B', Q, 2 or 4) in 0 to 1 over the image without padding.
            memory: (B', N, C).
            levels: the levels of the memory.

        Returns:
            (B', Q, C).
        """
        keys = queries + query_pos
        attended = attend(self.self_attn, keys, keys, queries)
        queries = self.norm2(queries + self.dropout(attended))
        attended = self.cross_attn(
            for_products(queries + query_pos),
            levels.on_each_level(reference_points),
            memory,
            levels.shapes,
            levels.key_padding_mask,
        )
        return self._feed_forward(self.norm1(queries + self.dropout(attended)), self.norm3)


# --- encoder -------------------------------------------------------------------------------------


class DeformableEncoder(nn.Module):
    """Encoder layers with BatchFormerV2's hook after each; the hook may open a second stream."""

    def __init__(
        self,
        layers: Sequence[DeformableEncoderLayer],
        *,
        hook: IdentityHook | BatchFormerHook,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.batchformer = hook

    def forward(
        self, tokens: Tensor, levels: Levels, hook_padding: Tensor | None = None
    ) -> tuple[Tensor, Levels, StreamState]:
        """Encode.

        Args:
            tokens: (B, N, C).
            levels: their levels.
            hook_padding: (B, N) bool, True where a token is padding, for the hook. None: the mask
                of the levels.

        Returns:
            Memory (B', N, C), its levels, and the streams along B'.
        """
        memory, streams, (levels,) = encode(
            self.layers,
            self.batchformer,
            tokens,
            levels,
            key_padding_mask=levels.key_padding_mask if hook_padding is None else hook_padding,
        )
        return memory, levels, streams


# --- first stage: proposals from the memory (appendix A.4) ---------------------------------------


class FirstStage(NamedTuple):
    """The input of the decoder, and the proposals for the losses.

    Attributes:
        queries: (B', Q, C) content of the queries.
        query_pos: (B', Q, C) their positions.
        references: (B', Q, 4) boxes as logits, without gradient.
        proposals: the proposals of all tokens.
    """

    queries: Tensor
    query_pos: Tensor
    references: Tensor
    proposals: Proposals


class ProposalStage(nn.Module):
    """Every token proposes a box around itself; the best become the queries (appendix A.4).

    As published, proposals are ranked by their logit of class 0, which they are trained to predict
    for every object. Tokens at the edge or in the padding have boxes of all ones.

    Args:
        embed_dim: channels C.
        num_queries: number of proposals Q that become queries of the decoder.
        head_layer: the layer number of the proposals in ``BoxPredictor``.
    """

    def __init__(self, *, embed_dim: int, num_queries: int, head_layer: int) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.head_layer = head_layer
        self.enc_output = nn.Linear(embed_dim, embed_dim)
        self.enc_output_norm = nn.LayerNorm(embed_dim)
        self.pos_trans = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.pos_trans_norm = nn.LayerNorm(2 * embed_dim)

    def forward(self, memory: Tensor, levels: Levels, box_head: BoxPredictor) -> FirstStage:
        """Propose.

        Args:
            memory: (B', N, C).
            levels: the levels of the memory.
            box_head: the head that is also applied to the decoder's states.

        Raises:
            UserError: the batch has fewer tokens per image than queries.
        """
        if memory.shape[1] < self.num_queries:
            raise UserError(
                f"num_queries is {self.num_queries}, but images of this size have only "
                f"{memory.shape[1]} tokens that propose boxes: use fewer queries or larger images"
            )
        starts, usable = token_boxes(levels)
        states = memory.masked_fill(~usable[..., None], 0.0)
        states = self.enc_output_norm(self.enc_output(states))
        logits = box_head.classify(self.head_layer, states)
        boxes = box_head.predict_boxes(self.head_layer, states, starts)
        best = logits[..., 0].topk(self.num_queries, dim=1).indices
        references = boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))
        where = sine_encoding(references.sigmoid(), 2 * memory.shape[-1])
        query_pos, queries = self.pos_trans_norm(self.pos_trans(where)).chunk(2, dim=-1)
        return FirstStage(queries, query_pos, references, Proposals(logits, boxes.sigmoid()))


def token_boxes(levels: Levels) -> tuple[Tensor, Tensor]:
    """The anchor box of each token, to which its proposal is an offset.

    Returns:
        (B', N, 4) float32 logits of cxcywh, infinite for tokens without a proposal, and (B', N)
        bool, True for tokens with one.
    """
    sizes = torch.cat(
        [
            levels.centers.new_full((height * width, 1), _BASE_SIZE * 2.0**level)
            for level, (height, width) in enumerate(levels.shapes)
        ]
    )
    boxes = torch.cat([levels.centers, sizes.expand_as(levels.centers)], dim=-1)
    # Centres in the padding are beyond 1.
    usable = ((boxes > _MARGIN) & (boxes < 1 - _MARGIN)).all(-1)
    return boxes.logit().masked_fill(~usable[..., None], torch.inf), usable


# --- decoder -------------------------------------------------------------------------------------


class DeformableDecoder(nn.Module):
    """Decoder layers over reference points, which are fixed or refined by each layer.

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
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Decode.

        Args:
            queries: (B', Q, C) initial content of the queries.
            query_pos: (B', Q, C) their positions.
            references: (B', Q, 2 or 4) reference points of the first layer, as logits.
            memory: (B', N, C).
            levels: the levels of the memory.
            box_head: predicts the refined boxes.

        Returns:
            (L, B', Q, C) states after each layer; (L, B', Q, 2 or 4) logits to which each layer's
            boxes are offsets; and, where boxes are refined, their (L, B', Q, 4) logits. With
            refinement all references have four numbers: those of the first layer are padded with
            the logit 0 for width and height if they are points.
        """
        memory = for_products(memory)
        references = references.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        states, starts, refined = [], [], []
        for index, layer in enumerate(self.layers):
            queries = layer(queries, query_pos, references.sigmoid(), memory, levels)
            states.append(queries)
            starts.append(references)
            if self.box_refine:
                boxes = box_head.predict_boxes(index, queries, references)
                refined.append(boxes)
                references = boxes.detach().clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        width = max(start.shape[-1] for start in starts)
        starts = [nn.functional.pad(start, (0, width - start.shape[-1])) for start in starts]
        boxes_or_none = torch.stack(refined) if refined else None
        return torch.stack(states), torch.stack(starts), boxes_or_none


# --- the transformer -----------------------------------------------------------------------------


class DeformableTransformer(Transformer):
    """Projection to levels, encoder, optional proposals, decoder over reference points.

    Args:
        in_features: backbone maps that become tokens, fine to coarse.
        mask_level: index of the level for the mask head.
        embed_dim: channels C.
        num_queries: object queries Q.
        projection: backbone maps to levels.
        encoder: tokens to memory; its hook may open a second stream.
        decoder: queries and reference points to states.
        proposal_stage: source of the queries with two stages; None: learned queries.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: tuple[str, ...],
        mask_level: int,
        embed_dim: int,
        num_queries: int,
        projection: LevelProjection,
        encoder: DeformableEncoder,
        decoder: DeformableDecoder,
        proposal_stage: ProposalStage | None,
    ) -> None:
        super().__init__()
        self.in_features = tuple(in_features)
        self.mask_level = mask_level
        self.box_biases = _box_biases(len(decoder.layers), decoder.box_refine, proposal_stage)
        self.position_encoding = SinePositionEncoding(num_channels=embed_dim, offset=-0.5)
        self.level_embed = nn.Parameter(torch.randn(len(projection.levels), embed_dim))
        self.encoder = encoder
        self.decoder = decoder
        self.proposal_stage = proposal_stage
        for part in (encoder, decoder, proposal_stage):
            xavier_except_deformable(part)
        self.projection = projection
        self.query_embed: nn.Embedding | None = None
        self.reference_points: nn.Linear | None = None
        if proposal_stage is None:
            self.query_embed = nn.Embedding(num_queries, 2 * embed_dim)  # position, then content
            self.reference_points = nn.Linear(embed_dim, 2)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Translate ``MODEL.DETR`` and ``MODEL.DEFORMABLE`` into constructor arguments."""
        _check_settings(cfg)
        detr, node = cfg.MODEL.DETR, cfg.MODEL.DEFORMABLE
        shapes = feature_shapes(_FEATURES_KEY, node.IN_FEATURES, input_shape)
        layer = {**post_norm_arguments(cfg), "num_levels": node.NUM_FEATURE_LEVELS}
        encoder = [
            DeformableEncoderLayer(**layer, num_points=node.ENC_POINTS)
            for _ in range(detr.ENC_LAYERS)
        ]
        decoder = [
            DeformableDecoderLayer(**layer, num_points=node.DEC_POINTS)
            for _ in range(detr.DEC_LAYERS)
        ]
        proposal_stage = None
        if node.TWO_STAGE:
            proposal_stage = ProposalStage(
                embed_dim=detr.HIDDEN_DIM,
                num_queries=detr.NUM_OBJECT_QUERIES,
                head_layer=detr.DEC_LAYERS,
            )
        return {
            "in_features": tuple(node.IN_FEATURES),
            "mask_level": mask_level(cfg, _FEATURES_KEY, node.IN_FEATURES),
            "embed_dim": detr.HIDDEN_DIM,
            "num_queries": detr.NUM_OBJECT_QUERIES,
            "projection": LevelProjection(
                in_channels=[shape.channels for shape in shapes],
                embed_dim=detr.HIDDEN_DIM,
                num_levels=node.NUM_FEATURE_LEVELS,
                see_padding=node.SEE_PADDING,
            ),
            "encoder": DeformableEncoder(encoder, hook=build_batchformer_hook(cfg)),
            "decoder": DeformableDecoder(decoder, box_refine=node.BOX_REFINE),
            "proposal_stage": proposal_stage,
        }

    def forward(
        self, features: dict[str, Tensor], padding: BatchPadding, box_head: BoxPredictor
    ) -> TransformerOutput:
        """See :data:`TRANSFORMER_REGISTRY`."""
        maps, masks = self.projection([features[name] for name in self.in_features], padding)
        levels = describe_levels(
            maps, masks, self.position_encoding, self.level_embed, is_padded=padding.is_padded
        )
        memory, levels, streams = self.encoder(flatten_maps(maps), levels)
        proposals = None
        if self.proposal_stage is None:
            queries, query_pos, references = self._learned_queries(memory.shape[0])
        else:
            queries, query_pos, references, proposals = self.proposal_stage(
                memory, levels, box_head
            )
        states, references, box_logits = self.decoder(
            queries, query_pos, references, memory, levels, box_head
        )
        of_level = memory[:, levels.token_range(self.mask_level)].transpose(1, 2)
        return TransformerOutput(
            states,
            references,
            projected_map=maps[self.mask_level],
            memory_map=of_level.unflatten(2, levels.shapes[self.mask_level]),
            padding_mask=masks[self.mask_level],
            streams=streams,
            proposals=proposals,
            box_logits=box_logits,
        )

    def _learned_queries(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        assert self.query_embed is not None
        assert self.reference_points is not None
        query_pos, queries = self.query_embed.weight.expand(batch, -1, -1).chunk(2, dim=-1)
        return queries, query_pos, self.reference_points(query_pos).float()


def xavier_except_deformable(part: nn.Module | None) -> None:
    """Xavier for all matrices, including the hook's blocks, except for deformable attention."""
    if part is None:
        return
    for parameter in part.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for module in part.modules():
        if isinstance(module, MSDeformAttn):
            module.reset_parameters()


def _box_biases(
    num_layers: int, box_refine: bool, proposal_stage: nn.Module | None
) -> tuple[tuple[float, ...] | None, ...]:
    """As published: the first boxes start small around their points, refined ones unchanged."""
    small, unchanged = (0.0, 0.0, -2.0, -2.0), (0.0, 0.0, 0.0, 0.0)
    if not box_refine:
        return (small,)
    if proposal_stage is None:
        return (small, *[unchanged] * (num_layers - 1))
    return (unchanged,) * (num_layers + 1)  # the last head is that of the proposals


# --- building ------------------------------------------------------------------------------------


def _check_settings(cfg: CfgNode) -> None:
    """Raise UserError for settings that contradict each other."""
    detr, node = cfg.MODEL.DETR, cfg.MODEL.DEFORMABLE
    names = list(node.IN_FEATURES)
    wrong: list[tuple[bool, str]] = [
        (
            len(names) > node.NUM_FEATURE_LEVELS,
            f"MODEL.DEFORMABLE.NUM_FEATURE_LEVELS is {node.NUM_FEATURE_LEVELS}, fewer than the "
            f"{len(names)} maps of MODEL.DEFORMABLE.IN_FEATURES",
        ),
        (
            node.TWO_STAGE and not node.BOX_REFINE,
            "MODEL.DEFORMABLE.TWO_STAGE needs MODEL.DEFORMABLE.BOX_REFINE: proposals are boxes, "
            "and only refinement starts from boxes",
        ),
        (
            node.TWO_STAGE and detr.SCORING != "focal",
            "MODEL.DEFORMABLE.TWO_STAGE ranks proposals by one class: set MODEL.DETR.SCORING to "
            f"'focal' instead of {detr.SCORING!r}",
        ),
        (
            node.BOX_REFINE and not detr.DEEP_SUPERVISION,
            "MODEL.DEFORMABLE.BOX_REFINE gives each layer a head of its own: set "
            "MODEL.DETR.DEEP_SUPERVISION, or the heads before the last are not trained",
        ),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise UserError(message)


@TRANSFORMER_REGISTRY.register()
def deformable(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> DeformableTransformer:
    """Deformable-DETR, with the settings of ``MODEL.DEFORMABLE``."""
    return DeformableTransformer(cfg, input_shape)
