"""Mask2Former of Hugging Face transformers: names, weights and configs, in both directions."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ...data.class_table import ClassTable
from ...errors import UserError
from .core import (
    AFFINE,
    CLASS_KEYS,
    NO_STATISTICS_COUNT,
    Allowed,
    Converted,
    NameTable,
    Request,
    Row,
    rename,
)
from .huggingface import (
    class_names,
    merge_projections,
    resnet_config,
    resnet_rows,
    split_projections,
)
from .layout import has_swin, resnet_shape
from .mask2former import (
    CRITERION,
    finish_mask2former,
    loss_weights,
    mask2former_settings,
)

MODEL_TYPE = "mask2former"
_LEVELS = 3  # fixed in transformers, as are the points
_GROUPS = 32  # of group norms

# --- names ---

_PIXELS = "model.pixel_level_module."
_BACKBONE = f"{_PIXELS}encoder."
_DECODER = "model.transformer_module."
_LAYER, _OURS_LAYER = f"{_DECODER}decoder.layers.#.", "transformer.decoder.layers.#."
_ENCODER, _OURS_ENCODER = f"{_PIXELS}decoder.encoder.layers.#.", "transformer.encoder.layers.#."
_DEFORMABLE = rf"(?:sampling_offsets|attention_weights|value_proj|output_proj)\.{AFFINE}"
_CROSS_ATTENTION = r"(?:in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
_SELF_ATTENTION = rf"(?:[qkv]_proj|out_proj)\.{AFFINE}"


def _swin_rows() -> list[Row]:
    parts = {
        "layernorm_before.": "norm1.",
        "layernorm_after.": "norm2.",
        "attention.self.query.": "attn.q_proj.",
        "attention.self.key.": "attn.k_proj.",
        "attention.self.value.": "attn.v_proj.",
        "attention.output.dense.": "attn.proj.",
        "intermediate.dense.": "mlp.fc1.",
        "output.dense.": "mlp.fc2.",
    }
    rows = [
        Row(
            f"{_BACKBONE}embeddings.patch_embeddings.projection.",
            "backbone.patch_embed.proj.",
            AFFINE,
        ),
        Row(f"{_BACKBONE}embeddings.norm.", "backbone.patch_embed.norm.", AFFINE),
    ]
    for i in range(4):
        theirs, ours = f"{_BACKBONE}encoder.layers.{i}.", f"backbone.layers.{i}."
        rows += [
            Row(f"{theirs}blocks.#.{part}", f"{ours}blocks.#.{our_part}", AFFINE)
            for part, our_part in parts.items()
        ]
        table = "relative_position_bias_table"
        rows += [
            Row(f"{theirs}blocks.#.attention.self.{table}", f"{ours}blocks.#.attn.{table}", ""),
            Row(
                f"{theirs}downsample.",
                f"{ours}downsample.",
                rf"(?:reduction\.weight|norm\.{AFFINE})",
            ),
            Row(f"{_BACKBONE}hidden_states_norms.stage{i + 1}.", f"backbone.norm{i}.", AFFINE),
        ]
    return rows


_TABLE = NameTable(
    [
        *resnet_rows(_BACKBONE),
        *_swin_rows(),
        Row(
            f"{_PIXELS}decoder.input_projections.#.",
            "transformer.pixel_decoder.input_proj.#.",
            rf"[01]\.{AFFINE}",
        ),
        Row(f"{_PIXELS}decoder.level_embed", "transformer.pixel_decoder.level_embed", ""),
        Row(f"{_ENCODER}self_attn.", f"{_OURS_ENCODER}self_attn.", _DEFORMABLE),
        Row(f"{_ENCODER}self_attn_layer_norm.", f"{_OURS_ENCODER}norm1.", AFFINE),
        Row(f"{_ENCODER}fc1.", f"{_OURS_ENCODER}linear1.", AFFINE),
        Row(f"{_ENCODER}fc2.", f"{_OURS_ENCODER}linear2.", AFFINE),
        Row(f"{_ENCODER}final_layer_norm.", f"{_OURS_ENCODER}norm2.", AFFINE),
        *(
            Row(f"{_PIXELS}decoder.{theirs}.", f"transformer.pixel_decoder.{ours}.", tail)
            for theirs, ours, tail in (
                ("adapter_1.0", "lateral", "weight"),
                ("adapter_1.1", "lateral_norm", AFFINE),
                ("layer_1.0", "output", "weight"),
                ("layer_1.1", "output_norm", AFFINE),
                ("mask_projection", "mask_features", AFFINE),
            )
        ),
        Row(f"{_LAYER}cross_attn.", f"{_OURS_LAYER}cross_attn.", _CROSS_ATTENTION),
        Row(f"{_LAYER}cross_attn_layer_norm.", f"{_OURS_LAYER}norm1.", AFFINE),
        Row(f"{_LAYER}self_attn.", f"{_OURS_LAYER}self_attn.", _SELF_ATTENTION),
        Row(f"{_LAYER}self_attn_layer_norm.", f"{_OURS_LAYER}norm2.", AFFINE),
        Row(f"{_LAYER}fc1.", f"{_OURS_LAYER}linear1.", AFFINE),
        Row(f"{_LAYER}fc2.", f"{_OURS_LAYER}linear2.", AFFINE),
        Row(f"{_LAYER}final_layer_norm.", f"{_OURS_LAYER}norm3.", AFFINE),
        Row(f"{_DECODER}decoder.layernorm.", "transformer.decoder.norm.", AFFINE),
        Row(f"{_DECODER}queries_features.", "transformer.decoder.query_feat.", "weight"),
        Row(f"{_DECODER}queries_embedder.", "transformer.decoder.query_embed.", "weight"),
        Row(f"{_DECODER}level_embed.", "transformer.decoder.level_embed.", "weight"),
        Row(
            f"{_DECODER}decoder.mask_predictor.mask_embedder.#.0.",
            "transformer.decoder.mask_embed.layers.#.",
            AFFINE,
        ),
        Row("class_predictor.", "box_head.class_embed.", AFFINE),
    ]
)

# --- in ---

_UNUSED_NORM = "norm after the last stage, which the feature maps do not pass"
_ALLOWED = [
    NO_STATISTICS_COUNT,
    CRITERION,
    Allowed(f"{_BACKBONE}*.relative_position_index", "computed from the size of the windows"),
    Allowed(f"{_BACKBONE}swin.layernorm.*", _UNUSED_NORM),
    Allowed(f"{_BACKBONE}layernorm.*", _UNUSED_NORM),
]
_SWIN_QKV = re.compile(r"(.*\.attn)\.in_proj_(weight|bias)")


def is_mask2former(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict of transformers is a Mask2Former."""
    return any(name.startswith(_PIXELS) for name in state)


