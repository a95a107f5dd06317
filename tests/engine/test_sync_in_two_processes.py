"""Batch attention over two processes: losses and gradients are those of one with all images."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchformer_panoptic.engine.run import launch_processes
from batchformer_panoptic.modeling.set_prediction import point_losses
from helpers.tiny_classifier import labelled_images, tiny_classifier
from helpers.tiny_model import MASK2FORMER, random_inputs, tiny_model, total

# The padded sizes of the processes differ, and so do the numbers of objects.
SIZES = [(48, 64), (64, 56), (40, 72), (88, 40)]
COUNTS = (2, 0, 8, 3)  # of six queries

BLOCK: dict[str, Any] = {
    "MODEL__BATCHFORMER__ENABLED": True,
    "MODEL__BATCHFORMER__SYNC": True,
    "MODEL__DETR__SYNC_CLASS_LOSS": True,
    "MODEL__SMALL_RESNET__NORM": "FrozenBN",
}
BOXES = {**BLOCK, "MODEL__MASK_ON": False}
FOCAL = {**BLOCK, "MODEL__DETR__SCORING": "focal", "MODEL__DETR__SYNC_CLASS_LOSS": False}


class Case(NamedTuple):
    """Settings of a model, images of each process, and objects of each image."""

    overrides: dict[str, Any]
    images: tuple[int, int] = (2, 2)
    counts: tuple[int, ...] = COUNTS

    def model(self) -> nn.Module:
        """The tiny model with these settings, in training mode."""
        build = (
            tiny_classifier if "MODEL__CLASSIFIER__NUM_CLASSES" in self.overrides else tiny_model
        )
        return build(**self.overrides).train()

    def inputs(self) -> list[dict[str, Any]]:
        """All images."""
        count = sum(self.images)
        if "MODEL__CLASSIFIER__NUM_CLASSES" in self.overrides:
            return labelled_images(count)
        return random_inputs(SIZES[:count], self.counts[:count])


CASES = {
    "detr": Case({**BLOCK, "MODEL__SEMANTIC_AUX__ENABLED": True}),
    "conditional": Case(
        {
            **FOCAL,
            "MODEL__DETR__TRANSFORMER_NAME": "conditional",
            "MODEL__BATCHFORMER__MASK_PADDING": True,
        }
    ),
    "smca": Case(
        {
            **BLOCK,
            "MODEL__DETR__TRANSFORMER_NAME": "smca",
            "MODEL__BATCHFORMER__INSERT_LAYERS": [0, 1],
        }
    ),
    "smca_multiscale": Case(
        {
            **FOCAL,
            "MODEL__DETR__TRANSFORMER_NAME": "smca_multiscale",
            "MODEL__SMALL_RESNET__STAGE_STRIDES": [1, 2, 2, 2],
        }
    ),
    "two-stage deformable with activation checkpointing": Case(
        {
            **FOCAL,
            "MODEL__DETR__TRANSFORMER_NAME": "deformable",
            "MODEL__ACTIVATION_CHECKPOINTING": ["backbone", "encoder", "decoder", "mask_head"],
            "MODEL__SMALL_RESNET__NORM": "GN",
            "MODEL__SMALL_RESNET__STEM_CHANNELS": 32,
            "MODEL__SMALL_RESNET__STAGE_CHANNELS": [32, 64, 96, 128],
            "MODEL__DEFORMABLE__BOX_REFINE": True,
            "MODEL__DEFORMABLE__TWO_STAGE": True,
        }
    ),
    "mask2former": Case(
        {
            **BLOCK,
            **MASK2FORMER,
            "MODEL__BATCHFORMER__SHARED": True,
            "MODEL__BATCHFORMER__INSERT_LAYERS": [0, 1],
        }
    ),
    # Both processes have as many groups of pilot queries as one that has all images.
    "mask-piloted": Case(
        {
            **BLOCK,
            **MASK2FORMER,
            "MODEL__MASK2FORMER__PILOT__ENABLED": True,
            "MODEL__MASK2FORMER__PILOT__NUM_QUERIES": 6,
            "MODEL__MASK2FORMER__PILOT__LABEL_NOISE": 0.0,
            "MODEL__MASK2FORMER__PILOT__MASK_NOISE": 0.0,
        },
        counts=(3, 0, 2, 3),
    ),
    "classifier": Case(
        {
            "MODEL__CLASSIFIER__NUM_CLASSES": 5,
            "MODEL__BATCHFORMER__ENABLED": True,
            "MODEL__BATCHFORMER__SYNC": True,
        }
    ),
    "boxes": Case(BOXES),
    "one image in each process": Case(BOXES, images=(1, 1)),
    "one image and three": Case(BOXES, images=(1, 3)),
}
# Not equal to one process; each differs from "boxes" by one key.
UNEQUAL = {
    "attention within the process": Case({**BOXES, "MODEL__BATCHFORMER__SYNC": False}),
    "class loss within the process": Case({**BOXES, "MODEL__DETR__SYNC_CLASS_LOSS": False}),
}


@contextmanager
def _fixed_points() -> Iterator[None]:
    """The same points for all masks: those that are drawn depend on the process."""
    points = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))

    def of_entries(shape: tuple[int, ...], device: torch.device) -> Tensor:
        return points.expand(*shape, 2)

    def of_masks(self: object, maps: Tensor) -> Tensor:
        return points.expand(len(maps), -1, -1)

    with (
        mock.patch.object(point_losses, "random_points", of_entries),
        mock.patch.object(point_losses.PointMaskLoss, "_points", of_masks),
    ):
        yield


class Step(NamedTuple):
    """Losses and gradients of a training step, by name."""

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]


def _step(model: nn.Module, inputs: list[dict[str, Any]]) -> Step:
    with _fixed_points():
        losses = model(inputs)
    total(losses).backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return Step(
        {name: loss.detach() for name, loss in losses.items()},
        {name: gradient for name, gradient in gradients.items() if gradient is not None},
    )


def _run(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = comm.get_rank()
    for name, case in (CASES | UNEQUAL).items():
        start = sum(case.images[:rank])
        inputs = case.inputs()[start : start + case.images[rank]]
        model = DistributedDataParallel(case.model(), broadcast_buffers=False)
        torch.save(tuple(_step(model, inputs)), folder / f"{name}_{rank}.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The steps of both processes."""
    folder = tmp_path_factory.mktemp("steps")
    launch_processes(_run, 2, args=(folder,))
    return folder


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest value of a tensor if that is above 0.1.

    Biases before a group norm have a gradient of 0, up to rounding of large terms.
    """
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - value).abs().max() / value.abs().max().clamp(min=0.1)).item()
        for name, value in expected.items()
    )


def _differences(folder: Path, name: str, case: Case) -> tuple[float, float]:
    """Differences of losses and of gradients between two processes and one."""
    first, second = (
        Step(*torch.load(folder / f"{name}_{rank}.pth", weights_only=True)) for rank in (0, 1)
    )
    for key, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[key]), key
    losses = {key: (value + second.losses[key]) / 2 for key, value in first.losses.items()}
    expected = _step(case.model(), case.inputs())
    return (
        _difference(losses, expected.losses),
        _difference(first.gradients, expected.gradients),
    )


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_a_step_of_two_processes_is_that_of_one(folder: Path, name: str) -> None:
    losses, gradients = _differences(folder, name, CASES[name])
    assert losses < 1e-6
    assert gradients < 1e-5


@pytest.mark.distributed
@pytest.mark.parametrize("name", UNEQUAL)
def test_without_either_key_it_is_another_step(folder: Path, name: str) -> None:
    losses, gradients = _differences(folder, name, UNEQUAL[name])
    assert losses > 1e-2
    assert gradients > 1e-2
