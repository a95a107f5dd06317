"""Residual networks that compute their blocks again in the backward pass."""

import torch
from detectron2.modeling import ResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import UserError

_KEY = 'MODEL.ACTIVATION_CHECKPOINTING "backbone"'


class RecomputedStage(nn.Sequential):
    """A stage of which training keeps the input of each block alone."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W'), as the blocks do one after the other."""
        recompute = self.training and torch.is_grad_enabled()
        for block in self:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x


def recompute_stages(backbone: nn.Module) -> None:
    """Let all stages of a residual network be :class:`RecomputedStage`; no name changes.

    Raises:
        UserError: another backbone, or one with norms that would count each batch twice.
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
        recomputed = RecomputedStage(*stage)
        setattr(backbone, name, recomputed)
        backbone.stages[index] = recomputed
