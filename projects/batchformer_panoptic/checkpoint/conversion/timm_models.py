"""Weights of timm models, and of EfficientNet-Lite0 from elsewhere."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from ...errors import UserError
from ...modeling.backbone import TESTED_TIMM_MODELS, create_timm_features
from ...modeling.timm_models import import_timm, timm_pixel_statistics
from .backbone_layout import CLASSIFIER, COUNTER, OURS, BackboneLayout, as_tensors
from .rules import Allowed, Converted, Request, Source, rename

TIMM_PREFIX = "timm:"  # of source names that say which timm model a file is of

_OURS_TIMM = "backbone.features.model."

# Blocks in each stage of EfficientNet-Lite0. The port counts them through, timm by stage.
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
# Layers of a block, in the port's words and in timm's. The first stage does not expand.
_LITE0_FIRST = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
_LITE0_BLOCK = {
    **{"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2"},
    **{"project_conv": "conv_pwl", "bn2": "bn3"},
}
_LITE0_OUTER = {"conv_stem": "conv_stem", "bn0": "bn1"}


def convert_timm(state: dict[str, Tensor], request: Request) -> Converted:
    """Weights of one of the timm models that the tests cover, recognised by names and shapes."""
    state = as_tensors(state)
    fitting = [name for name in TESTED_TIMM_MODELS if _fits(state, name)]
    if len(fitting) != 1:
        found = f"fit {' and '.join(fitting)} alike" if fitting else "fit no timm model known here"
        raise UserError(
            f"the weights {found}: say which with --source {TIMM_PREFIX}NAME, for example "
            f"{TIMM_PREFIX}{(fitting or TESTED_TIMM_MODELS)[0]}"
        )
    converted = _convert_timm(state, request, fitting[0])
    return converted._replace(notes=[f"recognised as timm's {fitting[0]}", *converted.notes])


def timm_source(name: str) -> Source:
    """The source ``timm:<name>``: weights of a timm model that the user names.

    Args:
        name: of a model, with or without the tag of its weights (``resnet50.a1_in1k``).
    """
    return Source(
        TIMM_PREFIX + name,
        f"weights of timm's {name}",
        lambda state, request: _convert_timm(as_tensors(state), request, name),
    )


def convert_efficientnet_lite0(state: dict[str, Tensor], request: Request) -> Converted:
    """EfficientNet-Lite0 in the names of the ``efficientnet_pytorch`` port.

    The weights come from TensorFlow: they want its "same" padding and its epsilon, which timm's
    ``tf_efficientnet_lite0`` has and ``efficientnet_lite0`` has not, and (x - 127) / 128 as input
    (``efficientnet_lite_builder.py`` of tensorflow/tpu).
    """
    layout = _timm_layout("tf_efficientnet_lite0")
    allowed = [Allowed(f"{part}.*", CLASSIFIER) for part in ("_conv_head", "_bn1", "_fc")]
    renamed = rename(as_tensors(state), _lite0_name, allowed, request)
    layout.refuse_misfit(renamed.model, renamed.leftovers)
    settings = {
        **layout.settings,
        "MODEL.PIXEL_MEAN": [127.0, 127.0, 127.0],
        "MODEL.PIXEL_STD": [128.0, 128.0, 128.0],
    }
    return Converted(renamed.model, renamed.dropped, [], settings)


def _convert_timm(state: dict[str, Tensor], request: Request, name: str) -> Converted:
    layout = _timm_layout(name)
    kept = {key.removeprefix(_OURS_TIMM) for key in layout.shapes}
    beyond = _whole_model(name)[0].keys() - kept
    allowed = [Allowed(key, "classifier, or beyond the last map") for key in sorted(beyond)]
    renamed = rename(state, lambda k: _OURS_TIMM + k if k in kept else None, allowed, request)
    layout.refuse_misfit(renamed.model, renamed.leftovers)
    note = f"MODEL.PIXEL_MEAN and PIXEL_STD are those of timm's own weights of {name}"
    return Converted(renamed.model, renamed.dropped, [note], layout.settings)


@cache
def _timm_layout(name: str) -> BackboneLayout:
    features = create_timm_features(name)
    mean, std = timm_pixel_statistics(features.net)
    settings = {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": mean,
        "MODEL.PIXEL_STD": std,
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.TIMM.NAME": name,
    }
    state = features.net.state_dict()
    shapes = {f"{OURS}features.{key}": tuple(value.shape) for key, value in state.items()}
    return BackboneLayout(f"timm {name}", shapes, settings)


def _fits(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether a timm model has all that is in a state dict, its classifier apart, and no more."""
    shapes, classifier = _whole_model(name)
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    return _without(shapes, classifier) == _without(theirs, classifier)


@cache
def _whole_model(name: str) -> tuple[dict[str, tuple[int, ...]], str]:
    """Shapes of all parameters and buffers of a timm model, and the name of its classifier."""
    timm = import_timm()
    with torch.device("meta"):
        model = timm.create_model(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return shapes, model.pretrained_cfg["classifier"]


def _without(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {k: v for k, v in shapes.items() if not k.startswith(prefix) and COUNTER not in k}


def _lite0_name(key: str) -> str | None:
    parts = key.split(".")
    if parts[0] == "_blocks" and len(parts) == 4 and parts[1].isdigit():
        number = int(parts[1])
        for stage, blocks in enumerate(_LITE0_STAGES):
            if number < blocks:
                layer = (_LITE0_BLOCK if stage else _LITE0_FIRST).get(parts[2].removeprefix("_"))
                return layer and f"{_OURS_TIMM}blocks.{stage}.{number}.{layer}.{parts[3]}"
            number -= blocks
        return None
    layer = _LITE0_OUTER.get(parts[0].removeprefix("_"))
    return layer and ".".join([f"{_OURS_TIMM}{layer}", *parts[1:]])
