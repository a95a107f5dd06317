"""Models with the weights and settings of a golden file, and what golden tests compare with.

Everything comes from the files: sizes, layers, heads, insertions, names of maps, loss weights.
Another set of the same files is compared with ``GOLDEN_DIR=/another/folder``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.batchformer import BatchFormerHook, IdentityHook
from batchformer_panoptic.modeling.heads import BoxHead, MaskHead
from batchformer_panoptic.modeling.postprocessing.results import InferenceOptions
from batchformer_panoptic.modeling.set_prediction.criterion import (
    BoxGIoULoss,
    BoxL1Loss,
    ClassLoss,
    LossTerm,
    MaskLoss,
    SetCriterion,
)
from batchformer_panoptic.modeling.set_prediction.matcher import (
    BoxGIoUCost,
    BoxL1Cost,
    ClassCost,
    HungarianMatcher,
)
from batchformer_panoptic.modeling.set_prediction.scoring import (
    FocalScoring,
    Scoring,
    SoftmaxScoring,
)
from batchformer_panoptic.modeling.transformer import Transformer
from batchformer_panoptic.modeling.transformer.conditional import (
    ConditionalDecoder,
    ConditionalDecoderLayer,
)
from batchformer_panoptic.modeling.transformer.detr import SingleScaleTransformer
from batchformer_panoptic.modeling.transformer.layers import (
    Decoder,
    DecoderLayer,
    DETRDecoder,
    DETREncoder,
    EncoderLayer,
)
from helpers.golden_compare import (
    assert_evaluates_as_plain,
    assert_gradients,
    assert_losses_and_gradients,
    assert_masks,
    assert_matching,
    assert_near,
    assert_outputs,
    assert_padding_and_positions,
    assert_states,
    assert_training_step,
)
from helpers.golden_files import (
    features_of,
    golden_dir,
    image_targets,
    load_golden,
    our_name,
    rename,
    sizes_of,
)

__all__ = [
    "Insertion",
    "assemble",
    "assert_evaluates_as_plain",
    "assert_gradients",
    "assert_losses_and_gradients",
    "assert_masks",
    "assert_matching",
    "assert_near",
    "assert_outputs",
    "assert_padding_and_positions",
    "assert_states",
    "assert_training_step",
    "coarsest_map",
    "conditional_model",
    "detr_model",
    "features_of",
    "golden_dir",
    "image_targets",
    "insertion_of",
    "layer_arguments",
    "load_golden",
    "our_name",
    "panoptic_model",
    "rename",
    "sizes_of",
    "two_stream_model",
]


class Insertion(NamedTuple):
    """Encoder layers after which blocks act, and whether one block serves all of them."""

    layers: tuple[int, ...]
    shared: bool


def insertion_of(config: Mapping[str, Any]) -> Insertion | None:
    """What the public code's flags ``bf``, ``share_bf`` and ``insert_idx`` mean."""
    mode = config["bf"]
    if mode == 0:
        return None
    layers = {1: [config["enc_layers"] - 1], 2: [4]}.get(mode, config["insert_idx"])
    return Insertion(tuple(layers), bool(config["share_bf"]))


# --- models --------------------------------------------------------------------------------------


def assemble(
    config: Mapping[str, Any],
    transformer: Transformer,
    scoring: Scoring,
    *,
    mask_features: Sequence[str] = (),
    box_head: nn.Module | None = None,
) -> PanopticDETR:
    """A model without backbone around ``transformer``, in training mode."""
    width = config["d_model"]
    weights = config["weight_dict"]
    mask_head = None
    if mask_features:
        channels = {name: config["channels"][name] for name in mask_features}
        mask_head = MaskHead(embed_dim=width, num_heads=config["nheads"], in_channels=channels)
    losses: list[LossTerm] = [
        ClassLoss(scoring, weight=weights["loss_ce"]),
        BoxL1Loss(weight=weights["loss_bbox"]),
        BoxGIoULoss(weight=weights["loss_giou"]),
    ]
    if "loss_mask" in weights:
        losses.append(MaskLoss(focal_weight=weights["loss_mask"], dice_weight=weights["loss_dice"]))
    if box_head is None:
        box_head = BoxHead(embed_dim=width, num_class_outputs=scoring.num_outputs, class_bias=None)
    return PanopticDETR(
        backbone=nn.Identity(),
        transformer=transformer,
        box_head=box_head,
        mask_head=mask_head,
        scoring=scoring,
        matcher=HungarianMatcher(
            [
                ClassCost(scoring, weight=config["matcher"]["cost_class"]),
                BoxL1Cost(weight=config["matcher"]["cost_bbox"]),
                BoxGIoUCost(weight=config["matcher"]["cost_giou"]),
            ]
        ),
        criterion=SetCriterion(losses),
        inference_options=InferenceOptions(()),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    ).train()


