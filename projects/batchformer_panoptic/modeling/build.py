"""Heads, scoring, costs and losses from a config.

Mask heads, matching costs and losses are found by name in three registries, so that a project can
add its own without an edit here (docs/extending.md).
"""

from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn

from ..errors import UserError, did_you_mean
from .heads import BoxHead, ClassHead, LayerwiseBoxHead, MaskHead, QueryMaskHead, SemanticAuxHead
from .set_prediction.criterion import (
    BoxGIoULoss,
    BoxL1Loss,
    ClassLoss,
    LossTerm,
    MaskLoss,
    SetCriterion,
)
from .set_prediction.matcher import BoxGIoUCost, BoxL1Cost, ClassCost, CostTerm, HungarianMatcher
from .set_prediction.point_losses import PointMaskCost, PointMaskLoss
from .set_prediction.scoring import Scoring, build_scoring
from .transformer.base import Transformer, feature_shapes

MASK_HEAD_REGISTRY = Registry("MASK_HEAD")
MASK_HEAD_REGISTRY.__doc__ = """
Mask heads, found by ``MODEL.MASK_HEAD.NAME``: functions ``(cfg, input_shape) -> nn.Module``.

The module is called as ``mask_head(output, features)`` with a :class:`TransformerOutput` and the
backbone maps (B, C_i, H_i, W_i) by name. It returns a :class:`MaskSelector`, which computes the
masks of chosen queries on demand. A head that returns :class:`QueryMasks` says so by an attribute
``embeds_masks = True``; costs and losses at points need it.
"""

COST_REGISTRY = Registry("COST")
COST_REGISTRY.__doc__ = """
Terms of the matching cost, found by ``MODEL.DETR.COSTS``: functions ``(cfg, scoring) -> CostTerm``.
"""

LOSS_REGISTRY = Registry("LOSS")
LOSS_REGISTRY.__doc__ = """
Losses, found by ``MODEL.DETR.LOSSES``: functions ``(cfg, scoring) -> LossTerm``.
"""


def build_scoring_from_config(cfg: CfgNode) -> Scoring:
    """The scoring of ``MODEL.DETR.SCORING`` for ``MODEL.DETR.NUM_CLASSES`` classes."""
    node = cfg.MODEL.DETR
    if node.NUM_CLASSES < 1:
        raise UserError(
            f"MODEL.DETR.NUM_CLASSES is {node.NUM_CLASSES}; set it, or call "
            "batchformer_panoptic.data.setup_datasets(cfg) to derive it from the data sets"
        )
    if node.SCORING not in ("softmax", "focal"):
        raise UserError(f"MODEL.DETR.SCORING is {node.SCORING!r}; known: softmax, focal")
    if node.SYNC_CLASS_LOSS and node.SCORING == "focal" and not cfg.MODEL.SEMANTIC_AUX.ENABLED:
        raise UserError(
            "MODEL.DETR.SYNC_CLASS_LOSS has no effect with MODEL.DETR.SCORING focal, whose loss is "
            "normalised over all processes anyway: set it to False"
        )
    return build_scoring(
        node.SCORING,
        node.NUM_CLASSES,
        no_object_weight=node.NO_OBJECT_WEIGHT,
        focal_alpha=node.FOCAL_ALPHA,
    )


def build_prediction_head(
    cfg: CfgNode, scoring: Scoring, transformer: Transformer
) -> BoxHead | LayerwiseBoxHead | ClassHead:
    """The head for classes and, where the transformer has them, boxes."""
    arguments: dict[str, Any] = {
        "embed_dim": cfg.MODEL.DETR.HIDDEN_DIM,
        "num_class_outputs": scoring.num_outputs,
        "class_bias": scoring.initial_bias,
    }
    if not transformer.predicts_boxes:
        return ClassHead(**arguments)
    heads = [BoxHead(**arguments, box_bias=bias) for bias in transformer.box_biases]
    if len(heads) == 1:
        return heads[0]
    return LayerwiseBoxHead(heads, num_layers=cfg.MODEL.DETR.DEC_LAYERS)


def build_semantic_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> SemanticAuxHead:
    """The auxiliary head over ``MODEL.SEMANTIC_AUX.IN_FEATURES``, which is trained on masks."""
    names = cfg.MODEL.SEMANTIC_AUX.IN_FEATURES
    shapes = feature_shapes("MODEL.SEMANTIC_AUX.IN_FEATURES", names, input_shape)
    return SemanticAuxHead(
        in_channels={name: shape.channels for name, shape in zip(names, shapes, strict=True)},
        num_classes=cfg.MODEL.DETR.NUM_CLASSES,
    )


