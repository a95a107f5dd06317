"""Models with the weights and settings of a golden file, in this project's names."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.batchformer import BatchFormerHook, IdentityHook
from batchformer_panoptic.modeling.criterion import SetCriterion
from batchformer_panoptic.modeling.heads import BoxHead, MaskHead
from batchformer_panoptic.modeling.inference import InferenceOptions
from batchformer_panoptic.modeling.matcher import HungarianMatcher
from batchformer_panoptic.modeling.scoring import FocalScoring, SoftmaxScoring
from batchformer_panoptic.modeling.targets import DenseMasks, ImageTarget
from batchformer_panoptic.modeling.transformer.decoder import ConditionalDecoder, DETRDecoder
from batchformer_panoptic.modeling.transformer.detr import SingleScaleTransformer
from batchformer_panoptic.modeling.transformer.encoder import DETREncoder
from batchformer_panoptic.modeling.transformer.layers import (
    ConditionalDecoderLayer,
    DecoderLayer,
    EncoderLayer,
)

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))

_RENAMES = [
    (r"^detr\.transformer\.bf\.", "transformer.encoder.batchformer.blocks."),
    (r"^detr\.transformer\.", "transformer."),
    (r"^(?:detr\.)?(class_embed|bbox_embed)\.", r"box_head.\1."),
    (r"^(?:detr\.)?(query_embed|input_proj)\.", r"transformer.\1."),
    (r"^bbox_attention\.", "mask_head.attention."),
    (r"^mask_head\.out_lay\.", "mask_head.predictor."),
]


def load_golden(name: str) -> dict[str, Any]:
    return torch.load(GOLDEN_DIR / name, weights_only=True)


def our_name(official: str) -> str:
    """The official DETR name of a parameter in this project's words."""
    for pattern, replacement in _RENAMES:
        official = re.sub(pattern, replacement, official)
    for theirs, ours in (("lay", "convs"), ("gn", "norms"), ("adapter", "adapters")):
        official = re.sub(
            rf"^mask_head\.{theirs}(\d)\.",
            lambda m, ours=ours: f"mask_head.{ours}.{int(m[1]) - 1}.",
            official,
        )
    return official


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {our_name(name): value.float() for name, value in state.items()}


def panoptic_model(golden: dict[str, Any], insert_layers: list[int] | None) -> PanopticDETR:
    """A DETR with masks as the file configures it, without backbone."""
    c = golden["config"]
    layer = {
        "embed_dim": c["d_model"],
        "num_heads": c["nheads"],
        "dim_feedforward": c["dim_feedforward"],
        "dropout": 0.0,
        "pre_norm": c["pre_norm"],
    }
    hook = (
        IdentityHook()
        if insert_layers is None
        else BatchFormerHook(c["d_model"], insert_layers=insert_layers, dropout=0.0)
    )
    norm = nn.LayerNorm(c["d_model"]) if c["pre_norm"] else None
    encoder = DETREncoder(
        [EncoderLayer(**layer) for _ in range(c["enc_layers"])], hook=hook, norm=norm
    )
    decoder = DETRDecoder(
        [DecoderLayer(**layer) for _ in range(c["dec_layers"])], embed_dim=c["d_model"]
    )
    scoring = SoftmaxScoring(c["num_classes"], no_object_weight=c["eos_coef"])
    fine_maps = c["fpn_order_to_mask_head"]
    return PanopticDETR(
        backbone=nn.Identity(),
        transformer=SingleScaleTransformer(
            in_feature="res5",
            in_channels=c["channels"]["res5"],
            embed_dim=c["d_model"],
            num_queries=c["num_queries"],
            encoder=encoder,
            decoder=decoder,
        ),
        box_head=BoxHead(
            embed_dim=c["d_model"], num_class_outputs=scoring.num_outputs, class_bias=None
        ),
        mask_head=MaskHead(
            embed_dim=c["d_model"],
            num_heads=c["nheads"],
            in_channels=[c["channels"][name] for name in fine_maps],
        ),
        mask_features=fine_maps,
        scoring=scoring,
        matcher=HungarianMatcher(scoring, **c["matcher"]),
        criterion=SetCriterion(scoring, weights=loss_weights(golden)),
        inference_options=InferenceOptions(()),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )


def conditional_model(golden: dict[str, Any]) -> PanopticDETR:
    """A Conditional-DETR for boxes as the file configures it, without backbone."""
    c = golden["config"]
    layer = {
        "embed_dim": c["d_model"],
        "num_heads": c["nheads"],
        "dim_feedforward": c["dim_feedforward"],
        "dropout": 0.0,
    }
    (name,) = c["channels"]
    scoring = FocalScoring(c["num_classes"], alpha=c["focal_alpha"])
    encoder_layers = [EncoderLayer(**layer) for _ in range(c["enc_layers"])]
    decoder_layers = [
        ConditionalDecoderLayer(**layer, is_first=i == 0) for i in range(c["dec_layers"])
    ]
    weights = {term: c["weight_dict"][f"loss_{term}"] for term in ("ce", "bbox", "giou")}
    return PanopticDETR(
        backbone=nn.Identity(),
        transformer=SingleScaleTransformer(
            in_feature=name,
            in_channels=c["channels"][name],
            embed_dim=c["d_model"],
            num_queries=c["num_queries"],
            encoder=DETREncoder(encoder_layers, hook=IdentityHook(), norm=None),
            decoder=ConditionalDecoder(decoder_layers, embed_dim=c["d_model"]),
        ),
        box_head=BoxHead(
            embed_dim=c["d_model"], num_class_outputs=scoring.num_outputs, class_bias=None
        ),
        mask_head=None,
        mask_features=(),
        scoring=scoring,
        matcher=HungarianMatcher(scoring, **c["matcher"]),
        criterion=SetCriterion(scoring, weights=weights),
        inference_options=InferenceOptions(()),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )


def loss_weights(golden: dict[str, Any]) -> dict[str, float]:
    weights = golden["config"]["weight_dict"]
    return {term: weights[f"loss_{term}"] for term in ("ce", "bbox", "giou", "mask", "dice")}


def image_targets(targets: list[dict[str, Tensor]]) -> list[ImageTarget]:
    return [ImageTarget(t["labels"], t["boxes"], DenseMasks(t["masks"])) for t in targets]


def features_of(golden: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in golden["inputs"]["features"].items()}


def sizes_of(golden: dict[str, Any]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    inputs = golden["inputs"]
    return [tuple(size) for size in inputs["image_sizes"]], tuple(inputs["padded_size"])
