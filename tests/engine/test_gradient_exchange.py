"""How processes exchange gradients: the options of DistributedDataParallel change no weight."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchformer_panoptic.engine import trainer as where
from batchformer_panoptic.engine.processes import launch_processes
from batchformer_panoptic.errors import UserError
from helpers.stand_in import StandInTrainer, stand_in_cfg

COMPRESSED = "compressed"
CASES: dict[str, list[Any]] = {
    "block": [],
    "block that rests": ["MODEL.BATCHFORMER.EVERY", 2],
    "block without effect": ["MODEL.BATCHFORMER.ATTEND", "none"],
    "accumulated": ["SOLVER.GRADIENT_ACCUMULATION", 2],
    COMPRESSED: ["SOLVER.GRADIENT_COMPRESSION", "bfloat16"],
}


class SplitTrainer(StandInTrainer):
    """Each process reads batches of its own."""

    @classmethod
    def build_train_loader(cls, cfg: object, *, start_iter: int = 0) -> object:
        """Batches 100 * rank, 100 * rank + 1, ..."""
        return super().build_train_loader(cfg, start_iter=100 * comm.get_rank())


def _without_options(model: nn.Module, **_: Any) -> DistributedDataParallel:
    plain = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    plain.register_comm_hook = lambda *_: None  # type: ignore[method-assign]
    return plain


def _weights(trainer: StandInTrainer) -> Tensor:
    weights = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat(weights).clone()


def _train(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, opts in CASES.items():
        found = {}
        for way in ("plain", "options"):
            cfg = stand_in_cfg(folder / name / way, *opts)
            if way == "plain":
                with mock.patch.object(where, "DistributedDataParallel", _without_options):
                    trainer = SplitTrainer(cfg)
            else:
                trainer = SplitTrainer(cfg)
                assert trainer.model.gradient_as_bucket_view
            found["before"] = _weights(trainer)
            trainer.train()
            found[way] = _weights(trainer)
        torch.save(found, folder / f"{name}_{comm.get_rank()}.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exchange")
    launch_processes(_train, 2, args=(folder,))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_without_the_options(folder: Path, name: str) -> None:
    """Equal to the last bit, and for compressed gradients within 1 percent of their change."""
    first, second = (
        torch.load(folder / f"{name}_{rank}.pth", weights_only=True) for rank in (0, 1)
    )
    assert torch.equal(first["options"], second["options"])
    difference = (first["options"] - first["plain"]).norm()
    change = (first["plain"] - first["before"]).norm()
    assert change > 0
    if name == COMPRESSED:
        assert 0 < difference < 0.01 * change
    else:
        assert difference == 0


def test_an_unknown_compression_is_refused_before_anything_else(tmp_path: Path) -> None:
    cfg = stand_in_cfg(tmp_path, "SOLVER.GRADIENT_COMPRESSION", "zip")
    with pytest.raises(UserError, match=r"GRADIENT_COMPRESSION is 'zip'; known: none, bfloat16"):
        StandInTrainer(cfg)
