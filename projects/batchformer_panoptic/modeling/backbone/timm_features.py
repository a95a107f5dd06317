"""Creating timm models that return feature maps."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..timm_models import create_timm_model

# Covered by the tests, with training step and evaluation; others of these families should do.
TESTED_TIMM_MODELS = (
    "resnet18",
    "resnet50",
    "efficientnet_lite0",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "convnext_atto",
    "regnetx_002",
    "fastvit_t8",
    "swin_tiny_patch4_window7_224",
)

# What families that are built for one image size call the permission to take others.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})

COLOURS = 3  # channels of an image


class TimmFeatures(NamedTuple):
    """A timm model that returns feature maps, and which they are.

    Attributes:
        net: (B, 3, H, W) -> list of maps (B, C_i, H / stride, W / stride). Its parameters are
            called ``model.`` and what timm calls them in the whole model.
        levels: what is returned, in this order: ``res2`` for stride 4, ``res3`` for 8 and so on.
        channels: of each map.
        beyond: names of what the model computes later maps from, which ``net`` does not have.
    """

    net: Any
    levels: tuple[str, ...]
    channels: tuple[int, ...]
    beyond: frozenset[str]


def create_timm_features(
    name: str, *, out_features: tuple[str, ...] | None = None, pretrained: bool = False
) -> TimmFeatures:
    """Create a timm model that returns a map for each stride, and nothing beyond the last one.

    Args:
        name: of the model, as ``timm.list_models()`` has it.
        out_features: maps that are wanted. None: all that the model has up to stride 32.
        pretrained: load weights, which timm downloads where it does not have them.

    Raises:
        UserError: see :func:`build_timm_backbone`.
    """
    whole = _create(name, pretrained=False)
    info = whole.feature_info
    # Of several maps of one stride the deepest one counts.
    available = {
        f"res{stride.bit_length() - 1}": index
        for stride, index in zip(info.reduction(), info.out_indices, strict=True)
        if stride & (stride - 1) == 0 and stride <= 32
    }
    wanted = tuple(available) if out_features is None else out_features
    missing = [level for level in wanted if level not in available]
    if missing or not wanted:
        strides = ", ".join(str(stride_of(level)) for level in available)
        raise UserError(
            f"timm's {name} has no map {', '.join(missing)}: it has {', '.join(available)} "
            f"(strides {strides}). List no others in "
            "MODEL.TIMM.OUT_FEATURES; what reads them (MODEL.DETR.IN_FEATURE, "
            "MODEL.MASK_HEAD.IN_FEATURES with MODEL.MASK_ON) must fit, or take another model"
        )
    deepest = max(available[level] for level in wanted)
    levels = {level: index for level, index in available.items() if index <= deepest}
    net = _create(name, pretrained=pretrained, out_indices=tuple(levels.values()))
    channels = tuple(net.feature_info.channels())
    beyond = frozenset(whole.state_dict().keys() - net.state_dict().keys())
    features = TimmFeatures(net, tuple(levels), channels, beyond)
    _check_maps(name, features)
    return features


def stride_of(level: str) -> int:
    """The stride of a map called ``res<n>``."""
    number = level.removeprefix("res")
    if not number.isdigit():
        raise UserError(f"MODEL.TIMM.OUT_FEATURES names {level!r}; maps are called res2, res3, ...")
    return 2 ** int(number)


def try_out(net: nn.Module, unit: int) -> list[Tensor]:
    """The maps of a small noise image; leaves the model as it was."""
    was_training = net.training
    net.eval()  # no statistics are collected, no random numbers are drawn
    maps = net(torch.linspace(-1, 1, COLOURS * 6 * unit**2).view(1, COLOURS, 2 * unit, 3 * unit))
    net.train(was_training)
    return list(maps)


def _create(name: str, *, pretrained: bool, **arguments: Any) -> Any:
    for any_size in _ANY_SIZE:
        try:
            return create_timm_model(
                name,
                node="MODEL.TIMM",
                pretrained=pretrained,
                features_only=True,
                feature_cls="getter",  # maps as (B, C, H, W), parameters under timm's own names
                **any_size,
                **arguments,
            )
        except TypeError as error:
            if not any_size or not any(word in str(error) for word in any_size):
                raise
        except AttributeError as error:
            raise UserError(f"timm's {name} offers no feature maps ({error})") from error
    raise AssertionError("the last attempt passes no argument that could be unknown")


def _check_maps(name: str, features: TimmFeatures) -> None:
    """Try the model on an image of another size than its own; what it says of itself must hold."""
    largest = max(stride_of(level) for level in features.levels)
    try:
        with torch.no_grad():
            maps = try_out(features.net, largest)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"timm's {name} takes images of one size only, and this model all sizes ({reason}); "
            f"take another one, such as {', '.join(TESTED_TIMM_MODELS[:4])}"
        ) from error
    for level, channels, found in zip(features.levels, features.channels, maps, strict=True):
        cells = largest // stride_of(level)
        if found.shape != (1, channels, 2 * cells, 3 * cells):
            raise UserError(
                f"timm's {name} returns a map of shape {tuple(found.shape)} for an image of "
                f"{2 * largest} x {3 * largest}, which is no map of stride {stride_of(level)} "
                f"and {channels} channels; take another model"
            )
