"""A resumed run equals an uninterrupted one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from batchformer_panoptic.errors import UserError
from helpers.stand_in import StandInTrainer, assert_same_state, stand_in_cfg, trained


def _state(trainer: StandInTrainer) -> dict[str, Any]:
    state = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    if trainer.ema is not None:
        state |= {f"ema.{k}": v for k, v in trainer.ema.averaged_state_dict().items()}
    for index, values in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
    return state


@pytest.mark.parametrize(("ema_decay", "every"), [(0.0, 1), (0.9, 1), (0.0, 2)])
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, ema_decay: float, every: int) -> None:
    opts = ["SOLVER.EMA_DECAY", ema_decay, "SOLVER.CHECKPOINT_PERIOD", 3]
    opts += ["MODEL.BATCHFORMER.EVERY", every]
    through = trained(stand_in_cfg(tmp_path / "through", *opts))

    interrupted = StandInTrainer(stand_in_cfg(tmp_path / "stopped", *opts))
    interrupted.resume_or_load(resume=False)
    interrupted.max_iter = 3  # the schedule is that of all iterations
    interrupted.train()
    torch.manual_seed(99)  # what happens between the runs plays no part
    resumed = StandInTrainer(stand_in_cfg(tmp_path / "stopped", *opts))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 3
    resumed.train()

    assert_same_state(_state(resumed), _state(through))
    learning_rates = [g["lr"] for g in resumed.optimizer.param_groups]
    assert learning_rates == [g["lr"] for g in through.optimizer.param_groups]


def test_evaluation_in_between_changes_nothing(tmp_path: Path) -> None:
    plain = trained(stand_in_cfg(tmp_path / "plain"))
    evaluated = trained(stand_in_cfg(tmp_path / "evaluated", "TEST.EVAL_PERIOD", 2))
    assert_same_state(_state(evaluated), _state(plain))


def test_seed_decides_the_run(tmp_path: Path) -> None:
    first = trained(stand_in_cfg(tmp_path / "a", "SOLVER.MAX_ITER", 2, "SEED", 1))
    second = trained(stand_in_cfg(tmp_path / "b", "SOLVER.MAX_ITER", 2, "SEED", 2))
    assert not torch.equal(first.model.head.weight, second.model.head.weight)


def test_resuming_keeps_the_seed_of_the_run(tmp_path: Path) -> None:
    trained(stand_in_cfg(tmp_path, "SOLVER.MAX_ITER", 2, "SEED", 1))
    resumed = StandInTrainer(stand_in_cfg(tmp_path, "SEED", 2))
    resumed.resume_or_load(resume=True)
    assert resumed.cfg.SEED == resumed._trainer.seed == 1


def test_resuming_without_the_average_is_refused(tmp_path: Path) -> None:
    trained(stand_in_cfg(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.EMA_DECAY", 0.9))
    resumed = StandInTrainer(stand_in_cfg(tmp_path))
    with pytest.raises(UserError, match=r"SOLVER\.EMA_DECAY"):
        resumed.resume_or_load(resume=True)


def test_final_checkpoint_evaluates_as_the_end_of_training(tmp_path: Path) -> None:
    cfg = stand_in_cfg(tmp_path, "SOLVER.EMA_DECAY", 0.9)
    trainer = trained(cfg)
    at_end = trainer._last_eval_results["panoptic_seg"]["PQ"]
    assert at_end != trainer.model.head.weight.sum().item()  # the average, not the live weights

    cfg = stand_in_cfg(tmp_path, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    assert StandInTrainer.evaluate_weights(cfg)["panoptic_seg"]["PQ"] == at_end


def test_best_checkpoint_is_kept_and_no_point_to_resume_from(tmp_path: Path) -> None:
    trained(stand_in_cfg(tmp_path, "TEST.EVAL_PERIOD", 2, "MODEL.MASK_ON", True))
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    scores = [json.loads(line)["panoptic_seg/PQ"] for line in lines if "panoptic_seg" in line]
    assert len(scores) == 3
    best = json.loads((tmp_path / "model_best.json").read_text())
    assert best["value"] == pytest.approx(max(scores))
    assert (tmp_path / "model_best.pth").is_file()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
