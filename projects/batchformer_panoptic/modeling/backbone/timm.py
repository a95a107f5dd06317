"""Backbones from timm, through its ``features_only`` interface, and the creation of timm models."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError, did_you_mean, one_line

_logger = logging.getLogger(__name__)

_TOLERANCE = 0.01  # difference up to which pixel statistics count as equal, in grey levels
COLOURS = 3  # channels of an image

# Covered by the tests, with a training step and evaluation; related models are expected to work.
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

# Arguments by which timm's families for one image size allow others.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


# --- timm models by name -------------------------------------------------------------------------


def import_timm() -> Any:
    """Return the module timm.

    Raises:
        UserError: it is not installed.
    """
    try:
        import timm  # an optional dependency
    except ImportError as error:
        raise UserError(
            "models of timm need timm: pip install timm, or this project's extra [timm]"
        ) from error
    return timm


def create_timm_model(name: str, *, node: str, pretrained: bool, **arguments: Any) -> Any:
    """Create a model of timm.

    Args:
        name: a name in ``timm.list_models()``, with or without the tag of its weights.
        node: the config node of the model, for messages ("MODEL.TIMM").
        pretrained: load weights; timm downloads them if they are not cached.
        **arguments: further arguments of ``timm.create_model``.

    Raises:
        UserError: timm is not installed or has no such model, or its weights are not available.
        Exception: raised by timm for arguments that the model does not accept.
    """
    timm = import_timm()
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models()) or "; see timm.list_models()"
        raise UserError(f"timm has no model {name!r}{hint}")
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, AttributeError):
        raise
    # Downloads fail with many exception types (offline, no such weights, damaged file).
    except Exception as error:
        if not pretrained:
            raise
        reason = one_line(error, first_line_only=True)
        raise UserError(
            f"{node}.PRETRAINED: timm has no weights of {name} here and cannot download "
            f"them ({type(error).__name__}: {reason}); set it to False and MODEL.WEIGHTS to a "
            "converted file"
        ) from error


def timm_pixel_statistics(net: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, 0 to 255 and RGB, with which timm trained a model's weights."""
    mean, std = ([255.0 * x for x in net.pretrained_cfg[key]] for key in ("mean", "std"))
    return [round(x, 4) for x in mean], [round(x, 4) for x in std]


def check_pixel_statistics(
    net: Any, name: str, pixel_mean: Sequence[float], pixel_std: Sequence[float]
) -> None:
    """Check that images are normalised as those that timm's weights were trained on.

    Args:
        net: a timm model.
        name: its name.
        pixel_mean: MODEL.PIXEL_MEAN.
        pixel_std: MODEL.PIXEL_STD.

    Raises:
        UserError: a statistic differs; the message has the value to set.
    """
    mean, std = timm_pixel_statistics(net)
    for key, used, wanted in (("PIXEL_MEAN", pixel_mean, mean), ("PIXEL_STD", pixel_std, std)):
        if any(abs(a - b) > _TOLERANCE for a, b in zip(used, wanted, strict=True)):
            raise UserError(
                f"MODEL.{key} is {list(used)}, but timm's weights of {name} were trained "
                f"with {wanted}: set MODEL.{key} {wanted}"
            )


# --- timm models that return feature maps --------------------------------------------------------


class TimmFeatures(NamedTuple):
    """A timm model that returns feature maps, with the names and channels of the maps.

    Attributes:
        net: (B, 3, H, W) -> list of maps (B, C_i, H / stride, W / stride). Its parameter names are
            those of the whole timm model with the prefix ``model.``.
        levels: names of the maps, in order: ``res2`` for stride 4, ``res3`` for 8 and so on.
        channels: channels of each map.
        beyond: state-dict keys of the whole model that ``net`` does not have: its later stages.
    """

    net: Any
    levels: tuple[str, ...]
    channels: tuple[int, ...]
    beyond: frozenset[str]


def create_timm_features(
    name: str, *, out_features: tuple[str, ...] | None = None, pretrained: bool = False
) -> TimmFeatures:
    """Create a timm model that returns a map for each stride and ends at the last of them.

    Args:
        name: a name in ``timm.list_models()``.
        out_features: names of the maps. None: all maps of the model up to stride 32.
        pretrained: load weights; timm downloads them if they are not cached.

    Raises:
        UserError: see :func:`build_timm_backbone`.
    """
    whole = _create(name, pretrained=False)
    info = whole.feature_info
    # Of several maps of one stride the deepest one is used.
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
            "MODEL.TIMM.OUT_FEATURES, MODEL.DETR.IN_FEATURE and MODEL.MASK_HEAD.IN_FEATURES, or "
            "use another model"
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
    """The maps of a small image with a ramp of pixel values; the model is not changed."""
    was_training = net.training
    net.eval()  # updates no statistics and draws no random numbers
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
                feature_cls="getter",  # maps as (B, C, H, W), timm's own parameter names
                **any_size,
                **arguments,
            )
        except TypeError as error:
            if not any_size or not any(word in str(error) for word in any_size):
                raise
        except AttributeError as error:
            raise UserError(f"timm's {name} does not return feature maps ({error})") from error
    raise AssertionError("the last attempt has no argument that a model could refuse")


