"""Weights and names of gaopengcuhk/SMCA-DETR, single- and multi-scale.

What the converters of DETR's relatives with sigmoid scores share.

The names and shapes that the weights must have are those of the transformer that their own sizes
and settings build.

Weights and names of Atten4Vis/ConditionalDETR.
"""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from torch import Tensor

from ...config import add_batchformer_panoptic_config
from ...errors import UserError
from ...modeling.transformer import build_transformer
from ...modeling.transformer.smca import DYNAMIC_SCALES as NUM_SCALES
from .core import (
    AFFINE,
    CLASS_KEYS,
    Allowed,
    Converted,
    NameTable,
    Renamed,
    Request,
    Row,
    Shape,
    compare_with_layout,
    missing_sizes,
    out_channels,
    refuse_misfit,
    rename,
    select_class_rows,
    settings_of,
    transformer_settings,
)
from .detr import NO_STATISTICS_COUNT, TORCHVISION_INPUT, official_to_ours

_REMEDY = "check --source, or name what may be left behind with --allow PATTERN"
_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def finish_focal(
    renamed: Renamed,
    request: Request,
    *,
    what: str,
    settings: Mapping[str, Any],
    unused_rows: int = 0,
) -> Converted:
    """Check that the weights are complete, choose the class rows and collect the settings.

    Args:
        renamed: weights in this project's names.
        request: of the user.
        what: the model, for messages.
        settings: config keys of the transformer, beside the sizes that all have.
        unused_rows: last rows of the class layer that no class of the public code ever used.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    model = renamed.model
    subject = f"the weights are no {what} that can be converted"
    missing = [*missing_sizes(model), *(key for key in CLASS_KEYS if key not in model)]
    refuse_misfit(
        subject, leftovers=renamed.leftovers if missing else [], missing=missing, remedy=_REMEDY
    )
    misfit = compare_with_layout(model, transformer_layout(model, settings, subject))
    refuse_misfit(
        subject,
        leftovers=[*renamed.leftovers, *renamed.old_keys(misfit.unexpected)],
        missing=misfit.missing,
        wrong_shape=misfit.wrong_shape,
        remedy=_REMEDY,
    )
    notes = []
    if unused_rows:
        model = {**model, **{key: model[key][:-unused_rows] for key in CLASS_KEYS}}
        notes.append(
            f"dropped are the last {unused_rows} class rows, which stand for no class number"
        )
    model, row_notes = select_class_rows(model, request.classes, no_object=False)
    everything = {
        **TORCHVISION_INPUT,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        **settings_of(model),
        **settings,
        "MODEL.DETR.SCORING": "focal",
    }
    return Converted(model, renamed.dropped, [*notes, *row_notes], everything)


def transformer_layout(
    model: Mapping[str, Tensor], settings: Mapping[str, Any], subject: str
) -> dict[str, Shape]:
    """Names and shapes of a transformer, without making its weights.

    Args:
        model: weights in this project's names, of which no size is missing.
        settings: config keys beside the sizes that all transformers have.
        subject: of the sentence that refuses sizes that do not go together.

    Raises:
        UserError: no transformer has these sizes.
    """
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    pairs = {**transformer_settings(model), **settings}
    cfg.merge_from_list([part for pair in pairs.items() for part in pair])
    shapes = {
        name: ShapeSpec(channels=out_channels(model, name) or 1, stride=stride)
        for name, stride in _STRIDES.items()
    }
    try:
        with torch.device("meta"):
            state = build_transformer(cfg, shapes).state_dict()
    except (AssertionError, ValueError) as error:
        sizes = ", ".join(f"{key} {value}" for key, value in pairs.items())
        raise UserError(f"{subject}: no model has its sizes ({sizes}): {error}") from error
    return {f"transformer.{name}": tuple(value.shape) for name, value in state.items()}


_PROJECTIONS = (
    r"(?:sa_(?:qcontent|qpos|kcontent|kpos|v)|ca_(?:qcontent|qpos|kcontent|kpos|v|qpos_sine))_proj"
)
_SAME = [
    ("transformer.decoder.layers.#.", rf"(?:{_PROJECTIONS}|cross_attn\.out_proj)\.{AFFINE}"),
    ("transformer.decoder.query_scale.layers.#.", AFFINE),
    ("transformer.decoder.ref_point_head.layers.#.", AFFINE),
]
_CONDITIONAL_TABLE = NameTable([Row(prefix, prefix, tail) for prefix, tail in _SAME])


def official_conditional_to_ours(name: str) -> str | None:
    """This project's name of an official parameter, None if there is none."""
    return _CONDITIONAL_TABLE.to_ours(name) or official_to_ours(name)


