"""A faster copy of a model for evaluation: the switch ``TEST.FAST``."""

import copy
import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from torch import nn

from ..errors import UserError
from .folding import fold_following_norms, fold_own_norms

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
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"TEST.FAST.COMPILE: torch.compile does not work here ({reason}); install a C++ "
            "compiler (for a GPU: Triton), or set it to False"
        ) from error
