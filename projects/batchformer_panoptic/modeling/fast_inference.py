"""Faster model copies for evaluation (``TEST.FAST``): conv-bn fusion, channels-last, bfloat16."""

import copy
import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..errors import UserError
from .backbone import FoldedConv2d
from .compiled import check_compiler, check_key, compile_regions
from .precision import cast_weights

logger = logging.getLogger(__name__)

# Exact types: other subclasses may transform their weights before the convolution.
_CONVOLUTIONS = (nn.Conv2d, Conv2d, FoldedConv2d)
# oneDNN's block of input channels; see `breaks_channels_last`.
_BLOCK = 16


def model_for_evaluation(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Return the model itself or, with ``TEST.FAST.ENABLED``, a faster copy.

    Raises:
        UserError: see :func:`check_fast`.
    """
    check_fast(cfg)
    node = cfg.TEST.FAST
    if not node.ENABLED:
        return model
    return prepare_for_inference(model, compile=node.COMPILE, bfloat16=node.BFLOAT16)


def check_fast(cfg: CfgNode) -> None:
    """Raise UserError for settings of ``TEST.FAST`` without an effect, or without a compiler."""
    node = cfg.TEST.FAST
    for key in ("COMPILE", "BFLOAT16"):
        if node[key] and not node.ENABLED:
            raise UserError(f"TEST.FAST.{key} is on, TEST.FAST.ENABLED is not: set it to True")
    if node.COMPILE:
        check_key("TEST.FAST.COMPILE", cfg.MODEL.DEVICE)


# Copies that are made in inference mode could never be part of an autograd graph.
@torch.inference_mode(False)
@torch.no_grad()
def prepare_for_inference(
    model: nn.Module, *, compile: bool = False, bfloat16: bool = False
) -> nn.Module:
    """A faster copy of a trained model, with the same predictions up to rounding.

    Batch norms of the backbone are fused into its convolutions, and weights and feature maps are
    channels-last. The copy is in evaluation mode and cannot be trained; later changes of the
    model's weights do not reach it.

    Args:
        model: a `PanopticDETR` or another model of this package; it is not changed.
        compile: compile backbone, transformer and mask head with ``torch.compile``, see
            `compile_regions`. The first images take long, others of any size do not.
        bfloat16: run convolutions, matrix products and attention in bfloat16, in which the copy
            keeps their weights. Scores, boxes, the softmax of the mask head and all post-processing
            stay in float32.

    Returns:
        A model with the same call signature.

    Raises:
        UserError: ``compile`` without a working compiler.
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    backbone = getattr(fast, "backbone", None)
    if isinstance(backbone, Backbone):
        backbone = fuse_conv_bn(backbone, _example(fast, backbone))
        fast.backbone = backbone
    if not breaks_channels_last(fast):
        fast = fast.to(memory_format=torch.channels_last)
    if bfloat16:
        # Autocast would cast weights without gradients anew in every call.
        for *_, weight in cast_weights(fast):
            weight.data = weight.data.bfloat16()
    if compile:
        check_compiler(_device(fast))
        compile_regions(fast)
    return InBFloat16(fast) if bfloat16 else fast


class InBFloat16(nn.Module):
    """Calls a model under autocast to bfloat16.

    Args:
        model: any model; parts that need float32 disable autocast themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        """Call the model."""
        with torch.autocast(_device(self).type, dtype=torch.bfloat16):
            return self.model(*args)


# --- conv-bn fusion ------------------------------------------------------------------------------


def fuse_conv_bn(network: nn.Module, example: Tensor) -> nn.Module:
    """A copy of a network with batch norms fused into the convolutions before them.

    A norm follows a convolution if a convolution of Detectron2 holds it as ``norm``, or if it is
    registered directly after a convolution of its width in the same parent module. The second rule
    takes the order of registration for the order of execution. Hence the outputs for an example are
    compared, and if they differ the network itself is returned, with a warning.

    Args:
        network: in evaluation mode; returns a dict or a list of tensors.
        example: an input of any size that the network accepts.
    """
    fused = copy.deepcopy(network)
    count = _fuse_in_order(fused)
    with torch.no_grad():
        same = _are_close(_tensors(fused(example)), _tensors(network(example)))
    if not same:
        logger.warning(
            f"conv-bn fusion changes the outputs of {type(network).__name__}, whose modules do not "
            "run in the order of their registration: its batch norms are not fused"
        )
        return network
    logger.info(f"fast inference: {count} batch norms are fused into convolutions")
    return fused


def _fuse_in_order(network: nn.Module) -> int:
    """Fuse in place; return the number of fused norms."""
    count = 0
    for parent in list(network.modules()):
        # A convolution of Detectron2 is the parent of its norm.
        previous = parent if type(parent) in _CONVOLUTIONS else None
        for name, child in list(parent.named_children()):
            if isinstance(previous, nn.Conv2d) and _is_fixed_norm(child, previous.out_channels):
                _fuse(previous, child)
                # timm's norms hold the activation after them.
                replacement = getattr(child, "act", nn.Identity())
                setattr(parent, name, None if parent is previous else replacement)
                count += 1
            previous = child if type(child) in _CONVOLUTIONS else None
    return count


def _is_fixed_norm(module: nn.Module, channels: int) -> bool:
    """Whether a module of any library is a batch norm that uses recorded statistics."""
    mean = getattr(module, "running_mean", None)
    return isinstance(mean, Tensor) and len(mean) == channels and not module.training


def _fuse(conv: nn.Conv2d, norm: Any) -> None:
    # In double precision, so that only the result is rounded.
    values = [conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias]
    weight, bias, mean, variance, scale, shift = (
        None if value is None else value.detach().double() for value in values
    )
    assert weight is not None
    assert mean is not None
    assert variance is not None
    weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
    conv.weight = nn.Parameter(weight.to(conv.weight), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=False)


def _tensors(outputs: Any) -> list[Tensor]:
    return list(outputs.values()) if isinstance(outputs, dict) else list(outputs)


def _are_close(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether all maps are equal, up to the rounding of a deep network."""
    return all(
        bool(
            (ours - wanted).abs().max() <= wanted.abs().max() * torch.finfo(wanted.dtype).eps ** 0.5
        )
        for ours, wanted in zip(outputs, expected, strict=True)
    )


def _example(model: nn.Module, backbone: Backbone) -> Tensor:
    """An image with a ramp of pixel values, of a size that every backbone accepts."""
    mean = model.get_buffer("pixel_mean")
    side = max(backbone.size_divisibility, 32)
    values = torch.linspace(-1, 1, mean.numel() * 6 * side**2, device=mean.device)
    return values.view(1, mean.numel(), 2 * side, 3 * side).to(next(model.parameters()).dtype)


# --- memory format -------------------------------------------------------------------------------


def breaks_channels_last(network: nn.Module) -> bool:
    """Whether channels-last is unsafe for a network: on a CPU, with certain convolutions.

    For strided 1 x 1 convolutions of fewer than 16 input channels per group, oneDNN 3.x writes
    beyond its buffer when gradients of channels-last tensors are computed (uxlfoundation/oneDNN
    issue 6035), and the process may crash.
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    return any(
        conv.weight.device.type == "cpu"
        and set(conv.kernel_size) == {1}
        and max(conv.stride) > 1
        and conv.in_channels // conv.groups < _BLOCK
        for conv in convolutions
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
