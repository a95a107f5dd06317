"""Several batches for one step of the optimizer."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from batchformer_panoptic.engine.processes import launch_processes
from batchformer_panoptic.engine.train_loop import combine_streams, seed_iteration
from helpers.stand_in import (
    StandInTrainer,
    assert_same_state,
    stand_in_batches,
    stand_in_cfg,
    trained,
)

ACCUMULATE = ["SOLVER.GRADIENT_ACCUMULATION", 3]


def test_a_step_follows_the_mean_gradient_of_its_batches(tmp_path: Path) -> None:
    cfg = stand_in_cfg(tmp_path, *ACCUMULATE, "SOLVER.MAX_ITER", 1)
    by_hand = StandInTrainer(cfg)._unwrapped
    batches = stand_in_batches(cfg.SOLVER.IMS_PER_BATCH, 0)
    totals = []
    for number in range(3):
        seed_iteration(cfg.SEED, number, 0)
        losses = by_hand(next(batches))
        totals.append(combine_streams(losses, {"original": 1.0, "batchformer": 1.0}).total)
    torch.stack(totals).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in by_hand.parameters()])

    trainer = StandInTrainer(cfg)
    found: list[torch.Tensor] = []
    clip = trainer._trainer._clip

    def keep(parameters: list[torch.Tensor]) -> torch.Tensor:
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
        return clip(parameters)

    trainer._trainer._clip = keep
    trainer.resume_or_load(resume=False)
    trainer.train()
    torch.testing.assert_close(found, [expected])
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    record = next(r for r in map(json.loads, lines) if "total_loss" in r)
    assert record["total_loss"] == pytest.approx(torch.stack(totals).mean().item(), rel=1e-5)


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    opts = [*ACCUMULATE, "SOLVER.CHECKPOINT_PERIOD", 3]
    through = trained(stand_in_cfg(tmp_path / "through", *opts))
    interrupted = StandInTrainer(stand_in_cfg(tmp_path / "stopped", *opts))
    interrupted.resume_or_load(resume=False)
    interrupted.max_iter = 3
    interrupted.train()
    resumed = trained(stand_in_cfg(tmp_path / "stopped", *opts), resume=True)
    assert_same_state(resumed.model.state_dict(), through.model.state_dict())
    plain = trained(stand_in_cfg(tmp_path / "plain"))
    assert not torch.equal(plain.model.head.weight, through.model.head.weight)


def _count_exchanges(output_dir: Path) -> None:
    torch.set_num_threads(1)
    trainer = StandInTrainer(stand_in_cfg(output_dir, *ACCUMULATE, "SOLVER.MAX_ITER", 2))
    model = trainer.model
    assert isinstance(model, DistributedDataParallel)
    exchanges = []

    def count(
        state: object, bucket: torch.distributed.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        exchanges.append(bucket.buffer().numel())
        future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / 2)

    model.register_comm_hook(None, count)
    trainer.resume_or_load(resume=False)
    trainer.train()
    rank = torch.distributed.get_rank()
    torch.save((len(exchanges), model.module.state_dict()), output_dir / f"{rank}.pth")


@pytest.mark.distributed
def test_processes_exchange_gradients_once_a_step(tmp_path: Path) -> None:
    launch_processes(_count_exchanges, 2, args=(tmp_path,))
    (first, state), (second, other) = (
        torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1)
    )
    assert first == second == 2  # one bucket, two steps
    parameters = [name for name in state if "running" not in name and "num_batches" not in name]
    assert_same_state({n: state[n] for n in parameters}, {n: other[n] for n in parameters})