def _check_maps(name: str, features: TimmFeatures) -> None:
    """Run the model on an image of another size, and check the shapes that it declares."""
    largest = max(stride_of(level) for level in features.levels)
    try:
        with torch.no_grad():
            maps = try_out(features.net, largest)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = one_line(error, first_line_only=True)
        raise UserError(
            f"timm's {name} takes images of one size only, and this model all sizes ({reason}); "
            f"use another one, such as {', '.join(TESTED_TIMM_MODELS[:4])}"
        ) from error
    for level, channels, found in zip(features.levels, features.channels, maps, strict=True):
        cells = largest // stride_of(level)
        if found.shape != (1, channels, 2 * cells, 3 * cells):
            raise UserError(
                f"timm's {name} returns a map of shape {tuple(found.shape)} for an image of "
                f"{2 * largest} x {3 * largest}, expected stride {stride_of(level)} "
                f"and {channels} channels; use another model"
            )


# --- the backbone --------------------------------------------------------------------------------


class TimmBackbone(Backbone):
    """A timm model as a Detectron2 backbone, with Detectron2's names of the maps.

    Args:
        features: the timm model.
        out_features: names of the maps to return.
        freeze_at: freeze the parameters that ``res<freeze_at>`` is computed from, and the
            statistics of their batch norms. 0: none.
        frozen_norm: freeze all batch norms.
        normalize_maps: normalise the channels of each pixel of a map to mean 0 and variance 1.
    """

    def __init__(
        self,
        features: TimmFeatures,
        *,
        out_features: tuple[str, ...],
        freeze_at: int,
        frozen_norm: bool,
        normalize_maps: bool = False,
    ) -> None:
        super().__init__()
        self._normalize_maps = normalize_maps
        self._levels = features.levels
        self._shapes = {
            level: ShapeSpec(channels=channels, stride=stride_of(level))
            for level, channels in zip(features.levels, features.channels, strict=True)
        }
        self._out_features = out_features
        self._size_divisibility = max(stride_of(level) for level in features.levels)
        self.features = features.net
        self._beyond = features.beyond
        self.register_load_state_dict_pre_hook(_drop_later_stages)
        self._freeze(freeze_at)
        if frozen_norm:
            self.features = _with_frozen_norms(self.features)

    @property
    def size_divisibility(self) -> int:
        """The largest stride: images are padded to whole patches and windows."""
        return self._size_divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map that is returned."""
        return {name: self._shapes[name] for name in self._out_features}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (B, 3, H, W) images to (B, C_i, H / stride, W / stride) maps by name."""
        maps = dict(zip(self._levels, self.features(images), strict=True))
        if self._normalize_maps:
            maps = {name: _normalized(x) for name, x in maps.items()}
        return {name: maps[name] for name in self._out_features}

    @torch.enable_grad()  # the dependencies of a map are found by gradients
    def _freeze(self, freeze_at: int) -> None:
        names, parameters = zip(*self.features.named_parameters(), strict=True)
        maps = try_out(self.features, self._size_divisibility)
        used = _reached(list(maps), parameters)
        frozen = [False] * len(names)
        if freeze_at:
            frozen = _reached([maps[self._levels.index(f"res{freeze_at}")]], parameters)
        for parameter, is_used, is_frozen in zip(parameters, used, frozen, strict=True):
            # Distributed training fails for trainable parameters without a gradient.
            parameter.requires_grad_(is_used and not is_frozen)
        for name in {n.rpartition(".")[0] for n, f in zip(names, frozen, strict=True) if f}:
            parent, _, child = name.rpartition(".")
            owner = self.features.get_submodule(parent)
            setattr(owner, child, _with_frozen_norms(getattr(owner, child)))


def _normalized(maps: Tensor) -> Tensor:
    """Layer norm of each pixel's channels; without weights, so checkpoint keys do not change."""
    return F.layer_norm(maps.movedim(1, -1), maps.shape[1:2]).movedim(-1, 1)


def _drop_later_stages(backbone: TimmBackbone, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load-state-dict pre-hook that drops the weights of stages after the last map."""
    later = [name for name in backbone._beyond if f"{prefix}features.{name}" in state]
    for name in later:
        del state[f"{prefix}features.{name}"]
    if later:
        levels = ", ".join(backbone._levels)
        _logger.info(f"{len(later)} keys of stages after the maps {levels} are not used")


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The timm model ``MODEL.TIMM.NAME``.

    Raises:
        UserError: timm is not installed or has no such model, the model has no such maps or takes
            one image size only, its weights cannot be downloaded or were trained with other pixel
            statistics, or the input is not an RGB image.
    """
    node = cfg.MODEL.TIMM
    if input_shape.channels != COLOURS or cfg.INPUT.FORMAT != "RGB":
        raise UserError(
            f"MODEL.TIMM.NAME {node.NAME} reads RGB: set INPUT.FORMAT RGB, not {cfg.INPUT.FORMAT}"
        )
    features = create_timm_features(
        node.NAME, out_features=tuple(node.OUT_FEATURES), pretrained=node.PRETRAINED
    )
    if node.PRETRAINED:
        check_pixel_statistics(features.net, node.NAME, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at and f"res{freeze_at}" not in features.levels:
        levels = ", ".join(level.removeprefix("res") for level in features.levels)
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; with MODEL.TIMM.NAME {node.NAME} choose "
            f"0 or one of {levels}"
        )
    return TimmBackbone(
        features,
        out_features=tuple(node.OUT_FEATURES),
        freeze_at=freeze_at,
        frozen_norm=node.FROZEN_BN,
        normalize_maps=node.NORMALIZE_MAPS,
    )


def _reached(maps: list[Tensor], parameters: tuple[nn.Parameter, ...]) -> list[bool]:
    """For each parameter, whether any of the maps depends on it."""
    total = torch.stack([one.sum() for one in maps]).sum()
    gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def _with_frozen_norms(module: nn.Module) -> nn.Module:
    from timm.layers import freeze_batch_norm_2d

    frozen: nn.Module = freeze_batch_norm_2d(module)
    return frozen
