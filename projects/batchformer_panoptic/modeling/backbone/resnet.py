"""ResNets: DETR's DC5 variant, a small one, folded norms, and checkpointing of stages."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, build_resnet_backbone
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...errors import UserError

_KEY = 'MODEL.ACTIVATION_CHECKPOINTING "backbone"'


@BACKBONE_REGISTRY.register()
def build_resnet_dc5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet; with ``MODEL.RESNETS.RES5_DILATION`` 2, torchvision's DC5 variant.

    Both variants keep ``res5`` at stride 16. Detectron2 dilates all blocks of the stage;
    torchvision (``replace_stride_with_dilation=[False, False, True]``, as in DETR) does not dilate
    the first block, whose stride is removed. With dilation 1 this is ``build_resnet_backbone``.
    """
    dilated = cfg.MODEL.RESNETS.RES5_DILATION > 1
    if dilated and cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE[-1]:
        raise UserError(
            "MODEL.RESNETS.RES5_DILATION > 1 and deformable convolutions in res5 "
            "(MODEL.RESNETS.DEFORM_ON_PER_STAGE) do not go together"
        )
    resnet = build_resnet_backbone(cfg, input_shape)
    if dilated and "res5" in resnet.stage_names:
        conv = resnet.res5[0].conv2
        conv.dilation = conv.padding = (1, 1)
    return resnet


@BACKBONE_REGISTRY.register()
def build_small_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ResNet with the widths, strides and depth of ``MODEL.SMALL_RESNET``.

    For small images and machines without a GPU. Maps are called ``res2``, ``res3``, ... as in
    Detectron2; the stem has stride 4. All parameters are trained: there are no pre-trained weights
    that ``MODEL.BACKBONE.FREEZE_AT`` would keep.
    """
    node = cfg.MODEL.SMALL_RESNET
    stem = BasicStem(
        in_channels=input_shape.channels, out_channels=node.STEM_CHANNELS, norm=node.NORM
    )
    stages: list[list[BasicBlock]] = []
    in_channels = node.STEM_CHANNELS
    for channels, stride in zip(node.STAGE_CHANNELS, node.STAGE_STRIDES, strict=True):
        if stride > 1 and channels == in_channels:
            # Detectron2's basic block has a shortcut convolution only where the width changes.
            raise UserError(
                f"MODEL.SMALL_RESNET.STAGE_CHANNELS is {node.STAGE_CHANNELS}: a stage of stride "
                f"{stride} must change the number of channels ({channels})"
            )
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                node.BLOCKS_PER_STAGE,
                stride_per_block=[stride] + [1] * (node.BLOCKS_PER_STAGE - 1),
                in_channels=in_channels,
                out_channels=channels,
                norm=node.NORM,
            )
        )
        in_channels = channels
    return ResNet(stem, stages, out_features=cfg.MODEL.RESNETS.OUT_FEATURES)


# --- frozen batch norms --------------------------------------------------------------------------


class FoldedConv2d(Conv2d):
    """Detectron2's convolution; training folds a frozen batch norm after it into its weights.

    The norm is affine: conv(x, w) * scale + shift = conv(x, w * scale) + shift, up to rounding. It
    takes one operation on the weights instead of seven, three of them on maps. Evaluation and
    checkpoints are those of Detectron2.
    """

    _kept: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        if not (torch.is_grad_enabled() and isinstance(self.norm, FrozenBatchNorm2d)):
            result: Tensor = super().forward(x)
            return result
        scale, shift = self._affine_of(self.norm)
        weight = self.weight * scale
        x = F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def _affine_of(self, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
        """(C_out, 1, 1, 1) scale and (C_out,) shift, computed when the norm has changed."""
        if torch.compiler.is_compiling():
            return _affine(norm)
        buffers = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        state = [(buffer, buffer._version, buffer.data_ptr()) for buffer in buffers]
        if self._kept is None or any(
            old[0] is not new[0] or old[1:] != new[1:]
            for old, new in zip(self._kept[0], state, strict=True)
        ):
            self._kept = (state, _affine(norm))
        return self._kept[1]


def _affine(norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale[:, None, None, None], norm.bias - norm.running_mean * scale


def fold_frozen_norms(backbone: nn.Module) -> None:
    """Make Detectron2's convolutions with a frozen batch norm :class:`FoldedConv2d`, in place."""
    for module in backbone.modules():
        has_norm = type(getattr(module, "norm", None)) is FrozenBatchNorm2d
        if has_norm and type(module) is Conv2d and getattr(module, "bias", None) is None:
            setattr(module, "__class__", FoldedConv2d)  # noqa: B010, parameters and hooks stay


# --- activation checkpointing --------------------------------------------------------------------


class CheckpointedStage(nn.Sequential):
    """A stage with activation checkpointing: training keeps the input of each block only."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W'), through the blocks in order."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def checkpoint_stages(backbone: nn.Module) -> None:
    """Replace all stages of a ResNet by :class:`CheckpointedStage`; parameter names stay.

    Raises:
        UserError: another backbone, or one with norms that would update their statistics twice.
    """
    if not isinstance(backbone, ResNet):
        raise UserError(
            f"{_KEY} is for the ResNets of Detectron2 and of this project, "
            f"not for {type(backbone).__name__}"
        )
    for index, (name, stage) in enumerate(zip(backbone.stage_names, backbone.stages, strict=True)):
        if any(getattr(m, "track_running_stats", False) for m in stage.modules()):
            raise UserError(
                f"{_KEY} needs norms without running statistics, which {name} has and would "
                "update twice: set NORM of MODEL.RESNETS or MODEL.SMALL_RESNET to FrozenBN or GN"
            )
        checkpointed = CheckpointedStage(*stage)
        setattr(backbone, name, checkpointed)
        backbone.stages[index] = checkpointed
