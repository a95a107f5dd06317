"""Mask2Former (facebookresearch/Mask2Former, on Detectron2): names, weights and settings."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .core import (
    AFFINE,
    CLASS_KEYS,
    FROZEN_NORM,
    NO_STATISTICS_COUNT,
    REMEDY,
    TORCHVISION_INPUT,
    Allowed,
    Converted,
    NameTable,
    Renamed,
    Request,
    Row,
    Shape,
    refuse_mismatch,
    rename,
    select_class_rows,
    wrong_shapes,
)
from .detr import UNKNOWN_DEPTH, block_notes
from .layout import (
    block_layout,
    built_transformer_layout,
    count_indices,
    has_swin,
    out_channels,
    resnet_layout,
    resnet_settings,
    swin_layout,
    swin_settings,
    swin_width,
)

# --- names ---

_ATTENTION = r"(?:in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
_DEFORMABLE = r"self_attn\.(?:sampling_offsets|attention_weights|value_proj|output_proj)"
_ENCODER = "pixel_decoder.transformer.encoder.layers.#."
_PIXELS = "transformer.pixel_decoder."
_LAYER = "transformer.decoder.layers.#."

_TABLE = NameTable(
    [
        Row("pixel_decoder.input_proj.#.", f"{_PIXELS}input_proj.#.", rf"[01]\.{AFFINE}"),
        Row("pixel_decoder.transformer.level_embed", f"{_PIXELS}level_embed", ""),
        Row(
            _ENCODER,
            "transformer.encoder.layers.#.",
            rf"(?:{_DEFORMABLE}|norm[12]|linear[12])\.{AFFINE}",
        ),
        Row("pixel_decoder.adapter_1.norm.", f"{_PIXELS}lateral_norm.", AFFINE),
        Row("pixel_decoder.adapter_1.", f"{_PIXELS}lateral.", "weight"),
        Row("pixel_decoder.layer_1.norm.", f"{_PIXELS}output_norm.", AFFINE),
        Row("pixel_decoder.layer_1.", f"{_PIXELS}output.", "weight"),
        Row("pixel_decoder.mask_features.", f"{_PIXELS}mask_features.", AFFINE),
        Row(
            "predictor.transformer_cross_attention_layers.#.multihead_attn.",
            f"{_LAYER}cross_attn.",
            _ATTENTION,
        ),
        Row("predictor.transformer_cross_attention_layers.#.norm.", f"{_LAYER}norm1.", AFFINE),
        Row(
            "predictor.transformer_self_attention_layers.#.self_attn.",
            f"{_LAYER}self_attn.",
            _ATTENTION,
        ),
        Row("predictor.transformer_self_attention_layers.#.norm.", f"{_LAYER}norm2.", AFFINE),
        Row("predictor.transformer_ffn_layers.#.norm.", f"{_LAYER}norm3.", AFFINE),
        Row("predictor.transformer_ffn_layers.#.", _LAYER, rf"linear[12]\.{AFFINE}"),
        Row("predictor.decoder_norm.", "transformer.decoder.norm.", AFFINE),
        Row("predictor.", "transformer.decoder.", r"(?:query_(?:feat|embed)|level_embed)\.weight"),
        Row("predictor.mask_embed.layers.#.", "transformer.decoder.mask_embed.layers.#.", AFFINE),
        Row("predictor.class_embed.", "box_head.class_embed.", AFFINE),
    ]
)


_HEAD = "sem_seg_head."
_PARTS = ("pixel_decoder.", "predictor.")
_SWIN_BLOCK = (
    rf"(?:(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.{AFFINE}|attn\.relative_position_bias_table)"
)
# Backbones have the same names in both projects.
_BACKBONE = re.compile(
    r"backbone\.(?:"
    rf"(?:stem\.conv1|res[2-5]\.\d+\.(?:conv[123]|shortcut))\.(?:weight|norm\.{FROZEN_NORM})"
    rf"|(?:patch_embed\.(?:proj|norm)|norm[0-3])\.{AFFINE}"
    rf"|layers\.\d\.(?:blocks\.\d+\.{_SWIN_BLOCK}|downsample\.(?:reduction\.weight|norm\.{AFFINE}))"
    r")"
)


def official_mask2former_to_ours(name: str) -> str | None:
    """Return this project's name of a parameter of the head, ``sem_seg_head.`` left out, or None.

    Names of earlier versions of the public code are accepted: pixel decoders without a prefix, and
    ``static_query`` for the query features. The public code renames them when it loads them.
    """
    if not name.startswith(_PARTS):
        name = _PARTS[0] + name
    return _TABLE.to_ours(name.replace("static_query", "query_feat"))


def _checkpoint_to_ours(name: str) -> str | None:
    if name.startswith(_HEAD):
        return official_mask2former_to_ours(name.removeprefix(_HEAD))
    return name if _BACKBONE.fullmatch(name) else None


def _ours_to_checkpoint(name: str) -> str | None:
    if _BACKBONE.fullmatch(name):
        return name
    theirs = _TABLE.to_theirs(name)
    return None if theirs is None else _HEAD + theirs


# --- conversion ---

CRITERION = Allowed(
    "criterion.empty_weight", "class weights of the loss, here MODEL.DETR.NO_OBJECT_WEIGHT"
)
_ALLOWED = [
    NO_STATISTICS_COUNT,
    CRITERION,
    Allowed("backbone.*.relative_position_index", "computed from the size of the windows"),
]
_WHAT = "the weights are not a Mask2Former that can be converted"
_STAGES = ("res2", "res3", "res4", "res5")
_ENC_POINTS = 4  # fixed in the public code
_ENCODER_LAYERS, _DECODER_LAYERS = "transformer.encoder.layers.", "transformer.decoder.layers."
# Weights from whose shapes the sizes are read.
_QUERIES = "transformer.decoder.query_embed.weight"
_LEVELS = f"{_PIXELS}level_embed"
_MASK_DIM = f"{_PIXELS}mask_features.bias"
_ENC_WIDTH = f"{_ENCODER_LAYERS}0.linear1.bias"
_DEC_WIDTH = f"{_DECODER_LAYERS}0.linear1.bias"
_SAMPLES = f"{_ENCODER_LAYERS}0.self_attn.attention_weights.bias"
_NEEDED = (_QUERIES, _LEVELS, _MASK_DIM, _ENC_WIDTH, _DEC_WIDTH, _SAMPLES, CLASS_KEYS[0])


def convert_mask2former(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a checkpoint of facebookresearch/Mask2Former with a ResNet or Swin backbone.

    Class rows are in the order of the contiguous class ids, not indexed by the ids of the data set.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    return finish_mask2former(rename(state, _checkpoint_to_ours, _ALLOWED, request), request)


def finish_mask2former(renamed: Renamed, request: Request) -> Converted:
    """Check that the weights are complete, select the class rows and collect the settings.

    Args:
        renamed: weights in this project's names.
        request: the options of the conversion.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    expected = mask2former_layout(renamed.model, _WHAT, leftovers=renamed.leftovers)
    refuse_mismatch(
        _WHAT,
        leftovers=[*renamed.leftovers, *renamed.old_keys(renamed.model.keys() - expected.keys())],
        missing=expected.keys() - renamed.model.keys(),
        wrong_shape=wrong_shapes(renamed.model, expected),
        remedy=REMEDY,
    )
    model, notes = select_class_rows(renamed.model, request.classes, by_dataset_id=False)
    settings = {**TORCHVISION_INPUT, **mask2former_settings(model)}
    if not has_swin(model) and "MODEL.RESNETS.DEPTH" not in settings:
        notes.append(UNKNOWN_DEPTH)
    return Converted(model, renamed.dropped, [*notes, *block_notes(model)], settings)


