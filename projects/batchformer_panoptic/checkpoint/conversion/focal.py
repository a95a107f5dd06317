"""What the converters of DETR's relatives with sigmoid scores share.

The names and shapes that the weights must have are those of the transformer that their own sizes
and settings build.
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
from .class_rows import CLASS_KEYS, select_class_rows
from .detr import TORCHVISION_INPUT
from .layout import (
    Shape,
    compare_with_layout,
    missing_sizes,
    out_channels,
    settings_of,
    transformer_settings,
)
from .rules import Converted, Renamed, Request, refuse_misfit

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
