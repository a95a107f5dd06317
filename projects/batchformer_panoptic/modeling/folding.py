"""Batch norms with fixed statistics, folded into the convolutions before them."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

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
