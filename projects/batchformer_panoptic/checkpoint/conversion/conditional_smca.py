"""Conditional-DETR (Atten4Vis/ConditionalDETR) and SMCA (gaopengcuhk/SMCA-DETR): names, weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modeling.transformer.smca import DYNAMIC_SCALES
from .core import (
    AFFINE,
    CLASS_KEYS,
    NO_STATISTICS_COUNT,
    REMEDY,
    TORCHVISION_INPUT,
    Allowed,
    Converted,
    NameTable,
    Renamed,
    Request,
    Row,
    refuse_mismatch,
    rename,
    select_class_rows,
)
from .detr import official_to_ours
from .layout import compare_with_layout, missing_sizes, settings_of, transformer_layout

# Conditional-DETR.

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
    """Return this project's name of an official parameter, or None."""
    return _CONDITIONAL_TABLE.to_ours(name) or official_to_ours(name)


def convert_conditional(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a Conditional-DETR for boxes, whose 91 class rows are indexed by COCO's class ids.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    renamed = rename(state, official_conditional_to_ours, [NO_STATISTICS_COUNT], request)
    settings = {"MODEL.DETR.TRANSFORMER_NAME": "conditional"}
    return finish_focal(renamed, request, what="Conditional-DETR", settings=settings)


# SMCA.

_ENCODER, _DECODER = "transformer.encoder.layers.#.", "transformer.decoder.layers.#."
# The names contain the strides of the levels, and the channels of a ResNet-50's maps.
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
    """Return this project's name of an official parameter, or None."""
    return _SMCA_TABLE.to_ours(name) or official_to_ours(name)


_NO_CRITERION = Allowed("criterion.empty_weight", "unused buffer of the public loss")


def convert_smca(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert an SMCA for boxes; the names distinguish single-scale from multi-scale.

    The class layer has one row more than COCO has class ids, which is dropped.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    allowed = [NO_STATISTICS_COUNT, _NO_CRITERION]
    renamed = rename(state, official_smca_to_ours, allowed, request)
    settings = _settings(renamed.model)
    return finish_focal(renamed, request, what="SMCA", settings=settings, unused_rows=1)


def _settings(model: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read config keys from the heads of the first decoder layer; an absent head gives none."""
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
    names = {number: name for name, number in DYNAMIC_SCALES.items()}
    if num_scales in names:
        settings["MODEL.SMCA.DYNAMIC_SCALE"] = names[num_scales]
    return settings


# Shared by both: sigmoid scores.


def finish_focal(
    renamed: Renamed,
    request: Request,
    *,
    what: str,
    settings: Mapping[str, Any],
    unused_rows: int = 0,
) -> Converted:
    """Check that the weights are complete, select the class rows and collect the settings.

    Args:
        renamed: weights in this project's names.
        request: the options of the conversion.
        what: name of the model, for messages.
        settings: config keys of the transformer besides the sizes that all transformers have.
        unused_rows: number of last rows of the class layer that belong to no class.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    model = renamed.model
    subject = f"the weights are not a {what} model that can be converted"
    missing = [*missing_sizes(model), *(key for key in CLASS_KEYS if key not in model)]
    refuse_mismatch(
        subject, leftovers=renamed.leftovers if missing else [], missing=missing, remedy=REMEDY
    )
    mismatch = compare_with_layout(model, transformer_layout(model, settings, subject))
    refuse_mismatch(
        subject,
        leftovers=[*renamed.leftovers, *renamed.old_keys(mismatch.unexpected)],
        missing=mismatch.missing,
        wrong_shape=mismatch.wrong_shape,
        remedy=REMEDY,
    )
    notes = []
    if unused_rows:
        model = {**model, **{key: model[key][:-unused_rows] for key in CLASS_KEYS}}
        notes.append(f"the last class rows ({unused_rows}) are dropped: they belong to no class")
    model, row_notes = select_class_rows(model, request.classes, no_object=False)
    everything = {
        **TORCHVISION_INPUT,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        **settings_of(model),
        **settings,
        "MODEL.DETR.SCORING": "focal",
    }
    return Converted(model, renamed.dropped, [*notes, *row_notes], everything)
