"""Image classifiers: weights of timm's vision Transformers and of facebookresearch/deit."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...modeling.backbone.timm import create_timm_model, timm_pixel_statistics
from ...modeling.image_classifier import is_plain_vision_transformer
from .core import (
    Converted,
    Request,
    Source,
    pixel_settings,
    refuse_mismatch,
    rename,
    wrong_shapes,
)

VIT_PREFIX = "timm_vit:"  # of source names that name a vision Transformer of timm

_OURS = "vit.model."
_HEAD = "head."
# The models of the DeiT paper; their parameters have the same names in timm.
_DEIT = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_base_patch16_384",
)
# Distilled models have a second token and a second head.
_DISTILLED = ("dist_token", "head_dist.")


def convert_deit(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a file of facebookresearch/deit; the shapes determine the size of the model."""
    theirs = _shapes(state)
    fitting = [name for name in _DEIT if _without_head(_shapes_of(name)) == _without_head(theirs)]
    if not fitting and not _is_distilled(state):
        raise UserError(
            f"the weights match none of {', '.join(_DEIT)}: name the model with --source "
            f"{VIT_PREFIX}NAME"
        )
    return _convert(state, request, fitting[0] if fitting else _DEIT[0])


def vision_transformer_source(name: str) -> Source:
    """Return the source ``timm_vit:<name>`` for weights of a vision Transformer of timm.

    Args:
        name: the name of a timm model, with or without the tag of its weights.
    """
    return Source(
        VIT_PREFIX + name,
        f"an image classifier from timm's {name}",
        lambda state, request: _convert(state, request, name),
    )


def _convert(state: dict[str, Tensor], request: Request, name: str) -> Converted:
    if request.classes is not None:
        raise UserError("--classes does not apply to image classifiers: leave it out")
    if _is_distilled(state):
        raise UserError(
            "the model is distilled and has a second token and head: use one without distillation"
        )
    shapes = dict(_shapes_of(name))
    rows = state[_HEAD + "weight"].shape[0] if _HEAD + "weight" in state else None
    for key in [key for key in shapes if key.startswith(_HEAD)]:
        if rows is None:
            del shapes[key]
        else:
            shapes[key] = (rows, *shapes[key][1:])
    renamed = rename(state, lambda key: _OURS + key if key in shapes else None, [], request)
    found = {key.removeprefix(_OURS): value for key, value in renamed.model.items()}
    refuse_mismatch(
        f"the weights are not those of timm's {name}",
        leftovers=renamed.leftovers,
        missing=shapes.keys() - found.keys(),
        wrong_shape=wrong_shapes(found, shapes),
        remedy=f"name their model with --source {VIT_PREFIX}NAME, or --allow keys to be left out",
    )
    return Converted(renamed.model, renamed.dropped, [_note(rows)], _settings(name, rows))


def _settings(name: str, rows: int | None) -> dict[str, Any]:
    model = _on_meta(name)
    settings = {
        **pixel_settings(*timm_pixel_statistics(model)),
        "MODEL.META_ARCHITECTURE": "ImageClassifier",
        "MODEL.CLASSIFIER.NAME": name,
        "MODEL.CLASSIFIER.IMAGE_SIZE": int(model.patch_embed.img_size[0]),
        "MODEL.CLASSIFIER.TIMM_KWARGS": [],
    }
    return settings if rows is None else {**settings, "MODEL.CLASSIFIER.NUM_CLASSES": rows}


def _note(rows: int | None) -> str:
    if rows is None:
        return "the weights have no class head: start training from them with --init-from"
    return (
        f"the weights do not name their {rows} classes: the data set must have the same ones in "
        "the same order; for other classes use --init-from"
    )


def _is_distilled(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(_DISTILLED) for key in state)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _without_head(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes.items() if not key.startswith(_HEAD)}


def _shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return _shapes(_on_meta(name).state_dict())


@cache
def _on_meta(name: str) -> Any:
    """Build a timm model without allocating its weights."""
    with torch.device("meta"):
        model = create_timm_model(name, node="MODEL.CLASSIFIER", pretrained=False)
    if not is_plain_vision_transformer(model):
        raise UserError(
            f"timm's {name} is a {type(model).__name__}; the image classifier needs a plain "
            "VisionTransformer"
        )
    return model