def build_mask_head(
    cfg: CfgNode, input_shape: dict[str, ShapeSpec], transformer: Transformer
) -> nn.Module:
    """The mask head that ``MODEL.MASK_HEAD.NAME`` names.

    Raises:
        UserError: an unknown name, or a head that needs another transformer.
    """
    build = _find(MASK_HEAD_REGISTRY, "MODEL.MASK_HEAD.NAME", cfg.MODEL.MASK_HEAD.NAME)
    head: nn.Module = build(cfg, input_shape)
    if isinstance(head, QueryMaskHead) and not transformer.embeds_masks:
        raise UserError(
            "MODEL.MASK_HEAD.NAME query_mask_head needs mask embeddings, which "
            f"MODEL.DETR.TRANSFORMER_NAME {cfg.MODEL.DETR.TRANSFORMER_NAME} does not return: set "
            "it to detr_mask_head, or the transformer to mask2former"
        )
    return head


@MASK_HEAD_REGISTRY.register()
def detr_mask_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> MaskHead:
    """DETR's mask head over ``MODEL.MASK_HEAD.IN_FEATURES``.

    Raises:
        UserError: unusable channels, maps or memory limit.
    """
    node = cfg.MODEL.MASK_HEAD
    shapes = feature_shapes("MODEL.MASK_HEAD.IN_FEATURES", node.IN_FEATURES, input_shape)
    if node.STEP_MEMORY < 1:
        raise UserError(f"MODEL.MASK_HEAD.STEP_MEMORY is {node.STEP_MEMORY}; it counts MiB, from 1")
    return MaskHead(
        embed_dim=cfg.MODEL.DETR.HIDDEN_DIM,
        num_heads=cfg.MODEL.DETR.NHEADS,
        in_channels={
            name: shape.channels for name, shape in zip(node.IN_FEATURES, shapes, strict=True)
        },
        channels=node.CHANNELS or None,
        max_step_bytes=node.STEP_MEMORY * 2**20,
    )


@MASK_HEAD_REGISTRY.register()
def query_mask_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> QueryMaskHead:
    """Masks as products of queries and pixels, for transformers that embed both.

    Raises:
        UserError: settings that act on the weights of a mask head, which this one does not have.
    """
    if "mask_head" in cfg.MODEL.ACTIVATION_CHECKPOINTING:
        raise UserError(
            "MODEL.ACTIVATION_CHECKPOINTING names 'mask_head', but query_mask_head has nothing to "
            "compute again: remove it"
        )
    if cfg.MODEL.MASK_HEAD.FREEZE_DETR:
        raise UserError(
            "MODEL.MASK_HEAD.FREEZE_DETR trains the mask head only, and query_mask_head has no "
            "weights: set it to False"
        )
    return QueryMaskHead()


def build_matcher(cfg: CfgNode, scoring: Scoring, available: frozenset[str]) -> HungarianMatcher:
    """The matcher with the cost terms that ``MODEL.DETR.COSTS`` names.

    Args:
        cfg: the whole config.
        scoring: of the class logits.
        available: the predictions of the model besides classes: "boxes", "masks", and "mask
            embeddings" where masks are products of these with per-pixel features.
    """
    names = cfg.MODEL.DETR.COSTS
    if not names:
        raise UserError("MODEL.DETR.COSTS is empty; name at least one cost, such as class_cost")
    costs: list[CostTerm] = _terms(COST_REGISTRY, "COSTS", names, cfg, scoring, available)
    return HungarianMatcher(costs)


def build_criterion(cfg: CfgNode, scoring: Scoring, available: frozenset[str]) -> SetCriterion:
    """The criterion with the losses that ``MODEL.DETR.LOSSES`` names.

    ``mask_loss`` is left out with ``MODEL.MASK_ON False``.

    Args:
        cfg: the whole config.
        scoring: of the class logits.
        available: the predictions of the model besides classes: "boxes", "masks", and "mask
            embeddings" where masks are products of these with per-pixel features.
    """
    names = [name for name in cfg.MODEL.DETR.LOSSES if name != "mask_loss" or cfg.MODEL.MASK_ON]
    if not names:
        raise UserError(
            f"MODEL.DETR.LOSSES is {list(cfg.MODEL.DETR.LOSSES)} with MODEL.MASK_ON "
            f"{cfg.MODEL.MASK_ON}: no loss is left; name at least one, such as class_loss"
        )
    losses: list[LossTerm] = _terms(LOSS_REGISTRY, "LOSSES", names, cfg, scoring, available)
    try:
        return SetCriterion(losses)
    except ValueError as error:
        raise UserError(f"MODEL.DETR.LOSSES is {names}: {error}; remove one of them") from error


@COST_REGISTRY.register()
def class_cost(cfg: CfgNode, scoring: Scoring) -> CostTerm:
    """Cost of the class, weighted by ``MODEL.DETR.COST_CLASS``."""
    return ClassCost(scoring, weight=cfg.MODEL.DETR.COST_CLASS)


@COST_REGISTRY.register()
def box_l1_cost(cfg: CfgNode, scoring: Scoring) -> CostTerm:
    """L1 cost of boxes, weighted by ``MODEL.DETR.COST_BBOX``."""
    return BoxL1Cost(weight=cfg.MODEL.DETR.COST_BBOX)