def panoptic_model(golden: dict[str, Any]) -> PanopticDETR:
    """The plain DETR with masks, with its weights."""
    model = detr_model(golden["config"], insertion=None)
    model.load_state_dict(rename(golden["state_dict"]))
    return model


def two_stream_model(golden: dict[str, Any], recorded: dict[str, Any], name: str) -> PanopticDETR:
    """The model of a variant of ``recorded``, blocks included; the rest is that of ``golden``."""
    config = golden["config"] | recorded["config"]
    variant = recorded["variants"][name]
    flags = {"insert_idx": variant["insert_idx"]} | variant.get("args", {})
    model = detr_model(config, insertion_of(config | flags))
    known = model.state_dict()  # the file holds the blocks of all variants
    blocks = {k: v for k, v in rename(recorded["bf_state_dict"]).items() if k in known}
    model.load_state_dict(rename(golden["state_dict"]) | blocks)
    return model


def detr_model(config: Mapping[str, Any], insertion: Insertion | None) -> PanopticDETR:
    """A DETR, with masks where the file names maps for them."""
    width = config["d_model"]
    layer = layer_arguments(config) | {"pre_norm": config["pre_norm"]}
    hook = IdentityHook() if insertion is None else _batchformer_hook(config, insertion)
    encoder = DETREncoder(
        [EncoderLayer(**layer) for _ in range(config["enc_layers"])],
        hook=hook,
        norm=nn.LayerNorm(width) if config["pre_norm"] else None,
    )
    decoder_layers = [DecoderLayer(**layer) for _ in range(config["dec_layers"])]
    return assemble(
        config,
        _single_scale(config, encoder, DETRDecoder(decoder_layers, embed_dim=width)),
        SoftmaxScoring(config["num_classes"], no_object_weight=config["eos_coef"]),
        mask_features=config.get("fpn_order_to_mask_head", ()),
    )


def conditional_model(config: Mapping[str, Any]) -> PanopticDETR:
    """A Conditional-DETR for boxes."""
    layer = layer_arguments(config)
    encoder = DETREncoder(
        [EncoderLayer(**layer) for _ in range(config["enc_layers"])], hook=IdentityHook(), norm=None
    )
    decoder_layers = [
        ConditionalDecoderLayer(**layer, is_first=i == 0) for i in range(config["dec_layers"])
    ]
    decoder = ConditionalDecoder(decoder_layers, embed_dim=config["d_model"])
    scoring = FocalScoring(config["num_classes"], alpha=config["focal_alpha"])
    return assemble(config, _single_scale(config, encoder, decoder), scoring)


def layer_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What encoder and decoder layers of DETR and its relatives are built from."""
    return {
        "embed_dim": config["d_model"],
        "num_heads": config["nheads"],
        "dim_feedforward": config["dim_feedforward"],
        "dropout": 0.0,
    }


def coarsest_map(config: Mapping[str, Any]) -> str:
    """The map that a single-scale transformer reads: the last that is not only for masks."""
    return [n for n in config["channels"] if n not in config.get("fpn_order_to_mask_head", ())][-1]


def _single_scale(
    config: Mapping[str, Any], encoder: DETREncoder, decoder: Decoder
) -> SingleScaleTransformer:
    name = coarsest_map(config)
    return SingleScaleTransformer(
        in_feature=name,
        in_channels=config["channels"][name],
        embed_dim=config["d_model"],
        num_queries=config["num_queries"],
        encoder=encoder,
        decoder=decoder,
    )


def _batchformer_hook(config: Mapping[str, Any], insertion: Insertion) -> BatchFormerHook:
    return BatchFormerHook(
        config["d_model"],
        insert_layers=insertion.layers,
        num_heads=config["bf_nhead"],
        dim_feedforward=config["bf_dim_feedforward"],
        dropout=0.0,
        shared=insertion.shared,
    )