def convert_conditional(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a Conditional-DETR for boxes; its 91 class rows are numbered as COCO's files do.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    renamed = rename(state, official_conditional_to_ours, [NO_STATISTICS_COUNT], request)
    settings = {"MODEL.DETR.TRANSFORMER_NAME": "conditional"}
    return finish_focal(renamed, request, what="Conditional-DETR", settings=settings)


# --dynamic_scale of the public code -> MODEL.SMCA.DYNAMIC_SCALE.
DYNAMIC_SCALES = {
    "type1": "fixed",
    "type2": "isotropic",
    "type3": "per_axis",
    "type4": "per_axis_and_product",
}

_ENCODER, _DECODER = "transformer.encoder.layers.#.", "transformer.decoder.layers.#."
# Levels by stride, and backbone maps by the channels that a ResNet-50 has there.
_SMCA_STRIDES = (8, 16, 32, 64)
_CHANNELS = (512, 1024, 2048)

_SMCA_TABLE = NameTable(
    [
        Row(f"{_DECODER}norm4.", f"{_DECODER}query_norm.", AFFINE),
        Row(
            "transformer.decoder.layers.0.point1.layers.#.",
            "transformer.decoder.center_head.layers.#.",
            AFFINE,
        ),
        Row(f"{_DECODER}point2.", f"{_DECODER}prior.offset_head.", AFFINE),
        Row(f"{_DECODER}point3.", f"{_DECODER}prior.scale_head.", AFFINE),
        Row(f"{_DECODER}point4.", f"{_DECODER}prior.level_head.", AFFINE),
        Row("transformer.level_embed", "transformer.level_embed", ""),
        Row("transformer.conv.", "transformer.finest_reduction.", AFFINE),
        *(
            Row(f"input_proj_{channels}.", f"transformer.input_proj.{level}.", AFFINE)
            for level, channels in enumerate(_CHANNELS)
        ),
        Row(f"input_proj_{_CHANNELS[-1]}_3.", "transformer.extra_proj.", AFFINE),
        *(
            Row(f"{_ENCODER}self_attn_{stride}.", f"{_ENCODER}within.{level}.", AFFINE)
            for level, stride in enumerate(_SMCA_STRIDES)
        ),
        *(
            Row(f"{_ENCODER}{theirs}_{level + 1}.", f"{_ENCODER}{ours}.{level}.", AFFINE)
            for theirs, ours in (("high_to_low", "to_coarser"), ("low_to_high", "to_finer"))
            for level in range(len(_SMCA_STRIDES) - 1)
        ),
        Row(f"{_ENCODER}conv_1.", f"{_ENCODER}mix_in.", AFFINE),
        Row(f"{_ENCODER}conv_2.", f"{_ENCODER}mix_out.", AFFINE),
    ]
)


def official_smca_to_ours(name: str) -> str | None:
    """This project's name of an official parameter, None if there is none."""
    return _SMCA_TABLE.to_ours(name) or official_to_ours(name)


_NO_CRITERION = Allowed("criterion.empty_weight", "of the public loss, which does not read it")


def convert_smca(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert an SMCA for boxes, of one scale or of several as its names tell.

    The class layer has one row more than there are class numbers, which is dropped.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    allowed = [NO_STATISTICS_COUNT, _NO_CRITERION]
    renamed = rename(state, official_smca_to_ours, allowed, request)
    settings = _settings(renamed.model)
    return finish_focal(renamed, request, what="SMCA", settings=settings, unused_rows=1)


def _settings(model: Mapping[str, Tensor]) -> dict[str, Any]:
    """Config keys that the heads of the first decoder layer tell; defaults where one is absent."""
    prior = "transformer.decoder.layers.0.prior."
    several = "transformer.level_embed" in model
    settings: dict[str, Any] = {
        "MODEL.DETR.TRANSFORMER_NAME": "smca_multiscale" if several else "smca"
    }
    offsets = model.get(f"{prior}offset_head.bias")
    if offsets is None:
        return settings
    levels = len(_SMCA_STRIDES) if several else 1
    settings["MODEL.DETR.NHEADS"] = max(len(offsets) // (2 * levels), 1)
    scales = model.get(f"{prior}scale_head.bias")
    num_scales = 0 if scales is None else 2 * len(scales) // len(offsets)
    names = {number: name for name, number in NUM_SCALES.items()}
    if num_scales in names:
        settings["MODEL.SMCA.DYNAMIC_SCALE"] = names[num_scales]
    return settings
