"""Conditional-DETR and Deformable-DETR of Hugging Face transformers: names and config, for boxes.

transformers has no masks for these models; a mask head is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from .core import AFFINE, NameTable, Row, refuse_mismatch
from .huggingface import STAGES, detr_arguments, resnet_config, resnet_rows, split_projections

# Transformer: class of the model, class of its config.
CLASSES = {
    "conditional": ("ConditionalDetrForObjectDetection", "ConditionalDetrConfig"),
    "deformable": ("DeformableDetrForObjectDetection", "DeformableDetrConfig"),
}
_OURS, _THEIRS = "transformer.{}.layers.#.", "model.{}.layers.#."
_ENCODER, _DECODER = _OURS.format("encoder"), _OURS.format("decoder")
_THEIRS_DECODER = _THEIRS.format("decoder")
_PROJECTIONS = {
    "q_content": "qcontent",
    "q_pos": "qpos",
    "k_content": "kcontent",
    "k_pos": "kpos",
    "v": "v",
}
_SEPARATE = rf"(?:[qkv]_proj\.){AFFINE}"
_SAMPLING = rf"(?:sampling_offsets|attention_weights|value_proj|output_proj)\.{AFFINE}"


def _layer_rows(part: str, norms: list[str]) -> list[Row]:
    """Rows of feed-forward network and norms, which come in the order of the operations."""
    ours, theirs = _OURS.format(part), _THEIRS.format(part)
    return [
        *(Row(f"{theirs}mlp.fc{i}.", f"{ours}linear{i}.", AFFINE) for i in (1, 2)),
        *(Row(f"{theirs}{name}.", f"{ours}norm{i}.", AFFINE) for i, name in enumerate(norms, 1)),
    ]


_ATTENDS_ITSELF, _ATTENDS_MEMORY = "self_attn_layer_norm", "encoder_attn_layer_norm"
_LAST = "final_layer_norm"
_ENCODER_ROWS = _layer_rows("encoder", [_ATTENDS_ITSELF, _LAST])
_BACKBONE_ROWS = resnet_rows("model.backbone.model.")
_QUERIES = Row("model.query_position_embeddings.", "transformer.query_embed.", "weight")


def _self_attention(part: str) -> list[Row]:
    ours, theirs = f"{_OURS.format(part)}self_attn.", f"{_THEIRS.format(part)}self_attn."
    return [
        Row(theirs, ours, _SEPARATE),
        Row(f"{theirs}o_proj.", f"{ours}out_proj.", AFFINE),
    ]


_CONDITIONAL = NameTable(
    [
        *_BACKBONE_ROWS,
        _QUERIES,
        Row("model.input_projection.", "transformer.input_proj.", AFFINE),
        *_self_attention("encoder"),
        *_ENCODER_ROWS,
        *_layer_rows("decoder", [_ATTENDS_ITSELF, _ATTENDS_MEMORY, _LAST]),
        *(
            Row(f"{_THEIRS_DECODER}{attention}.{theirs}_proj.", f"{_DECODER}{ours}_proj.", AFFINE)
            for attention, prefix, further in (
                ("self_attn", "sa", {}),
                ("encoder_attn", "ca", {"q_pos_sine": "qpos_sine"}),
            )
            for theirs, ours in (
                (theirs, f"{prefix}_{ours}") for theirs, ours in (_PROJECTIONS | further).items()
            )
        ),
        Row(f"{_THEIRS_DECODER}self_attn.o_proj.", f"{_DECODER}self_attn.out_proj.", AFFINE),
        Row(f"{_THEIRS_DECODER}encoder_attn.o_proj.", f"{_DECODER}cross_attn.out_proj.", AFFINE),
        Row("model.decoder.layernorm.", "transformer.decoder.norm.", AFFINE),
        *(
            Row(f"model.decoder.{part}.layers.#.", f"transformer.decoder.{part}.layers.#.", AFFINE)
            for part in ("query_scale", "ref_point_head")
        ),
        Row("class_labels_classifier.", "box_head.class_embed.", AFFINE),
        Row("bbox_predictor.layers.#.", "box_head.bbox_embed.layers.#.", AFFINE),
    ]
)

_DEFORMABLE = NameTable(
    [
        *_BACKBONE_ROWS,
        _QUERIES,
        *(
            Row(f"model.input_proj.#.{i}.", f"transformer.projection.levels.#.{i}.", AFFINE)
            for i in (0, 1)
        ),
        Row("model.level_embed", "transformer.level_embed", ""),
        Row("model.reference_points.", "transformer.reference_points.", AFFINE),
        Row(f"{_THEIRS.format('encoder')}self_attn.", f"{_ENCODER}self_attn.", _SAMPLING),
        *_ENCODER_ROWS,
        *_self_attention("decoder"),
        Row(f"{_THEIRS_DECODER}encoder_attn.", f"{_DECODER}cross_attn.", _SAMPLING),
        # Our decoder layers name the norm of the cross-attention first, as published.
        *_layer_rows("decoder", [_ATTENDS_MEMORY, _ATTENDS_ITSELF, _LAST]),
        *(
            Row(f"model.{part}.", f"transformer.proposal_stage.{part}.", AFFINE)
            for part in ("enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")
        ),
    ]
)


def detection_config(
    transformers: Any, model: Mapping[str, Tensor], cfg: CfgNode, names: Sequence[str]
) -> Any:
    """Build the config of transformers.

    Args:
        transformers: the library.
        model: the weights, which determine the ResNet.
        cfg: the config of the training.
        names: names of the classes.
    """
    node = cfg.MODEL.DETR
    model_class, config_class = CLASSES[node.TRANSFORMER_NAME]
    further: dict[str, Any] = {}
    used = [node.IN_FEATURE]
    if node.TRANSFORMER_NAME == "deformable":
        own = cfg.MODEL.DEFORMABLE
        used = list(own.IN_FEATURES)
        further = {
            "num_feature_levels": own.NUM_FEATURE_LEVELS,
            "encoder_n_points": own.ENC_POINTS,
            "decoder_n_points": own.DEC_POINTS,
            "with_box_refine": own.BOX_REFINE,
            "two_stage": own.TWO_STAGE,
            "two_stage_num_proposals": node.NUM_OBJECT_QUERIES,
        }
    stage_of = dict(zip(("res2", "res3", "res4", "res5"), STAGES, strict=True))
    stages = [stage_of[feature] for feature in used]
    return getattr(transformers, config_class)(
        **detr_arguments(cfg, names),
        **further,
        backbone_config=resnet_config(transformers, model, cfg, stages),
        focal_alpha=node.FOCAL_ALPHA,
        architectures=[model_class],
    )


def detection_processor(transformers: Any, cfg: CfgNode) -> Any:
    """Build the image processor, with the sizes and statistics of the config."""
    model_class, _ = CLASSES[cfg.MODEL.DETR.TRANSFORMER_NAME]
    name = model_class.replace("ForObjectDetection", "ImageProcessor")
    return getattr(transformers, name)(
        size={"shortest_edge": cfg.INPUT.MIN_SIZE_TEST, "longest_edge": cfg.INPUT.MAX_SIZE_TEST},
        image_mean=[value / 255 for value in cfg.MODEL.PIXEL_MEAN],
        image_std=[value / 255 for value in cfg.MODEL.PIXEL_STD],
    )


def detection_weights(
    transformers: Any, state: Mapping[str, Tensor], config: Any
) -> dict[str, Tensor]:
    """Rename weights, and check that they are exactly those of the model of ``config``.

    Raises:
        UserError: lists the weights that have no counterpart, are missing, or have another shape.
    """
    is_conditional = config.model_type == "conditional_detr"
    table = _CONDITIONAL if is_conditional else _DEFORMABLE
    theirs: dict[str, Tensor] = {}
    leftovers = []
    for name, value in split_projections(state).items():
        found = [] if is_conditional else list(_deformable_heads(name, config))
        translated = table.to_theirs(name)
        found += [translated] if translated is not None else []
        theirs |= dict.fromkeys(found, value)
        if not found:
            leftovers.append(name)
    with torch.device("meta"):
        expected = getattr(transformers, config.architectures[0])(config).state_dict()
    counted = [key for key in expected if not key.endswith("num_batches_tracked")]
    refuse_mismatch(
        f"the weights are not a model that {config.architectures[0]} can express",
        leftovers=[*leftovers, *(key for key in theirs if key not in expected)],
        missing=[key for key in counted if key not in theirs],
        wrong_shape=[
            f"{key} {tuple(theirs[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in counted
            if key in theirs and theirs[key].shape != expected[key].shape
        ],
        remedy="the export supports Detectron2's ResNet with FrozenBN or BN",
    )
    return theirs


def _deformable_heads(name: str, config: Any) -> Iterator[str]:
    """Names of a weight of the box heads: one for each layer, and again in the decoder."""
    if not name.startswith("box_head."):
        return
    words = name.split(".")[1:]
    layers = range(config.decoder_layers + bool(config.two_stage))
    if words[0] == "layers":
        layers, words = range(int(words[1]), int(words[1]) + 1), words[2:]
    for layer in layers:
        for prefix in ("", "model.decoder.") if config.with_box_refine else ("",):
            if prefix and words[0] == "class_embed" and not config.two_stage:
                continue
            yield f"{prefix}{words[0]}.{layer}.{'.'.join(words[1:])}"
