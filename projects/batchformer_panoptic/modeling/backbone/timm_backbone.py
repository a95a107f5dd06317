"""Any timm model with feature maps as a backbone, through its ``features_only`` interface."""

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError
from ..timm_models import check_pixel_statistics
from .timm_features import (
    COLOURS,
    TimmFeatures,
    create_timm_features,
    stride_of,
    try_out,
)

_logger = logging.getLogger(__name__)


class TimmBackbone(Backbone):
    """Maps of a timm model under Detectron2's names.

    Args:
        features: the timm model.
        out_features: which of its maps to return.
        freeze_at: the parameters that ``res<freeze_at>`` is computed from stay as they are, and so
            do the statistics of their batch norms. 0: none.
        frozen_norm: all batch norms stay as they are.
        normalize_maps: bring the channels of each pixel of a map to mean 0 and variance 1.
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
        self.register_load_state_dict_pre_hook(_leave_out_later_stages)
        self._freeze(freeze_at)
        if frozen_norm:
            self.features = _with_frozen_norms(self.features)

    @property
    def size_divisibility(self) -> int:
        """Patches and windows would leave out what is beyond the last whole one."""
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

    @torch.enable_grad()  # gradients tell what depends on what, whoever builds the model
    def _freeze(self, freeze_at: int) -> None:
        names, parameters = zip(*self.features.named_parameters(), strict=True)
        maps = try_out(self.features, self._size_divisibility)
        used = _reached(list(maps), parameters)
        frozen = [False] * len(names)
        if freeze_at:
            frozen = _reached([maps[self._levels.index(f"res{freeze_at}")]], parameters)
        for parameter, is_used, is_frozen in zip(parameters, used, frozen, strict=True):
            # What no map depends on gets no gradient, which distributed training does not forgive.
            parameter.requires_grad_(is_used and not is_frozen)
        for name in {n.rpartition(".")[0] for n, f in zip(names, frozen, strict=True) if f}:
            parent, _, child = name.rpartition(".")
            owner = self.features.get_submodule(parent)
            setattr(owner, child, _with_frozen_norms(getattr(owner, child)))


def _normalized(maps: Tensor) -> Tensor:
    """Layer norm of each pixel's channels without weights, so that no checkpoint changes."""
    return F.layer_norm(maps.movedim(1, -1), maps.shape[1:2]).movedim(-1, 1)


def _leave_out_later_stages(
    backbone: TimmBackbone, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Weights of a whole model serve a backbone that ends earlier."""
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
        UserError: timm is not installed or does not know the model, the model has no such maps or
            takes one image size only, its weights cannot be downloaded or were made for other
            pixel statistics, or the input is no RGB image.
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
    """Which parameters some maps are computed from."""
    total = torch.stack([one.sum() for one in maps]).sum()
    gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def _with_frozen_norms(module: nn.Module) -> nn.Module:
    from timm.layers import freeze_batch_norm_2d

    frozen: nn.Module = freeze_batch_norm_2d(module)
    return frozen