def convert_huggingface_mask2former(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a Mask2FormerForUniversalSegmentation with a ResNet or Swin backbone.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    renamed = rename(state, _TABLE.to_ours, _ALLOWED, request)
    model = {
        _SWIN_QKV.sub(r"\1.qkv.\2", name) if name.startswith("backbone.") else name: value
        for name, value in merge_projections(renamed.model).items()
    }
    return finish_mask2former(renamed._replace(model=model), request)


def settings_of_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read the config keys that the weights do not determine; refuse unsupported ones.

    Args:
        config: content of ``config.json``.
        folder: the folder of the file, for the message.

    Raises:
        UserError: names the setting that this project does not have.
    """
    backbone = config.get("backbone_config") or {}
    kind = backbone.get("model_type", "swin")
    unsupported = {
        "pre_norm": config.get("pre_norm"),
        "activation_function other than relu": config.get("activation_function", "relu") != "relu",
        "common_stride other than 4": config.get("common_stride", 4) != 4,
        f"backbone_config.model_type {kind!r}": kind not in ("swin", "resnet"),
        "backbone_config.downsample_in_first_stage": backbone.get("downsample_in_first_stage"),
        "backbone_config.hidden_act": (
            backbone.get("hidden_act", _ACTIVATION.get(kind)) != _ACTIVATION.get(kind)
        ),
        "backbone_config.use_absolute_embeddings": backbone.get("use_absolute_embeddings"),
    }
    if found := [what for what, is_so in unsupported.items() if is_so]:
        raise UserError(f"{folder}/config.json needs an unsupported setting: {found[0]}")
    settings: dict[str, Any] = {}
    if "num_attention_heads" in config:
        settings["MODEL.DETR.NHEADS"] = config["num_attention_heads"]
    if kind == "resnet":
        stride = bool(backbone.get("downsample_in_bottleneck", False))
        settings["MODEL.RESNETS.STRIDE_IN_1X1"] = stride
    return settings


_ACTIVATION = {"swin": "gelu", "resnet": "relu"}

# --- out ---


def huggingface_weights(state: Mapping[str, Tensor], no_object_weight: float) -> dict[str, Tensor]:
    """Rename a complete Mask2Former to the names in files of transformers.

    Args:
        state: in this project's names, without BatchFormer blocks.
        no_object_weight: weight of "no object" in the loss, which is a buffer there.
    """
    model = {re.sub(r"\.attn\.qkv\.", ".attn.in_proj_", name): v for name, v in state.items()}
    attentions = ("self_attn", ".attn")
    weights = {}
    for name, value in split_projections(model, attentions).items():
        theirs = _TABLE.to_theirs(name)
        assert theirs is not None, name
        weights[theirs] = value
        if theirs.endswith("running_mean"):  # batch norms are not frozen there
            count = theirs.replace("running_mean", "num_batches_tracked")
            weights[count] = torch.tensor(0)
    if has_swin(state):
        # Not used by the feature maps, but part of the model: the identity.
        width = len(state["backbone.norm3.weight"])
        weights[f"{_BACKBONE}swin.layernorm.weight"] = torch.ones(width)
        weights[f"{_BACKBONE}swin.layernorm.bias"] = torch.zeros(width)
    weights[CRITERION.pattern] = loss_weights(state, no_object_weight)
    return weights


def check_expressible(state: Mapping[str, Tensor], cfg: CfgNode) -> None:
    """Refuse a model that transformers does not have.

    Raises:
        UserError: names the setting.
    """
    problems = {
        "INPUT.FORMAT is not RGB": cfg.INPUT.FORMAT != "RGB",
        f"MODEL.DETR.HIDDEN_DIM is not a multiple of {_GROUPS}": (
            cfg.MODEL.DETR.HIDDEN_DIM % _GROUPS != 0
        ),
        f"MODEL.MASK2FORMER.IN_FEATURES has not {_LEVELS + 1} maps": (
            len(cfg.MODEL.MASK2FORMER.IN_FEATURES) != _LEVELS + 1
        ),
    }
    if not has_swin(state):
        shape = resnet_shape(state)
        problems |= {
            "MODEL.RESNETS.RES5_DILATION is not 1": cfg.MODEL.RESNETS.RES5_DILATION != 1,
            "MODEL.RESNETS.NUM_GROUPS is not 1": cfg.MODEL.RESNETS.NUM_GROUPS != 1,
            "the ResNet's bottlenecks are not a quarter of their output": shape.bottleneck
            and [4 * width for width in shape.inner_widths] != list(shape.widths),
        }
    if found := [problem for problem, is_so in problems.items() if is_so]:
        raise UserError(f"{found[0]}: the Mask2Former of transformers does not support that")


def huggingface_config(
    transformers: Any, state: Mapping[str, Tensor], cfg: CfgNode, classes: ClassTable | None
) -> Any:
    """The ``Mask2FormerConfig`` of a complete model."""
    detr, node = cfg.MODEL.DETR, cfg.MODEL.MASK2FORMER
    names = class_names(classes, len(state[CLASS_KEYS[0]]) - 1)
    return transformers.Mask2FormerConfig(
        backbone_config=_backbone_config(transformers, state, cfg),
        feature_size=detr.HIDDEN_DIM,
        mask_feature_size=node.MASK_DIM,
        hidden_dim=detr.HIDDEN_DIM,
        encoder_feedforward_dim=node.ENC_DIM_FEEDFORWARD,
        dim_feedforward=detr.DIM_FEEDFORWARD,
        encoder_layers=detr.ENC_LAYERS,
        decoder_layers=detr.DEC_LAYERS + 1,  # counts predictions, one of them before any layer
        num_attention_heads=detr.NHEADS,
        dropout=detr.DROPOUT,
        num_queries=detr.NUM_OBJECT_QUERIES,
        no_object_weight=detr.NO_OBJECT_WEIGHT,
        class_weight=detr.CLASS_WEIGHT,
        mask_weight=node.MASK_WEIGHT,
        dice_weight=node.DICE_WEIGHT,
        train_num_points=node.NUM_POINTS,
        oversample_ratio=node.OVERSAMPLE_RATIO,
        importance_sample_ratio=node.IMPORTANCE_SAMPLE_RATIO,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        architectures=["Mask2FormerForUniversalSegmentation"],
    )


def _backbone_config(transformers: Any, state: Mapping[str, Tensor], cfg: CfgNode) -> Any:
    stages = [f"stage{i + 1}" for i in range(_LEVELS + 1)]
    if has_swin(state):
        settings = mask2former_settings(state)
        return transformers.SwinConfig(
            embed_dim=settings["MODEL.SWIN.EMBED_DIM"],
            depths=settings["MODEL.SWIN.DEPTHS"],
            num_heads=settings["MODEL.SWIN.NUM_HEADS"],
            window_size=settings["MODEL.SWIN.WINDOW_SIZE"],
            drop_path_rate=cfg.MODEL.SWIN.DROP_PATH_RATE,
            out_features=stages,
        )
    return resnet_config(transformers, state, cfg, stages)


def image_processor(transformers: Any, cfg: CfgNode) -> Any:
    """The image processor that resizes and normalises as this project's evaluation.

    Images whose size is not a multiple of 32 are stretched to the next multiple there; this project
    pads.
    """
    return transformers.Mask2FormerImageProcessor(
        size={"shortest_edge": cfg.INPUT.MIN_SIZE_TEST, "longest_edge": cfg.INPUT.MAX_SIZE_TEST},
        size_divisor=32,
        image_mean=[value / 255 for value in cfg.MODEL.PIXEL_MEAN],
        image_std=[value / 255 for value in cfg.MODEL.PIXEL_STD],
        ignore_index=255,
        do_reduce_labels=False,
    )