@COST_REGISTRY.register()
def box_giou_cost(cfg: CfgNode, scoring: Scoring) -> CostTerm:
    """GIoU cost of boxes, weighted by ``MODEL.DETR.COST_GIOU``."""
    return BoxGIoUCost(weight=cfg.MODEL.DETR.COST_GIOU)


@LOSS_REGISTRY.register()
def class_loss(cfg: CfgNode, scoring: Scoring) -> LossTerm:
    """Classification loss, weighted by ``MODEL.DETR.CLASS_WEIGHT``."""
    return ClassLoss(scoring, weight=cfg.MODEL.DETR.CLASS_WEIGHT)


@LOSS_REGISTRY.register()
def box_l1_loss(cfg: CfgNode, scoring: Scoring) -> LossTerm:
    """L1 loss of boxes, weighted by ``MODEL.DETR.BBOX_WEIGHT``."""
    return BoxL1Loss(weight=cfg.MODEL.DETR.BBOX_WEIGHT)


@LOSS_REGISTRY.register()
def box_giou_loss(cfg: CfgNode, scoring: Scoring) -> LossTerm:
    """GIoU loss of boxes, weighted by ``MODEL.DETR.GIOU_WEIGHT``."""
    return BoxGIoULoss(weight=cfg.MODEL.DETR.GIOU_WEIGHT)


@LOSS_REGISTRY.register()
def mask_loss(cfg: CfgNode, scoring: Scoring) -> LossTerm:
    """Focal and Dice loss of masks, as ``MODEL.MASK_HEAD`` describes them."""
    node = cfg.MODEL.MASK_HEAD
    if node.LOSS_RESOLUTION not in ("target", "prediction"):
        raise UserError(
            f"MODEL.MASK_HEAD.LOSS_RESOLUTION is {node.LOSS_RESOLUTION!r}; known: target, "
            "prediction"
        )
    return MaskLoss(
        focal_weight=node.MASK_WEIGHT,
        dice_weight=node.DICE_WEIGHT,
        resolution=node.LOSS_RESOLUTION,
        all_layers=node.DEEP_SUPERVISION,
    )


@COST_REGISTRY.register()
def point_mask_cost(cfg: CfgNode, scoring: Scoring) -> CostTerm:
    """Cost of masks at random points, as ``MODEL.MASK2FORMER`` describes it."""
    node = _checked_points(cfg.MODEL.MASK2FORMER)
    return PointMaskCost(
        mask_weight=node.MASK_WEIGHT, dice_weight=node.DICE_WEIGHT, num_points=node.NUM_POINTS
    )


@LOSS_REGISTRY.register()
def point_mask_loss(cfg: CfgNode, scoring: Scoring) -> LossTerm:
    """Losses of masks at uncertain points, as ``MODEL.MASK2FORMER`` describes them."""
    node = _checked_points(cfg.MODEL.MASK2FORMER)
    return PointMaskLoss(
        mask_weight=node.MASK_WEIGHT,
        dice_weight=node.DICE_WEIGHT,
        num_points=node.NUM_POINTS,
        oversample_ratio=node.OVERSAMPLE_RATIO,
        importance_ratio=node.IMPORTANCE_SAMPLE_RATIO,
    )


def _checked_points(node: CfgNode) -> CfgNode:
    """Return the node, or raise UserError for numbers of points out of range."""
    if node.NUM_POINTS < 1:
        raise UserError(f"MODEL.MASK2FORMER.NUM_POINTS is {node.NUM_POINTS}; it must be at least 1")
    if node.OVERSAMPLE_RATIO < 1:
        raise UserError(
            f"MODEL.MASK2FORMER.OVERSAMPLE_RATIO is {node.OVERSAMPLE_RATIO}; it must be at least 1"
        )
    if not 0 <= node.IMPORTANCE_SAMPLE_RATIO <= 1:
        raise UserError(
            f"MODEL.MASK2FORMER.IMPORTANCE_SAMPLE_RATIO is {node.IMPORTANCE_SAMPLE_RATIO}; it must "
            "be from 0 to 1"
        )
    return node


def _terms(
    registry: Registry,
    key: str,
    names: Sequence[str],
    cfg: CfgNode,
    scoring: Scoring,
    available: frozenset[str],
) -> list[Any]:
    repeated = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if repeated:
        raise UserError(f"MODEL.DETR.{key} names {repeated[0]!r} twice")
    terms = [_find(registry, f"MODEL.DETR.{key}", name)(cfg, scoring) for name in names]
    for name, term in zip(names, terms, strict=True):
        missing = sorted(term.needs - available)
        if missing:
            raise UserError(
                f"MODEL.DETR.{key} names {name!r}, but this model predicts no {missing[0]}; "
                "remove it, or choose another MODEL.DETR.TRANSFORMER_NAME, MODEL.MASK_ON or "
                "MODEL.MASK_HEAD.NAME"
            )
    return terms


def _find(registry: Registry, key: str, name: str) -> Callable[..., Any]:
    if name not in registry:
        known = sorted(known for known, _ in registry)
        raise UserError(
            f"{key}: unknown name {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"
        )
    build: Callable[..., Any] = registry.get(name)
    return build
