"""Heads, scoring, matcher and criterion from a config."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from ..errors import UserError
from .heads import BoxHead, LayerwiseBoxHead, MaskHead, SemanticAuxHead
from .set_prediction.criterion import SetCriterion
from .set_prediction.matcher import HungarianMatcher
from .set_prediction.scoring import Scoring, build_scoring
from .transformer.base import feature_shapes


def build_scoring_from_config(cfg: CfgNode) -> Scoring:
    """The scoring of ``MODEL.DETR.SCORING`` for ``MODEL.DETR.NUM_CLASSES`` classes."""
    node = cfg.MODEL.DETR
    if node.NUM_CLASSES < 1:
        raise UserError(
            f"MODEL.DETR.NUM_CLASSES is {node.NUM_CLASSES}; set it, or call "
            "batchformer_panoptic.data.setup_datasets(cfg) to derive it from the data sets"
        )
    return build_scoring(
        node.SCORING,
        node.NUM_CLASSES,
        no_object_weight=node.NO_OBJECT_WEIGHT,
        focal_alpha=node.FOCAL_ALPHA,
    )


def build_box_head(cfg: CfgNode, scoring: Scoring) -> BoxHead | LayerwiseBoxHead:
    """The box head for the logits that ``scoring`` wants; one a layer where boxes are refined."""
    node = cfg.MODEL.DETR

    def one(box_bias: Sequence[float] | None) -> BoxHead:
        return BoxHead(
            embed_dim=node.HIDDEN_DIM,
            num_class_outputs=scoring.num_outputs,
            class_bias=scoring.initial_bias,
            box_bias=box_bias,
        )

    # As published: boxes start at their reference points; those of Deformable-DETR start small.
    small, unchanged = (0.0, 0.0, -2.0, -2.0), (0.0, 0.0, 0.0, 0.0)
    if node.TRANSFORMER_NAME != "deformable":
        return one(unchanged if node.TRANSFORMER_NAME == "conditional" else None)
    if not cfg.MODEL.DEFORMABLE.BOX_REFINE:
        return one(small)
    two_stage = cfg.MODEL.DEFORMABLE.TWO_STAGE
    biases = [unchanged if two_stage else small, *[unchanged] * (node.DEC_LAYERS - 1 + two_stage)]
    return LayerwiseBoxHead([one(bias) for bias in biases], num_layers=node.DEC_LAYERS)


def build_semantic_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> SemanticAuxHead:
    """The auxiliary head over ``MODEL.SEMANTIC_AUX.IN_FEATURES``; it learns from masks."""
    if not cfg.MODEL.MASK_ON:
        raise UserError("MODEL.SEMANTIC_AUX.ENABLED learns from masks: set MODEL.MASK_ON")
    names = cfg.MODEL.SEMANTIC_AUX.IN_FEATURES
    shapes = feature_shapes("MODEL.SEMANTIC_AUX.IN_FEATURES", names, input_shape)
    return SemanticAuxHead(
        in_channels={name: shape.channels for name, shape in zip(names, shapes, strict=True)},
        num_classes=cfg.MODEL.DETR.NUM_CLASSES,
    )


def build_mask_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> MaskHead:
    """The mask head over ``MODEL.MASK_HEAD.IN_FEATURES``.

    Raises:
        UserError: a bound on memory that allows none.
    """
    names = cfg.MODEL.MASK_HEAD.IN_FEATURES
    shapes = feature_shapes("MODEL.MASK_HEAD.IN_FEATURES", names, input_shape)
    limit = cfg.MODEL.MASK_HEAD.STEP_MEMORY
    if limit < 1:
        raise UserError(f"MODEL.MASK_HEAD.STEP_MEMORY is {limit}; it counts MiB, from 1")
    return MaskHead(
        embed_dim=cfg.MODEL.DETR.HIDDEN_DIM,
        num_heads=cfg.MODEL.DETR.NHEADS,
        in_channels=[shape.channels for shape in shapes],
        channels=cfg.MODEL.MASK_HEAD.CHANNELS or None,
        max_step_bytes=limit * 2**20,
    )


def build_matcher(cfg: CfgNode, scoring: Scoring) -> HungarianMatcher:
    """The matcher with the cost weights of ``MODEL.DETR``."""
    node = cfg.MODEL.DETR
    return HungarianMatcher(
        scoring,
        cost_class=node.COST_CLASS,
        cost_bbox=node.COST_BBOX,
        cost_giou=node.COST_GIOU,
    )


def build_criterion(cfg: CfgNode, scoring: Scoring) -> SetCriterion:
    """The criterion with the loss weights of ``MODEL.DETR`` and ``MODEL.MASK_HEAD``."""
    weights = {
        "ce": cfg.MODEL.DETR.CLASS_WEIGHT,
        "bbox": cfg.MODEL.DETR.BBOX_WEIGHT,
        "giou": cfg.MODEL.DETR.GIOU_WEIGHT,
        "mask": cfg.MODEL.MASK_HEAD.MASK_WEIGHT,
        "dice": cfg.MODEL.MASK_HEAD.DICE_WEIGHT,
    }
    return SetCriterion(
        scoring, weights=weights, mask_resolution=cfg.MODEL.MASK_HEAD.LOSS_RESOLUTION
    )
