"""DETR of Hugging Face transformers: names, weights and config.

Query, key and value projections are separate parameters there and one parameter here, see
`merge_projections` and `split_projections`. The mask head has the names of facebookresearch/detr.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ...data.class_table import ClassTable
from ...errors import UserError
from .core import (
    AFFINE,
    FROZEN_NORM,
    NO_STATISTICS_COUNT,
    TORCHVISION_INPUT,
    Allowed,
    Converted,
    NameTable,
    Request,
    Row,
    refuse_mismatch,
    rename,
)
from .detr import (
    BESIDE_DETECTOR,
    dilation_settings,
    finish,
    official_to_ours,
    ours_to_official,
)
from .layout import resnet_shape

_PROJECTIONS = rf"(?:[qkv]_proj|out_proj)\.{AFFINE}"
_ENCODER, _DECODER = "model.encoder.layers.#.", "model.decoder.layers.#."
_OURS_ENCODER, _OURS_DECODER = "transformer.encoder.layers.#.", "transformer.decoder.layers.#."
# Names of the maps res2 to res5.
STAGES = ("stage1", "stage2", "stage3", "stage4")
_CONV_ENCODER = "model.backbone.conv_encoder.model."


def resnet_rows(prefix: str) -> list[Row]:
    """Rows of the names of ResNetBackbone behind a prefix."""
    return [
        Row(f"{prefix}embedder.embedder.convolution.", "backbone.stem.conv1.", "weight"),
        Row(
            f"{prefix}embedder.embedder.normalization.",
            "backbone.stem.conv1.norm.",
            FROZEN_NORM,
        ),
        *(
            Row(
                f"{prefix}encoder.stages.{i}.layers.#.{theirs}",
                f"backbone.res{i + 2}.#.{ours}",
                tail,
            )
            for i in range(4)
            for part, conv in (
                *((f"layer.{k}.", f"conv{k + 1}.") for k in range(3)),
                ("shortcut.", "shortcut."),
            )
            for theirs, ours, tail in (
                (f"{part}convolution.", conv, "weight"),
                (f"{part}normalization.", f"{conv}norm.", FROZEN_NORM),
            )
        ),
    ]


_TABLE = NameTable(
    [
        *resnet_rows(_CONV_ENCODER),
        Row("model.query_position_embeddings.", "transformer.query_embed.", "weight"),
        Row("model.input_projection.", "transformer.input_proj.", AFFINE),
        Row(f"{_ENCODER}self_attn.", f"{_OURS_ENCODER}self_attn.", _PROJECTIONS),
        Row(f"{_ENCODER}self_attn_layer_norm.", f"{_OURS_ENCODER}norm1.", AFFINE),
        Row(f"{_ENCODER}fc1.", f"{_OURS_ENCODER}linear1.", AFFINE),
        Row(f"{_ENCODER}fc2.", f"{_OURS_ENCODER}linear2.", AFFINE),
        Row(f"{_ENCODER}final_layer_norm.", f"{_OURS_ENCODER}norm2.", AFFINE),
        Row(f"{_DECODER}self_attn.", f"{_OURS_DECODER}self_attn.", _PROJECTIONS),
        Row(f"{_DECODER}self_attn_layer_norm.", f"{_OURS_DECODER}norm1.", AFFINE),
        Row(f"{_DECODER}encoder_attn.", f"{_OURS_DECODER}multihead_attn.", _PROJECTIONS),
        Row(f"{_DECODER}encoder_attn_layer_norm.", f"{_OURS_DECODER}norm2.", AFFINE),
        Row(f"{_DECODER}fc1.", f"{_OURS_DECODER}linear1.", AFFINE),
        Row(f"{_DECODER}fc2.", f"{_OURS_DECODER}linear2.", AFFINE),
        Row(f"{_DECODER}final_layer_norm.", f"{_OURS_DECODER}norm3.", AFFINE),
        Row("model.decoder.layernorm.", "transformer.decoder.norm.", AFFINE),
        Row("class_labels_classifier.", "box_head.class_embed.", AFFINE),
        Row("bbox_predictor.layers.#.", "box_head.bbox_embed.layers.#.", AFFINE),
    ]
)

_ALLOWED = [
    NO_STATISTICS_COUNT,
    Allowed("*criterion.empty_weight", "class weights of the loss"),
]
# The projections in the order in which torch.nn.MultiheadAttention stacks them.
_STACKED = ("q_proj", "k_proj", "v_proj")
_SEPARATE = re.compile(r"(?P<attention>.*attn)\.(?P<which>[qkv]_proj)\.(?P<part>weight|bias)")
_TOGETHER = re.compile(r"(?P<attention>.*attn)\.in_proj_(?P<part>weight|bias)")


def convert_huggingface(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a DetrForObjectDetection or DetrForSegmentation, with any of its backbone names.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    renamed = rename(state, huggingface_to_ours, _ALLOWED, request)
    renamed = renamed._replace(model=merge_projections(renamed.model))
    return finish(renamed, request, input_settings=TORCHVISION_INPUT)


def huggingface_to_ours(name: str) -> str | None:
    """Return this project's name of a parameter of transformers, or None.

    Attention projections keep their names (``self_attn.q_proj.weight``).
    """
    if name.startswith(BESIDE_DETECTOR):
        return official_to_ours(name)
    name = name.removeprefix("detr.")
    if name.startswith(_CONV_ENCODER):
        # Backbones on the hub have timm's (torchvision's) names, others those of ResNetBackbone.
        torchvision_name = "backbone.0.body." + name.removeprefix(_CONV_ENCODER)
        return official_to_ours(torchvision_name) or _TABLE.to_ours(name)
    return _TABLE.to_ours(name)


def ours_to_huggingface(name: str, *, with_masks: bool) -> str | None:
    """Return the name of a parameter in transformers, with ResNetBackbone names, or None.

    Args:
        name: of this project, with separate attention projections.
        with_masks: for a DetrForSegmentation, whose detector has the prefix ``detr.``.
    """
    if name.startswith("mask_head."):
        return ours_to_official(name, with_masks=with_masks)
    theirs = _TABLE.to_theirs(name)
    return f"detr.{theirs}" if theirs is not None and with_masks else theirs


def merge_projections(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack query, key and value projections as torch.nn.MultiheadAttention does.

    Raises:
        UserError: lists the missing projections of an attention that has others.
    """
    merged = {name: value for name, value in model.items() if not _SEPARATE.fullmatch(name)}
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in model.items():
        if found := _SEPARATE.fullmatch(name):
            group = groups.setdefault((found["attention"], found["part"]), {})
            group[found["which"]] = value
    refuse_mismatch(
        "the attention projections are incomplete",
        missing=[
            f"{attention}.{which}.{part}"
            for (attention, part), group in groups.items()
            for which in _STACKED
            if which not in group
        ],
        remedy="use the complete file",
    )
    for (attention, part), group in groups.items():
        merged[f"{attention}.in_proj_{part}"] = torch.cat([group[which] for which in _STACKED])
    return merged