def mask2former_settings(model: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config keys that follow from a complete state dict in this project's names.

    ``MODEL.RESNETS.STRIDE_IN_1X1`` and ``RES5_DILATION`` are those of the published ResNets.
    """
    if has_swin(model):
        backbone = swin_settings(model)
    else:
        backbone = {
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.RESNETS.RES5_DILATION": 1,
            **resnet_settings(model),
        }
    return {**backbone, **_transformer_settings(model)}


def mask2former_layout(
    model: Mapping[str, Tensor], subject: str, *, leftovers: list[str] | None = None
) -> dict[str, Shape | None]:
    """Names and shapes of a complete Mask2Former; None for a shape that cannot be known.

    Args:
        model: weights in this project's names, from whose shapes the sizes are read.
        subject: the subject of the error message.
        leftovers: source keys without a name, listed if a size cannot be read.

    Raises:
        UserError: a weight is missing from which a size is read, or no model has the sizes.
    """
    missing = [name for name in _NEEDED if name not in model]
    refuse_mismatch(
        subject, leftovers=(leftovers or []) if missing else [], missing=missing, remedy=REMEDY
    )
    if has_swin(model):
        backbone = dict(swin_layout(model))
        channels = {name: swin_width(model) * 2**i for i, name in enumerate(_STAGES)}
    else:
        backbone = dict(resnet_layout(model))
        channels = {name: out_channels(model, name) or 1 for name in _STAGES}
    settings = _transformer_settings(model)
    width = settings["MODEL.DETR.HIDDEN_DIM"]
    classes = len(model[CLASS_KEYS[0]])
    return {
        **backbone,
        **built_transformer_layout(settings, channels, subject),
        **dict(block_layout(model, width)),
        CLASS_KEYS[0]: (classes, width),
        CLASS_KEYS[1]: (classes,),
    }


def _transformer_settings(model: Mapping[str, Tensor]) -> dict[str, Any]:
    num_queries, width = model[_QUERIES].shape
    return {
        "MODEL.DETR.TRANSFORMER_NAME": "mask2former",
        "MODEL.DETR.SCORING": "softmax",
        "MODEL.DETR.NUM_OBJECT_QUERIES": num_queries,
        "MODEL.DETR.HIDDEN_DIM": width,
        # One attention weight for each head, level and point.
        "MODEL.DETR.NHEADS": max(len(model[_SAMPLES]) // (len(model[_LEVELS]) * _ENC_POINTS), 1),
        "MODEL.DETR.DIM_FEEDFORWARD": len(model[_DEC_WIDTH]),
        "MODEL.DETR.ENC_LAYERS": count_indices(model, _ENCODER_LAYERS),
        "MODEL.DETR.DEC_LAYERS": count_indices(model, _DECODER_LAYERS),
        "MODEL.MASK2FORMER.IN_FEATURES": list(_STAGES),
        "MODEL.MASK2FORMER.MASK_DIM": len(model[_MASK_DIM]),
        "MODEL.MASK2FORMER.ENC_POINTS": _ENC_POINTS,
        "MODEL.MASK2FORMER.ENC_DIM_FEEDFORWARD": len(model[_ENC_WIDTH]),
        "MODEL.MASK_ON": True,
        "MODEL.MASK_HEAD.NAME": "query_mask_head",
    }


# --- export ---


def to_official_mask2former(
    state: Mapping[str, Tensor], *, no_object_weight: float
) -> dict[str, Tensor]:
    """Rename a complete Mask2Former to the names of facebookresearch/Mask2Former.

    Args:
        state: in this project's names, without BatchFormer blocks.
        no_object_weight: weight of "no object" in the loss, which is a buffer there.
    """
    official: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in state.items():
        theirs = _ours_to_checkpoint(name)
        assert theirs is not None, name
        official[theirs] = value
    official[CRITERION.pattern] = loss_weights(state, no_object_weight)
    # Without the versions, the public code takes these names for older ones and renames them.
    versions = {name: {"version": 2} for name in ("sem_seg_head", "sem_seg_head.predictor")}
    official._metadata = versions  # type: ignore[attr-defined]
    return official


def loss_weights(state: Mapping[str, Tensor], no_object_weight: float) -> Tensor:
    """The buffer of class weights of the loss: 1 for classes, and the weight of "no object"."""
    weights = torch.ones(len(state[CLASS_KEYS[0]]))
    weights[-1] = no_object_weight
    return weights


def is_mask2former(model: Iterable[str]) -> bool:
    """Whether weights in this project's names are those of a Mask2Former."""
    return any(name.startswith(_PIXELS) for name in model)


def refuse_unless_mask2former(model: Mapping[str, Tensor], subject: str) -> None:
    """Refuse a state dict in this project's names that is not a complete published Mask2Former.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    expected = mask2former_layout(model, subject)
    refuse_mismatch(
        subject,
        leftovers=model.keys() - expected.keys(),
        missing=expected.keys() - model.keys(),
        wrong_shape=wrong_shapes(model, expected),
        remedy="the export supports Detectron2's ResNet with FrozenBN or BN and the published Swin",
    )
