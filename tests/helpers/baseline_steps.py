"""One training step of a recipe on two small images, with weights that depend on names single."""

import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import Tensor, nn

from batchformer_panoptic import add_batchformer_panoptic_config
from helpers.tiny_model import random_inputs

# Large enough for the 300 proposals of the two-stage recipes.
IMAGE_SIZES = ((96, 160), (88, 144))
OBJECTS = (3, 4)
_EMBEDDINGS = ("query_embed.weight", "level_embed")


class Step(NamedTuple):
    """Losses by name and the norm of each parameter's gradient, all float64."""

    losses: dict[str, float]
    gradient_norms: dict[str, float]

    @property
    def total_norm(self) -> float:
        """Norm of all gradients together."""
        return sum(norm**2 for norm in self.gradient_norms.values()) ** 0.5


def recipe(path: Path) -> CfgNode:
    """A recipe as a run has it that starts from random weights, with the classes of COCO."""
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        cfg.MODEL.CLASSIFIER.NUM_CLASSES = 10
    else:
        cfg.MODEL.DETR.NUM_CLASSES = 133 if "panoptic" in path.parts else 80
        cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(80))
    return cfg


def fresh_model(cfg: CfgNode, *, seed: int = 0) -> nn.Module:
    """A model as it is initialised, in training mode."""
    torch.manual_seed(seed)
    return build_model(cfg).train()


@torch.no_grad()
def set_weights_by_name(model: nn.Module) -> None:
    """Give parameters and statistics of norms random values that depend on their names single.

    The order in which a constructor draws random numbers then plays no part. Matrices keep the
    scale of their input, norms are near 1, biases near 0; a parameter of several names goes by the
    first of them in alphabetical order.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict(keep_vars=True)
    done: set[int] = set()
    for name, value in sorted(state.items()):
        of_norm = f"{name.rpartition('.')[0]}.running_mean" in state and value.is_floating_point()
        if id(value) in done or not (name in parameters or of_norm):
            continue
        done.add(id(value))
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        # Uniform, of variance 1: every processor makes the same numbers, which is not so of normal
        # ones.
        noise = (torch.rand(value.shape, generator=generator) - 0.5) * 12**0.5
        if name.endswith(_EMBEDDINGS):
            value.copy_(noise)
        elif value.dim() > 1:
            value.copy_(noise / value[0].numel() ** 0.5)
        elif name.endswith("running_var"):
            value.copy_(1 + 0.2 * noise)
        else:
            rare = name.endswith("class_embed.bias")  # classes that are rare, as after training
            value.copy_(0.1 * noise + name.endswith(".weight") - 4 * rare)


def training_step(model: nn.Module, num_classes: int) -> Step:
    """Forward and backward with dropout as the recipe has it, the seed being fixed."""
    inputs = random_inputs(IMAGE_SIZES, OBJECTS, num_classes=num_classes, descent=9)
    torch.manual_seed(0)
    losses = model(inputs)
    torch.stack(list(losses.values())).sum().backward()
    return Step(
        {name: loss.item() for name, loss in losses.items()},
        {
            name: p.grad.double().norm().item()
            for name, p in model.named_parameters()
            if p.grad is not None
        },
    )


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by each of their names."""
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def statistics(value: Tensor) -> list[float]:
    """Mean, standard deviation and largest absolute value, of float64 sums."""
    exact = value.double()
    return [exact.mean().item(), exact.std(correction=0).item(), exact.abs().max().item()]
