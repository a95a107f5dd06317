"""Optimizer, gradient clipping and learning-rate schedule of a config."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.solver.lr_scheduler import LRMultiplier
from torch import Tensor, nn

from ..errors import UserError

OPTIMIZERS = ("ADAMW", "SGD")
CLIP_TYPES = ("full_model", "norm", "value")
LR_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")

# Embeddings of timm's vision Transformers, Swin included, and a bias of torch's attention. By
# default, Detectron2 gives both the decay of weights.
EMBEDDINGS = ("pos_embed", "cls_token", "reg_token", "relative_position_bias_table")
ATTENTION_BIAS = "in_proj_bias"

# Modules of Deformable-DETR with a lower learning rate, as published.
DEFORMABLE_PARTS = ("sampling_offsets", "reference_points")

# Evaluations and checkpoints of a training whose length is given in epochs.
EVALUATIONS = 8

GradientClipper = Callable[[Sequence[nn.Parameter]], Tensor]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer over the trainable parameters of a model.

    The learning rate is ``SOLVER.BASE_LR`` times a factor that depends on the parameter's name:

    * ``MODEL.BATCHFORMER.LR_FACTOR`` for names with "batchformer";
    * ``MODEL.DEFORMABLE.LR_FACTOR`` for sampling offsets and reference points;
    * ``SOLVER.BACKBONE_MULTIPLIER`` for names with "backbone".

    The weight decay is ``SOLVER.WEIGHT_DECAY``. ``SOLVER.WEIGHT_DECAY_NORM`` replaces it for
    normalisation layers, ``WEIGHT_DECAY_BIAS`` for biases, and ``WEIGHT_DECAY_EMBED`` for embedding
    layers and the embeddings of vision Transformers, unless they are None. DETR has one decay for
    all parameters.

    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` "value" and "norm" clip each parameter inside the step, as
    in Detectron2; for "full_model" see `build_gradient_clipper`.

    Raises:
        UserError: an unknown ``SOLVER.OPTIMIZER`` or ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE``, a
            ``SOLVER.BIAS_LR_FACTOR`` other than 1, or nothing to train.
    """
    groups = _parameter_groups(cfg, model)
    if cfg.SOLVER.OPTIMIZER == "ADAMW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups,
            lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            fused=_has_fused_kernel(model) or None,
        )
    elif cfg.SOLVER.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(
            groups,
            lr=cfg.SOLVER.BASE_LR,
            momentum=cfg.SOLVER.MOMENTUM,
            nesterov=cfg.SOLVER.NESTEROV,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            foreach=True,
        )
    else:
        raise UserError(
            f"unknown SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER!r}; choose one of "
            f"{', '.join(OPTIMIZERS)}"
        )
    if _clip_type(cfg) in ("value", "norm"):
        optimizer = maybe_add_gradient_clipping(cfg, optimizer)
    return optimizer


# What an optimizer stores for a parameter; tensors of the parameter's shape except "step".
_STATE = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.SGD: {"momentum_buffer"},
}


def resumed_state(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    saved: Mapping[str, Any],
    saved_names: Sequence[str],
) -> dict[str, Any]:
    """Combine the saved state of the parameters with the settings of this optimizer.

    Parameters are found by name, since other learning rates or weight decays group them otherwise.

    Args:
        optimizer: of this config, before the first step.
        names: of its parameters, in their order in its groups.
        saved: the ``state_dict()`` of the optimizer of the checkpoint.
        saved_names: of its parameters.

    Returns:
        What ``optimizer.load_state_dict`` takes.

    Raises:
        UserError: another kind of optimizer, other trained parameters, or an incomplete state.
    """
    different = sorted(set(names) ^ set(saved_names))
    if different:
        raise UserError(
            f"cannot resume: only one of checkpoint and config trains {different[0]} "
            f"({len(different)} such parameters); see MODEL.*FREEZE*, or start another OUTPUT_DIR "
            "with MODEL.WEIGHTS"
        )
    of_name = {name: saved["state"].get(index) for index, name in enumerate(saved_names)}
    own = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = next(keys for kind, keys in _STATE.items() if isinstance(optimizer, kind))
    for index, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        state = of_name[name]
        if state is None:  # it has not had a gradient yet
            continue
        shapes = [torch.as_tensor(v).shape for k, v in state.items() if k != "step"]
        if set(state) != expected or any(shape != parameter.shape for shape in shapes):
            raise UserError(
                f"cannot resume: the checkpoint has the state of another optimizer for {name}, or "
                "a damaged one; resume with the SOLVER.OPTIMIZER of the run, or start another "
                "OUTPUT_DIR with MODEL.WEIGHTS"
            )
        own["state"][index] = state
    if not own["state"] and expected is _STATE[torch.optim.AdamW]:
        raise UserError(
            "cannot resume: the checkpoint has no state of AdamW; start another OUTPUT_DIR with "
            "MODEL.WEIGHTS"
        )
    return own


