"""``torch.compile`` for the parts of a model that take most of the time (``SOLVER.COMPILE``)."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.modeling import Backbone
from torch import nn

from ..batchformer import BatchFormerV2
from ..errors import UserError, one_line
from .heads.mask import ImagePartNorm
from .image_classifier import HookedVisionTransformer
from .transformer.layers import CheckpointedLayer

# PyTorch runs a function uncompiled once it has this many variants of it; the usual limit is 8. The
# variants of a layer: training or evaluation, one stream or two, padded images or none, square maps
# or others, memory formats.
_VARIANTS = 64


def compile_regions(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile parts of a model in place, for all image sizes.

    The regions are the backbone (of a vision Transformer each block), each layer of encoder and
    decoder, the blocks of BatchFormerV2, and the norms of the mask head with what surrounds them.
    Sizes are dynamic, so that new image sizes need no new compilation. Everything between the
    regions runs as usual. The keys of the state dict stay, and copies of the model are uncompiled.

    Args:
        model: a `PanopticDETR`, an `ImageClassifier` or another model of this package.
        backend: of ``torch.compile``.
    """
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, _VARIANTS)
    for region in _regions(model):
        region.compile(backend=backend, dynamic=True)


def _regions(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, Backbone | CheckpointedLayer | BatchFormerV2 | ImagePartNorm):
            yield module
        elif isinstance(module, HookedVisionTransformer):
            yield from module.model.blocks


def check_key(key: str, device: str) -> None:
    """Raise UserError, which names a config key, without a working compiler for a device."""
    try:
        check_compiler(torch.device(device))
    except UserError as error:
        raise UserError(f"{key}: {error}, or set it to False") from error


def check_compiler(device: torch.device) -> None:
    """Raise UserError if ``torch.compile`` has no working compiler for a device."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many types: no compiler, a broken one, no headers, no Triton
        reason = one_line(error, first_line_only=True)
        raise UserError(
            f"torch.compile does not work here ({reason}); install a C++ compiler (for a GPU: "
            "Triton)"
        ) from error