def split_projections(
    model: Mapping[str, Tensor], attentions: tuple[str, ...] = ("attn",)
) -> dict[str, Tensor]:
    """Split stacked projections: the inverse of `merge_projections`.

    Args:
        model: tensors by name.
        attentions: ends of the names of the attention layers that are split.
    """
    split = {}
    for name, value in model.items():
        found = _TOGETHER.fullmatch(name)
        if found and found["attention"].endswith(attentions):
            for which, chunk in zip(_STACKED, value.chunk(3), strict=True):
                split[f"{found['attention']}.{which}.{found['part']}"] = chunk
        else:
            split[name] = value
    return split


def class_names(classes: ClassTable | None, num_classes: int) -> list[str]:
    """Names of the classes of a model; None: their indices.

    Raises:
        UserError: the class table has another number of classes.
    """
    names = [str(i) for i in range(num_classes)] if classes is None else list(classes.names)
    if len(names) != num_classes:
        raise UserError(
            f"the weights have {num_classes} classes, the class table {len(names)}: use the table "
            "of the data set they were trained on"
        )
    return names


def resnet_config(
    transformers: Any, model: Mapping[str, Tensor], cfg: CfgNode, stages: Sequence[str]
) -> Any:
    """The config of the ResNet of a model, which returns the maps of some stages."""
    shape = resnet_shape(model)
    return transformers.ResNetConfig(
        embedding_size=shape.stem,
        hidden_sizes=list(shape.widths),
        depths=list(shape.depths),
        layer_type="bottleneck" if shape.bottleneck else "basic",
        downsample_in_bottleneck=bool(cfg.MODEL.RESNETS.STRIDE_IN_1X1),
        out_features=list(stages),
    )


def detr_arguments(cfg: CfgNode, names: Sequence[str]) -> dict[str, Any]:
    """Arguments that the configs of DETR, Conditional-DETR and Deformable-DETR share."""
    node = cfg.MODEL.DETR
    return {
        "use_timm_backbone": False,
        "num_queries": node.NUM_OBJECT_QUERIES,
        "d_model": node.HIDDEN_DIM,
        "encoder_layers": node.ENC_LAYERS,
        "decoder_layers": node.DEC_LAYERS,
        "encoder_attention_heads": node.NHEADS,
        "decoder_attention_heads": node.NHEADS,
        "encoder_ffn_dim": node.DIM_FEEDFORWARD,
        "decoder_ffn_dim": node.DIM_FEEDFORWARD,
        # This project has one dropout rate, transformers three.
        "dropout": node.DROPOUT,
        "attention_dropout": node.DROPOUT,
        "activation_dropout": node.DROPOUT,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def settings_of_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read the config keys that the weights do not determine; refuse unsupported ones.

    Args:
        config: content of ``config.json``.
        folder: the folder of the file, for the message.

    Raises:
        UserError: names the setting that this project does not have.
    """
    backbone = config.get("backbone_config") or {}
    heads = {config.get(f"{part}_attention_heads", 8) for part in ("encoder", "decoder")}
    unsupported = {
        "different encoder_attention_heads and decoder_attention_heads": len(heads) > 1,
        "position_embedding_type other than sine": (
            config.get("position_embedding_type", "sine") != "sine"
        ),
        "activation_function other than relu": config.get("activation_function", "relu") != "relu",
        "backbone_config.downsample_in_first_stage": backbone.get("downsample_in_first_stage"),
    }
    if found := [what for what, is_so in unsupported.items() if is_so]:
        raise UserError(f"{folder}/config.json needs an unsupported setting: {found[0]}")
    dilated = config.get("dilation") or backbone.get("output_stride") == 16
    return {
        "MODEL.DETR.NHEADS": heads.pop(),
        "MODEL.RESNETS.STRIDE_IN_1X1": bool(backbone.get("downsample_in_bottleneck", False)),
        **dilation_settings(bool(dilated)),
    }
