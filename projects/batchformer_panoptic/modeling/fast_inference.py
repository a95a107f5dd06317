"""A faster copy of a model for evaluation: the switch ``TEST.FAST``.

Batch norms with fixed statistics, folded into the convolutions before them.
"""

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..errors import UserError, one_line

# Subclasses may do something to their weights before they use them.
_CONVOLUTIONS = (nn.Conv2d, Conv2d)


def fold_own_norms(model: nn.Module) -> int:
    """Fold the norms that Detectron2's convolutions carry as ``norm``, in place.

    Args:
        model: in evaluation mode.

    Returns:
        How many norms are gone.
    """
    folded = 0
    for module in list(model.modules()):
        if isinstance(module, Conv2d) and _has_statistics(module.norm):
            _fold(module, module.norm)
            module.norm = None
            folded += 1
    return folded


def fold_following_norms(net: nn.Module, example: Tensor) -> int:
    """Fold every norm whose one input is a convolution that nothing else reads, in place.

    What follows what is seen on one run: the graph that autograd records knows the readers of
    every tensor. timm's norms keep their activation.

    Args:
        net: in evaluation mode.
        example: an input of any size that it takes.

    Returns:
        How many norms are gone.
    """
    pairs = list(_pairs(net, example))
    owners = {id(module): name for name, module in net.named_modules()}
    for conv, norm in pairs:
        _fold(conv, norm)
        parent, _, child = owners[id(norm)].rpartition(".")
        setattr(net.get_submodule(parent), child, getattr(norm, "act", nn.Identity()))
    return len(pairs)


def _has_statistics(module: Any) -> bool:
    """Whether it is a batch norm of whatever library, frozen or not, that uses its statistics."""
    known = isinstance(getattr(module, "running_mean", None), Tensor)
    return known and not module.training


def _fold(conv: nn.Conv2d, norm: Any) -> None:
    # In double precision, so that the one rounding is that of the result.
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


@torch.enable_grad()  # whoever calls
def _pairs(net: nn.Module, example: Tensor) -> Iterator[tuple[nn.Conv2d, nn.Module]]:
    """Convolutions and the norms that alone read their results, each called once."""
    calls: Counter[nn.Module] = Counter()
    conv_of: dict[Any, nn.Conv2d] = {}
    reads: list[tuple[nn.Module, Any]] = []

    def after_conv(module: nn.Module, _: Any, result: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        calls[module] += 1
        conv_of[result.grad_fn] = module

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module] += 1
        reads.append((module, inputs[0].grad_fn))

    handles = []
    for module in net.modules():
        if type(module) in _CONVOLUTIONS:
            handles.append(module.register_forward_hook(after_conv))
        elif _has_statistics(module):
            handles.append(module.register_forward_pre_hook(before_norm))
    try:
        readers = _readers(net(example.detach().clone().requires_grad_()))
    finally:
        for handle in handles:
            handle.remove()
    for norm, source in reads:
        conv = conv_of.get(source)
        if conv is not None and calls[conv] == calls[norm] == readers[source] == 1:
            yield conv, norm


def _readers(results: Any) -> Counter[Any]:
    """How many operations read the result of each operation in the graph behind some tensors."""
    tensors = list(results.values()) if isinstance(results, dict) else list(results)
    counts: Counter[Any] = Counter(tensor.grad_fn for tensor in tensors)
    waiting = list(counts)
    seen = set(waiting)
    while waiting:
        for source, _ in waiting.pop().next_functions:
            if source is None:
                continue
            counts[source] += 1
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return counts


logger = logging.getLogger(__name__)


def model_for_evaluation(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model itself, or with ``TEST.FAST.ENABLED`` the copy that runs faster.

    Raises:
        UserError: see :func:`check_fast`.
    """
    check_fast(cfg)
    node = cfg.TEST.FAST
    if not node.ENABLED:
        return model
    return prepare_for_inference(model, compile=node.COMPILE, bfloat16=node.BFLOAT16)


def check_fast(cfg: CfgNode) -> None:
    """Raise UserError for settings of ``TEST.FAST`` without a meaning, or without a compiler."""
    node = cfg.TEST.FAST
    for key in ("COMPILE", "BFLOAT16"):
        if node[key] and not node.ENABLED:
            raise UserError(f"TEST.FAST.{key} is on, TEST.FAST.ENABLED is not: set it to True")
    if node.COMPILE:
        _check_compiler(torch.device(cfg.MODEL.DEVICE))


@torch.inference_mode(False)  # whoever calls: folding reads the graph that autograd records
def prepare_for_inference(
    model: nn.Module, *, compile: bool = False, bfloat16: bool = False
) -> nn.Module:
    """A copy of a trained model that predicts the same, up to rounding, in less time.

    Batch norms are folded into the convolutions before them, and maps of features lie in memory
    channels last. The copy is in evaluation mode and cannot be trained; it keeps the weights it was
    made from.

    Args:
        model: a `PanopticDETR` or another model of this package; left as it is.
        compile: compile the backbone (a model without one: all of it) with ``torch.compile``; every
            new image size costs a compilation, until sizes are left open.
        bfloat16: convolutions, matrix products and attention in bfloat16. Scores, boxes, the
            softmax of the mask head and all that follows the network stay float32.

    Returns:
        A model that is called like the given one.

    Raises:
        UserError: ``compile`` without a compiler that works.
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    backbone = getattr(fast, "backbone", None)
    folded = fold_own_norms(fast)
    if isinstance(backbone, Backbone):
        folded += fold_following_norms(backbone, _example(fast, backbone))
    fast = fast.to(memory_format=torch.channels_last)
    logger.info(f"fast inference: {folded} batch norms are folded into convolutions")
    if compile:
        _check_compiler(_device(fast))
        (backbone if isinstance(backbone, Backbone) else fast).compile()
    return InBFloat16(fast) if bfloat16 else fast


class InBFloat16(nn.Module):
    """Calls a model under autocast.

    Args:
        model: any; what it wants in float32 it says itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        """As the model does."""
        with torch.autocast(_device(self).type, dtype=torch.bfloat16):
            return self.model(*args)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _example(model: nn.Module, backbone: Backbone) -> torch.Tensor:
    """Pixels of no meaning in a size that any backbone takes."""
    mean = model.get_buffer("pixel_mean")
    side = max(backbone.size_divisibility, 32)
    values = torch.linspace(-1, 1, mean.numel() * 6 * side**2, device=mean.device)
    return values.view(1, mean.numel(), 2 * side, 3 * side).to(next(model.parameters()).dtype)


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many types: no compiler, a broken one, no headers, no Triton
        reason = one_line(error, first_line_only=True)
        raise UserError(
            f"TEST.FAST.COMPILE: torch.compile does not work here ({reason}); install a C++ "
            "compiler (for a GPU: Triton), or set it to False"
        ) from error
