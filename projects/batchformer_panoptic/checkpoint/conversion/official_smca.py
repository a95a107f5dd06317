"""Weights and names of gaopengcuhk/SMCA-DETR, single- and multi-scale."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modeling.transformer.smca_attention import DYNAMIC_SCALES as NUM_SCALES
from .detr import NO_STATISTICS_COUNT
from .focal import finish_focal
from .names import NameTable, Row
from .official import AFFINE, official_to_ours
from .rules import Allowed, Converted, Request, rename

# --dynamic_scale of the public code -> MODEL.SMCA.DYNAMIC_SCALE.
DYNAMIC_SCALES = {
    "type1": "fixed",
    "type2": "isotropic",
    "type3": "per_axis",
    "type4": "per_axis_and_product",
}

_ENCODER, _DECODER = "transformer.encoder.layers.#.", "transformer.decoder.layers.#."
# Levels by stride, and backbone maps by the channels that a ResNet-50 has there.
_STRIDES = (8, 16, 32, 64)
_CHANNELS = (512, 1024, 2048)

_TABLE = NameTable(
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
            for level, stride in enumerate(_STRIDES)
        ),
        *(
            Row(f"{_ENCODER}{theirs}_{level + 1}.", f"{_ENCODER}{ours}.{level}.", AFFINE)
            for theirs, ours in (("high_to_low", "to_coarser"), ("low_to_high", "to_finer"))
            for level in range(len(_STRIDES) - 1)
        ),
        Row(f"{_ENCODER}conv_1.", f"{_ENCODER}mix_in.", AFFINE),
        Row(f"{_ENCODER}conv_2.", f"{_ENCODER}mix_out.", AFFINE),
    ]
)


def official_smca_to_ours(name: str) -> str | None:
    """This project's name of an official parameter, None if there is none."""
    return _TABLE.to_ours(name) or official_to_ours(name)


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
    levels = len(_STRIDES) if several else 1
    settings["MODEL.DETR.NHEADS"] = max(len(offsets) // (2 * levels), 1)
    scales = model.get(f"{prior}scale_head.bias")
    num_scales = 0 if scales is None else 2 * len(scales) // len(offsets)
    names = {number: name for name, number in NUM_SCALES.items()}
    if num_scales in names:
        settings["MODEL.SMCA.DYNAMIC_SCALE"] = names[num_scales]
    return settings
