"""Weights of image classifiers: vision Transformers of timm, and the official files of DeiT."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...modeling.backbone.timm import create_timm_model, timm_pixel_statistics
from ...modeling.image_classifier import is_plain_vision_transformer
from .core import Converted, Request, Source, refuse_misfit, rename

VIT_PREFIX = "timm_vit:"  # of source names that say which vision Transformer of timm a file is of

_OURS = "vit.model."
_HEAD = "head."
# The models of the DeiT paper; timm's names of their parameters are the official ones.
_DEIT = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_base_patch16_384",
)
# A second token and a second head, which is another model.
_DISTILLED = ("dist_token", "head_dist.")


def convert_deit(state: dict[str, Tensor], request: Request) -> Converted:
    """A file of facebookresearch/deit, whose size is recognised by its shapes."""
    theirs = _shapes(state)
    fitting = [name for name in _DEIT if _without_head(_shapes_of(name)) == _without_head(theirs)]
    if not fitting and not _is_distilled(state):
        raise UserError(
            f"the weights are none of {', '.join(_DEIT)}: name the model with --source "
            f"{VIT_PREFIX}NAME"
        )
    return _convert(state, request, fitting[0] if fitting else _DEIT[0])


def vision_transformer_source(name: str) -> Source:
    """The source ``timm_vit:<name>``: weights of a vision Transformer of timm.

    Args:
        name: of a model, with or without the tag of its weights.
    """
    return Source(
        VIT_PREFIX + name,
        f"an image classifier from timm's {name}",
        lambda state, request: _convert(state, request, name),
    )


def _convert(state: dict[str, Tensor], request: Request, name: str) -> Converted:
    if request.classes is not None:
        raise UserError("--classes: the classes of an image classifier stay; leave it out")
    if _is_distilled(state):
        raise UserError(
            "the weights are of a distilled model, which has a second token and a second head: "
            "take a file without distillation"
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
    refuse_misfit(
        f"the weights are no {name} of timm",
        leftovers=renamed.leftovers,
        missing=shapes.keys() - found.keys(),
        wrong_shape=[
            f"{key}: {tuple(value.shape)} instead of {shapes[key]}"
            for key, value in found.items()
            if tuple(value.shape) != shapes[key]
        ],
        remedy=f"name their model with --source {VIT_PREFIX}NAME, or allow keys that may be left "
        "over",
    )
    return Converted(renamed.model, renamed.dropped, [_note(rows)], _settings(name, rows))


def _settings(name: str, rows: int | None) -> dict[str, Any]:
    model = _on_meta(name)
    mean, std = timm_pixel_statistics(model)
    settings = {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": mean,
        "MODEL.PIXEL_STD": std,
        "MODEL.META_ARCHITECTURE": "ImageClassifier",
        "MODEL.CLASSIFIER.NAME": name,
        "MODEL.CLASSIFIER.IMAGE_SIZE": int(model.patch_embed.img_size[0]),
        "MODEL.CLASSIFIER.TIMM_KWARGS": [],
    }
    return settings if rows is None else {**settings, "MODEL.CLASSIFIER.NUM_CLASSES": rows}


def _note(rows: int | None) -> str:
    if rows is None:
        return "the weights have no class head: start a training from them with --init-from"
    return (
        f"the weights do not name their {rows} classes, whose order must be that of the data set; "
        "for other classes: --init-from"
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
    """The model without numbers."""
    with torch.device("meta"):
        model = create_timm_model(name, node="MODEL.CLASSIFIER", pretrained=False)
    if not is_plain_vision_transformer(model):
        raise UserError(
            f"timm's {name} is a {type(model).__name__} and no plain VisionTransformer, which the "
            "image classifier needs"
        )
    return model