def build_gradient_clipper(cfg: CfgNode) -> GradientClipper:
    """Return a function to call on all parameters after backward and AMP's unscaling.

    It returns the total gradient norm before clipping as a 0-d tensor on the device of the
    gradients, without synchronising. With ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` "full_model", it
    scales all gradients in place so that the norm is at most ``CLIP_VALUE``.

    Raises:
        UserError: an unknown ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE``.
    """
    norm_type = float(cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE)
    max_norm = float(cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE)

    def clip(parameters: Sequence[nn.Parameter]) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    def measure(parameters: Sequence[nn.Parameter]) -> Tensor:
        norms = [
            torch.linalg.vector_norm(p.grad, norm_type) for p in parameters if p.grad is not None
        ]
        return torch.linalg.vector_norm(torch.stack(norms), norm_type)

    return clip if _clip_type(cfg) == "full_model" else measure


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """Build Detectron2's learning-rate schedule, one step per iteration.

    Raises:
        UserError: an unknown ``SOLVER.LR_SCHEDULER_NAME`` or a ``SOLVER.MAX_ITER`` below 1.
    """
    if cfg.SOLVER.LR_SCHEDULER_NAME not in LR_SCHEDULERS:
        raise UserError(
            f"unknown SOLVER.LR_SCHEDULER_NAME {cfg.SOLVER.LR_SCHEDULER_NAME!r}; choose one of "
            f"{', '.join(LR_SCHEDULERS)}"
        )
    if cfg.SOLVER.MAX_ITER < 1:
        raise UserError(f"SOLVER.MAX_ITER must be at least 1, not {cfg.SOLVER.MAX_ITER}")
    return build_detectron2_lr_scheduler(cfg, optimizer)


def apply_epochs(cfg: CfgNode, num_images: int, fixed: Container[str]) -> str:
    """Replace ``SOLVER.EPOCHS`` by the schedule that follows from it, by the rule in `config`.

    Args:
        cfg: an open config with ``SOLVER.EPOCHS`` of at least 1, changed in place.
        num_images: number of training images.
        fixed: keys that keep their value.

    Returns:
        A line for the log.

    Raises:
        UserError: ``SOLVER.IMS_PER_BATCH`` or ``SOLVER.MAX_ITER`` is below 1.
    """
    solver = cfg.SOLVER
    for key in ("IMS_PER_BATCH", "MAX_ITER"):
        if solver[key] < 1:
            raise UserError(f"SOLVER.{key} must be at least 1, not {solver[key]}")
    images = solver.IMS_PER_BATCH * solver.GRADIENT_ACCUMULATION
    steps = solver.MAX_ITER
    if "SOLVER.MAX_ITER" not in fixed:
        steps = math.ceil(solver.EPOCHS * num_images / images)
    period = math.ceil(steps / EVALUATIONS)
    schedule = {
        "SOLVER.MAX_ITER": steps,
        "SOLVER.STEPS": tuple(round(step * steps / solver.MAX_ITER) for step in solver.STEPS),
        "SOLVER.WARMUP_ITERS": min(solver.WARMUP_ITERS, steps // 10),
        "SOLVER.CHECKPOINT_PERIOD": period,
        "TEST.EVAL_PERIOD": period,
    }
    chosen = {key: value for key, value in schedule.items() if key not in fixed}
    line = f"SOLVER.EPOCHS {solver.EPOCHS} of {num_images} images, {images} per iteration: "
    line += ", ".join(f"{key} {value}" for key, value in chosen.items())
    cfg.merge_from_list([part for pair in chosen.items() for part in pair])
    solver.EPOCHS = 0
    return line


def _parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    if cfg.SOLVER.BIAS_LR_FACTOR != 1.0:
        # In Detectron2 it would override the factors of backbone and block.
        raise UserError(f"SOLVER.BIAS_LR_FACTOR must be 1.0, not {cfg.SOLVER.BIAS_LR_FACTOR}")

    def lr_factor(name: str) -> float:
        if "batchformer" in name:
            return cfg.MODEL.BATCHFORMER.LR_FACTOR
        if any(part in DEFORMABLE_PARTS for part in name.split(".")):
            return cfg.MODEL.DEFORMABLE.LR_FACTOR
        return cfg.SOLVER.BACKBONE_MULTIPLIER if "backbone" in name else 1.0

    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        lr_factor_func=lr_factor,
        overrides=_weight_decays_by_name(cfg),
    )
    if cfg.SOLVER.WEIGHT_DECAY_EMBED is not None:
        groups = _with_decay_of_embeddings(groups, model, cfg.SOLVER.WEIGHT_DECAY_EMBED)
    if not groups:
        raise UserError("no parameter of the model is trainable; see MODEL.*FREEZE* in the config")
    return groups


def _with_decay_of_embeddings(
    groups: list[dict[str, Any]], model: nn.Module, decay: float
) -> list[dict[str, Any]]:
    """Move the weights of embedding layers to groups of their own, with another weight decay."""
    layers = (module for module in model.modules() if isinstance(module, nn.Embedding))
    embeddings = {id(layer.weight) for layer in layers}
    separated = []
    for group in groups:
        theirs = [p for p in group["params"] if id(p) in embeddings]
        others = [p for p in group["params"] if id(p) not in embeddings]
        separated += [{**group, "params": others}] if others else []
        separated += [{**group, "params": theirs, "weight_decay": decay}] if theirs else []
    return separated


def _weight_decays_by_name(cfg: CfgNode) -> dict[str, dict[str, float]]:
    """Weight decay of embeddings and biases that Detectron2 does not recognise."""
    embed, bias = cfg.SOLVER.WEIGHT_DECAY_EMBED, cfg.SOLVER.WEIGHT_DECAY_BIAS
    decays = {} if embed is None else dict.fromkeys(EMBEDDINGS, embed)
    if bias is not None:
        decays[ATTENTION_BIAS] = bias
    return {name: {"weight_decay": decay} for name, decay in decays.items()}


def _clip_type(cfg: CfgNode) -> str | None:
    """Return the checked clipping type; None if clipping is off."""
    if not cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        return None
    clip_type = cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE
    if clip_type not in CLIP_TYPES:
        raise UserError(
            f"unknown SOLVER.CLIP_GRADIENTS.CLIP_TYPE {clip_type!r}; choose one of "
            f"{', '.join(CLIP_TYPES)}"
        )
    return clip_type


def _has_fused_kernel(model: nn.Module) -> bool:
    """Whether PyTorch's fused kernel supports all parameters; otherwise PyTorch chooses another."""
    parameters = model.parameters()
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
