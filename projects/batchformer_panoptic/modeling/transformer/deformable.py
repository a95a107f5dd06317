"""Deformable-DETR (Zhu et al. 2021): several feature levels, attention at a few points of each.

Shapes: B images, B' = streams * B, N tokens of L levels, Q queries, C channels.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...errors import UserError
from ...layers import MSDeformAttn, SinePositionEncoding
from ..padding import BatchPadding
from .base import (
    TRANSFORMER_REGISTRY,
    BoxPredictor,
    Transformer,
    TransformerOutput,
    build_batchformer_hook,
    feature_shapes,
    mask_level,
)
from .deformable_layers import (
    DeformableDecoder,
    DeformableDecoderLayer,
    DeformableEncoder,
    DeformableEncoderLayer,
)
from .deformable_levels import (
    LevelProjection,
    Levels,
    cell_centers,
    flatten_maps,
    valid_sizes,
)
from .deformable_proposals import ProposalStage
from .detr import post_norm_arguments

_FEATURES_KEY = "MODEL.DEFORMABLE.IN_FEATURES"


class DeformableTransformer(Transformer):
    """Projection to levels, encoder with a hook, decoder over reference points.

    Args:
        in_features: backbone maps that become tokens, fine to coarse.
        mask_level: which level the mask head is given.
        embed_dim: channels C.
        num_queries: object queries Q.
        projection: backbone maps to levels.
        encoder: tokens to memory, opening streams on the way.
        decoder: queries and reference points to states.
        proposal_stage: where queries come from in two stages; None: they are learned.
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
        self.position_encoding = SinePositionEncoding(num_channels=embed_dim, offset=-0.5)
        self.level_embed = nn.Parameter(torch.randn(len(projection.levels), embed_dim))
        self.encoder = encoder
        self.decoder = decoder
        self.proposal_stage = proposal_stage
        for part in (encoder, decoder, proposal_stage):
            _initialise(part)
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
        levels = self.describe_levels(maps, masks, is_padded=padding.is_padded)
        memory, levels, streams = self.encoder(flatten_maps(maps), levels)
        proposals = None
        if self.proposal_stage is None:
            queries, query_pos, references = self._learned_queries(memory.shape[0])
        else:
            queries, query_pos, references, proposals = self.proposal_stage(
                memory, levels, box_head
            )
        states, references = self.decoder(queries, query_pos, references, memory, levels, box_head)
        of_level = memory[:, levels.token_range(self.mask_level)].transpose(1, 2)
        return TransformerOutput(
            states,
            references,
            projected_map=maps[self.mask_level],
            memory_map=of_level.unflatten(2, levels.shapes[self.mask_level]),
            padding_mask=masks[self.mask_level],
            streams=streams,
            proposals=proposals,
        )

    def describe_levels(
        self, maps: list[Tensor], masks: list[Tensor], *, is_padded: bool
    ) -> Levels:
        """What attention needs to know of L projected maps (B, C, H_l, W_l) and their masks."""
        dtype = maps[0].dtype
        pos = [
            (self.position_encoding(mask) + embedding).flatten(1, 2)
            for mask, embedding in zip(masks, self.level_embed, strict=True)
        ]
        shapes = tuple((x.shape[-2], x.shape[-1]) for x in maps)
        sizes = torch.tensor([(width, height) for height, width in shapes])
        valid = torch.stack([valid_sizes(mask) for mask in masks], dim=1)
        return Levels(
            shapes=shapes,
            pos=torch.cat(pos, dim=1).to(dtype),
            key_padding_mask=torch.cat([m.flatten(1) for m in masks], 1) if is_padded else None,
            valid_ratios=valid / sizes.to(valid.device, non_blocking=True),
            centers=torch.cat([cell_centers(mask) for mask in masks], dim=1),
        )

    def _learned_queries(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        assert self.query_embed is not None
        assert self.reference_points is not None
        query_pos, queries = self.query_embed.weight.expand(batch, -1, -1).chunk(2, dim=-1)
        return queries, query_pos, self.reference_points(query_pos).float()


def _initialise(part: nn.Module | None) -> None:
    """Xavier for every matrix, the hook's blocks included, but deformable attention has its own."""
    if part is None:
        return
    for parameter in part.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for module in part.modules():
        if isinstance(module, MSDeformAttn):
            module.reset_parameters()


def _check_settings(cfg: CfgNode) -> None:
    """Raise UserError for settings that do not go together."""
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
            "MODEL.DETR.DEEP_SUPERVISION, or the heads before the last learn nothing",
        ),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise UserError(message)


@TRANSFORMER_REGISTRY.register()
def deformable(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> DeformableTransformer:
    """Deformable-DETR; ``MODEL.DEFORMABLE`` holds what is its own."""
    return DeformableTransformer(cfg, input_shape)
