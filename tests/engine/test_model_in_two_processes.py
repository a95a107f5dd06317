"""A whole tiny model in two processes: batches without objects, and costs that are not finite."""

from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchformer_panoptic.engine import PanopticTrainer
from batchformer_panoptic.engine.processes import launch_processes
from batchformer_panoptic.errors import NonFiniteError
from helpers.stand_in import stand_in_cfg
from helpers.tiny_model import random_inputs, tiny_model, total

CASES = [(masks, block) for masks in (False, True) for block in (False, True)]
# Objects of the two images of each process in each step.
STEPS = [[(0, 0), (2, 3)], [(0, 0), (0, 0)], [(2, 0), (0, 0)]]


def _train(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = comm.get_rank()
    for masks, block in CASES:
        model = tiny_model(MODEL__MASK_ON=masks, MODEL__BATCHFORMER__ENABLED=block).train()
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for counts in STEPS:
            optimizer.zero_grad()
            # A parameter outside the graph of one process makes the next step raise.
            losses = parallel(random_inputs([(48, 64), (64, 56)], list(counts[rank]), seed=rank))
            total(losses).backward()
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None, name
                    assert parameter.grad.isfinite().all(), name
            optimizer.step()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.save(weights, folder / f"{masks}_{block}_{rank}.pth")


@pytest.mark.distributed
def test_processes_without_objects_train_on(tmp_path: Path) -> None:
    launch_processes(_train, 2, args=(tmp_path,))
    for masks, block in CASES:
        first, second = (
            torch.load(tmp_path / f"{masks}_{block}_{rank}.pth", weights_only=True)
            for rank in (0, 1)
        )
        assert first.isfinite().all()
        assert torch.equal(first, second)


class TinyTrainer(PanopticTrainer):
    """A tiny model on noise; each process reads images of its own."""

    overrides: ClassVar[dict[str, bool]] = {}

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """See `tiny_model`."""
        return tiny_model(**cls.overrides)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, *, start_iter: int = 0) -> Any:
        """The same batch without end."""
        batch = random_inputs([(48, 64), (64, 56)], seed=comm.get_rank())
        for inputs in batch:
            inputs["file_name"] = f"{comm.get_rank()}_{inputs['file_name']}"
        return repeat(batch)


class SyncedTrainer(TinyTrainer):
    """The processes exchange tokens and normalisers."""

    overrides: ClassVar[dict[str, bool]] = {
        "MODEL__BATCHFORMER__ENABLED": True,
        "MODEL__BATCHFORMER__SYNC": True,
        "MODEL__DETR__SYNC_CLASS_LOSS": True,
    }


def _train_on_a_poisoned_image(folder: Path) -> None:
    torch.set_num_threads(1)
    for build in (TinyTrainer, SyncedTrainer):
        trainer = build(stand_in_cfg(folder / build.__name__))
        if comm.get_rank() == 1:
            with torch.no_grad():
                trainer.model.module.box_head.class_embed.weight.fill_(float("nan"))
        with pytest.raises(NonFiniteError) as error:
            trainer.train()
        (folder / f"{build.__name__}_{comm.get_rank()}.txt").write_text(str(error.value))


@pytest.mark.distributed
def test_a_matching_cost_that_is_not_finite_ends_all_processes(tmp_path: Path) -> None:
    """The matcher of one process raises; the other one must not wait for it."""
    launch_processes(_train_on_a_poisoned_image, 2, args=(tmp_path,))
    for name in ("TinyTrainer", "SyncedTrainer"):
        first, second = ((tmp_path / f"{name}_{rank}.txt").read_text() for rank in (0, 1))
        assert first == second
        assert "(terms: class)" in first
        assert "1_image_0.png" in first
        assert "0_image_0.png" not in first.replace("1_image_0.png", "")
