"""The parts that docs/extending.md adds to the package from outside, registered on import."""

from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from batchformer_panoptic.batchformer import encode
from batchformer_panoptic.modeling.build import COST_REGISTRY, LOSS_REGISTRY, MASK_HEAD_REGISTRY
from batchformer_panoptic.modeling.set_prediction.matcher import Matching
from batchformer_panoptic.modeling.set_prediction.predictions import MaskSelector, Predictions
from batchformer_panoptic.modeling.set_prediction.scoring import Scoring
from batchformer_panoptic.modeling.set_prediction.targets import TargetBatch
from batchformer_panoptic.modeling.transformer.base import (
    TRANSFORMER_REGISTRY,
    BoxPredictor,
    Transformer,
    TransformerOutput,
    build_batchformer_hook,
)
from batchformer_panoptic.modeling.transformer.layers import BatchPadding

# --- transformer ----------------------------------------------------------------------------------


class PoolingTransformer(Transformer):
    """Queries attend once to the encoded tokens; no decoder layers beyond that."""

    def __init__(
        self, *, in_feature: str, in_channels: int, embed_dim: int, queries: int, hook: nn.Module
    ) -> None:
        super().__init__()
        self.in_features = (in_feature,)
        self.projection = nn.Conv2d(in_channels, embed_dim, kernel_size=1)
        self.layers = nn.ModuleList(nn.Linear(embed_dim, embed_dim) for _ in range(2))
        self.batchformer = hook
        self.queries = nn.Embedding(queries, embed_dim)

    def forward(
        self, features: dict[str, Tensor], padding: BatchPadding, box_head: BoxPredictor
    ) -> TransformerOutput:
        projected = self.projection(features[self.in_features[0]])
        mask = padding.mask_like(projected)
        tokens = projected.flatten(2).transpose(1, 2)
        padding_mask = mask.flatten(1) if padding.is_padded else None
        tokens, streams, _ = encode(
            self.layers, self.batchformer, tokens, key_padding_mask=padding_mask
        )
        scores = (self.queries.weight @ tokens.transpose(1, 2)).masked_fill(
            streams.expand(mask.flatten(1))[:, None], -torch.inf
        )
        states = scores.softmax(-1) @ tokens + self.queries.weight
        memory = tokens.transpose(1, 2).unflatten(2, projected.shape[-2:])
        return TransformerOutput(states[None], None, projected, memory, mask, streams)


@TRANSFORMER_REGISTRY.register()
def pooling(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> PoolingTransformer:
    return PoolingTransformer(
        in_feature=cfg.MODEL.DETR.IN_FEATURE,
        in_channels=input_shape[cfg.MODEL.DETR.IN_FEATURE].channels,
        embed_dim=cfg.MODEL.DETR.HIDDEN_DIM,
        queries=cfg.MODEL.DETR.NUM_OBJECT_QUERIES,
        hook=build_batchformer_hook(cfg),
    )


# --- mask head ------------------------------------------------------------------------------------


class DotProductMaskHead(nn.Module):
    """A mask is the product of a query with every cell of the encoder's map."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(embed_dim, embed_dim)

    def forward(self, output: TransformerOutput, features: Mapping[str, Tensor]) -> MaskSelector:
        def select(layer: Tensor | int, image: Tensor, query: Tensor) -> Tensor:
            queries = self.embed(output.hidden_states[layer, image, query])
            return torch.einsum("kc,kchw->khw", queries, output.memory_map[image])

        return select


@MASK_HEAD_REGISTRY.register()
def dot_product_mask_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> DotProductMaskHead:
    return DotProductMaskHead(cfg.MODEL.DETR.HIDDEN_DIM)


# --- loss and cost --------------------------------------------------------------------------------


class BoxCentreLoss:
    """Distance between the centres of matched boxes, for all decoder layers."""

    names = ("loss_centre",)
    needs = frozenset({"boxes"})

    def __call__(
        self,
        predictions: Predictions,
        targets: TargetBatch,
        matching: Matching,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        boxes = predictions.boxes[matching.layer, matching.image, matching.query]
        wanted = targets.boxes_cxcywh[matching.global_target]
        distance = (boxes[:, :2] - wanted[:, :2]).norm(dim=1)
        layers, entries = predictions.logits.shape[:2]
        sums = distance.new_zeros(layers, entries).index_put(
            (matching.layer, matching.image), distance, accumulate=True
        )
        return {"loss_centre": sums / num_objects}


@LOSS_REGISTRY.register()
def box_centre_loss(cfg: CfgNode, scoring: Scoring) -> BoxCentreLoss:
    return BoxCentreLoss()


class BoxCentreCost:
    """Distance between the centres of boxes."""

    name = "centre"
    weight = 2.0
    needs = frozenset({"boxes"})

    def __call__(self, predictions: Predictions, targets: TargetBatch) -> Tensor:
        wanted = targets.padded_boxes_cxcywh[..., :2]
        return torch.cdist(
            predictions.boxes[..., :2], wanted.expand(len(predictions.boxes), *wanted.shape)
        )


@COST_REGISTRY.register()
def box_centre_cost(cfg: CfgNode, scoring: Scoring) -> BoxCentreCost:
    return BoxCentreCost()


# --- backbone -------------------------------------------------------------------------------------


class TwoConvolutions(Backbone):
    """Two strided convolutions; the maps are called as Detectron2's configs call them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv2d(3, 8, kernel_size=3, stride=4, padding=1)
        self.second = Conv2d(8, 16, kernel_size=3, stride=2, padding=1)
        self._out_features = ["res2", "res3"]
        self._out_feature_channels = {"res2": 8, "res3": 16}
        self._out_feature_strides = {"res2": 4, "res3": 8}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = F.relu(self.first(images))
        return {"res2": fine, "res3": F.relu(self.second(fine))}


@BACKBONE_REGISTRY.register()
def build_two_convolutions(cfg: CfgNode, input_shape: ShapeSpec) -> TwoConvolutions:
    return TwoConvolutions()
