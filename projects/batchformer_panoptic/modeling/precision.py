"""Mixed precision: dtype of a device, weights that are cast together, TF32.

Which operations run in half precision is autocast's choice; matching, losses, box coordinates and
normalisation stay in float32.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..errors import UserError

AMP_DTYPES = ("", "bfloat16", "float16")

# Modules whose weights and biases autocast casts.
_CAST_MODULES = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
# As many as in a bucket of DistributedDataParallel (25 MiB), which sends the gradients of a group
# while those of earlier layers are computed.
_GROUP_NUMEL = 25 * 2**20 // 4


def amp_dtype(cfg: CfgNode) -> torch.dtype:
    """The dtype of mixed precision, ``SOLVER.AMP.DTYPE`` on ``MODEL.DEVICE``.

    Raises:
        UserError: an unknown name, or a dtype that the device does not have.
    """
    name, on_cpu = cfg.SOLVER.AMP.DTYPE, torch.device(cfg.MODEL.DEVICE).type == "cpu"
    if name not in AMP_DTYPES:
        raise UserError(f"SOLVER.AMP.DTYPE is {name!r}; known: {', '.join(map(repr, AMP_DTYPES))}")
    if name == "float16" and on_cpu:
        raise UserError("SOLVER.AMP.DTYPE float16 is for GPUs; on a CPU use bfloat16")
    # Without emulation: it is correct, but slower than float32.
    has_bfloat16 = on_cpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bfloat16" and not has_bfloat16:
        raise UserError("SOLVER.AMP.DTYPE is bfloat16, which this GPU does not have: use float16")
    return torch.bfloat16 if name == "bfloat16" or (not name and has_bfloat16) else torch.float16


def set_tf32(cfg: CfgNode) -> None:
    """Allow or forbid TF32 in convolutions and matrix products on GPUs, by ``SOLVER.TF32``."""
    torch.backends.cuda.matmul.allow_tf32 = cfg.SOLVER.TF32
    torch.backends.cudnn.allow_tf32 = cfg.SOLVER.TF32


def cast_weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters of a model that autocast casts to half precision, each with its module."""
    for module in model.modules():
        if isinstance(module, _CAST_MODULES):
            for name, parameter in module.named_parameters(recurse=False):
                yield module, name, parameter


class HalfWeights:
    """Half-precision copies of a model's weights, made by few operations for each training step.

    Autocast casts every weight and bias separately, and every gradient back: hundreds of small
    operations. The copies here have the same values, and the gradients reach the float32 weights.

    Args:
        model: may be wrapped for distributed training.
        dtype: of the copies.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module, name, parameter in cast_weights(model):
            self._places.setdefault(parameter, []).append((module, name))
        self._frozen = [parameter for parameter in self._places if not parameter.requires_grad]
        self._groups: list[list[nn.Parameter]] = []
        size = _GROUP_NUMEL
        for parameter in self._places:
            if parameter.requires_grad:
                if size >= _GROUP_NUMEL:
                    self._groups.append([])
                    size = 0
                self._groups[-1].append(parameter)
                size += parameter.numel()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the model new copies, for a forward pass and its backward pass.

        In the backward pass they serve activation checkpointing.
        """
        copies = dict(zip(self._frozen, _cast(self._frozen, self._dtype), strict=True))
        for group in self._groups:
            copies |= zip(group, _CastTogether.apply(self._dtype, *group), strict=True)
        try:
            self._assign(copies)
            yield
        finally:
            self._assign({parameter: parameter for parameter in self._places})

    def _assign(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        for parameter, places in self._places.items():
            for module, name in places:
                # As torch.func.functional_call does, which ends with the forward pass.
                module._parameters[name] = values[parameter]  # type: ignore[assignment]


class _CastTogether(torch.autograd.Function):
    """Casts tensors, and their gradients back, by one operation each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return tuple(_cast(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast([each for each in gradients if each is not None], ctx.dtype))
        return None, *(None if each is None else next(cast) for each in gradients)


@torch.no_grad()
def _cast(tensors: Any, dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies
