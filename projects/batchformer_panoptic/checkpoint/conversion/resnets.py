"""ImageNet weights of ResNets, torchvision's and those that Detectron2 publishes."""

import re
from collections.abc import Callable, Mapping
from functools import cache

import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import Tensor

from ...errors import UserError
from .backbone_layout import CLASSIFIER, COUNTER, OURS, BackboneLayout, as_tensors
from .official import official_to_ours
from .rules import Allowed, Converted, Request, rename

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
