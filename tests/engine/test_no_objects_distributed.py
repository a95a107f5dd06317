"""Batches without objects in two processes: every parameter gets a finite gradient."""

from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from batchformer_panoptic.engine.run import launch_processes
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
