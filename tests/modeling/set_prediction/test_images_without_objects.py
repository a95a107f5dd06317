"""A process whose images have no object trains along with one whose images have some."""

from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from batchformer_panoptic.engine.processes import launch_processes
from helpers.tiny_model import random_inputs, tiny_model, total

COUNTS = [[3, 2], [0, 0]]  # objects of the images of each process


def _train(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = comm.get_rank()
    model = tiny_model(MODEL__BATCHFORMER__ENABLED=True).train()
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    for _ in range(2):  # parameters without a gradient show in the second step
        model.zero_grad()
        total(parallel(random_inputs([(48, 64), (40, 40)], COUNTS[rank]))).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save(gradients, folder / f"{rank}.pth")


@pytest.mark.distributed
def test_no_matched_query_in_one_process(tmp_path: Path) -> None:
    launch_processes(_train, 2, args=(tmp_path,))
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    for name, gradient in first.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, second[name]), name
    assert first["mask_head.predictor.weight"].abs().max() > 0
