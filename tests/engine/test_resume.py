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


@pytest.mark.parametrize(
    ("ema_decay", "every", "amp"),
    [(0.0, 1, False), (0.9, 1, False), (0.0, 2, False), (0.0, 1, True)],
)
def test_resumed_run_equals_uninterrupted_run(
    tmp_path: Path, ema_decay: float, every: int, amp: bool, device: torch.device
) -> None:
    opts = ["SOLVER.EMA_DECAY", ema_decay, "SOLVER.CHECKPOINT_PERIOD", 3]
    opts += ["MODEL.BATCHFORMER.EVERY", every, "SOLVER.AMP.ENABLED", amp]
    opts += ["MODEL.DEVICE", device.type]
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

    if device.type == "cpu":
        assert_same_state(_state(resumed), _state(through))
    else:  # sums of a GPU may be in another order each time
        torch.testing.assert_close(_state(resumed), _state(through), rtol=1e-3, atol=1e-5)
    scales = [trainer._trainer._scaler.state_dict() for trainer in (resumed, through)]
    assert scales[0] == scales[1]
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


def _stopped(folder: Path, *opts: Any) -> None:
    """A run of 6 iterations that ends after 3."""
    trainer = StandInTrainer(stand_in_cfg(folder, *opts))
    trainer.resume_or_load(resume=False)
    trainer.max_iter = 3
    trainer.train()


def _resumed(folder: Path, *opts: Any) -> StandInTrainer:
    trainer = StandInTrainer(stand_in_cfg(folder, *opts))
    trainer.resume_or_load(resume=True)
    return trainer


def _moments(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: state["optimizer"]["state"][index]["exp_avg"]
        for index, name in enumerate(state["parameters"])
    }


def test_other_groups_of_parameters_keep_their_moments(tmp_path: Path) -> None:
    _stopped(tmp_path)
    stored = torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]["_trainer"]
    opts = ["SOLVER.WEIGHT_DECAY_NORM", 0.0, "SOLVER.BACKBONE_MULTIPLIER", 1.0]
    resumed = _resumed(tmp_path, *opts)._trainer.state_dict()
    assert stored["parameters"] != resumed["parameters"]  # the groups have another order
    assert_same_state(_moments(resumed), _moments(stored))
    assert {g["weight_decay"] for g in resumed["optimizer"]["param_groups"]} == {0.0, 1e-4}
    assert {g["initial_lr"] for g in resumed["optimizer"]["param_groups"]} == {0.01}


def test_the_schedule_is_that_of_the_config(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _stopped(tmp_path)
    opts = ["SOLVER.STEPS", (2,), "SOLVER.GAMMA", 0.5, "SOLVER.BASE_LR", 0.02]
    with caplog.at_level("INFO"):
        resumed = _resumed(tmp_path, *opts)
    changes = [line for line in caplog.messages if line.startswith("resuming with changed")]
    expected = {"SOLVER.BASE_LR 0.01 -> 0.02", "SOLVER.GAMMA 0.1 -> 0.5", "SOLVER.STEPS [4] -> [2]"}
    assert set(changes[0].partition(": ")[2].split(", ")) == expected
    group = resumed.optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(0.5 * group["initial_lr"])
    assert {g["initial_lr"] for g in resumed.optimizer.param_groups} == {0.02, 0.002}
    assert resumed.scheduler.last_epoch == 3


def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path: Path) -> None:
    opts = ["SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2, "MODEL.MASK_ON", True]
    killed = tmp_path / "killed"
    trained(stand_in_cfg(tmp_path / "through", *opts))
    # As if killed after the first checkpoint was written.
    trained(stand_in_cfg(killed, *opts))
    for path in (*killed.glob("model_[fb]*"), killed / "model_0000003.pth"):
        path.unlink()
    (killed / "last_checkpoint").write_text("model_0000001.pth")
    lines = (killed / "metrics.json").read_text().splitlines(keepends=True)
    (killed / "metrics.json").write_text(lines[0])
    resumed = _resumed(killed, *opts)
    resumed.train()
    best, metrics = (
        [(folder / name).read_text() for folder in (killed, tmp_path / "through")]
        for name in ("model_best.json", "metrics.json")
    )
    assert best[0] == best[1]
    ours, theirs = ([json.loads(line) for line in text.splitlines()] for text in metrics)
    assert [x["iteration"] for x in ours] == [x["iteration"] for x in theirs] == [0, 1, 3, 5, 6]
    for name in ("panoptic_seg/PQ", "total_loss", "grad_norm", "lr"):
        assert [x.get(name) for x in ours] == [x.get(name) for x in theirs]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    opts = ["SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINTS_KEPT", 2, "MODEL.MASK_ON", True]
    opts += ["TEST.EVAL_PERIOD", 2]
    trained(stand_in_cfg(tmp_path, *opts))
    expected = ["model_0000004.pth", "model_0000005.pth", "model_best.pth", "model_final.pth"]
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == expected
    resumed = _resumed(tmp_path, *opts, "SOLVER.MAX_ITER", 7)
    resumed.train()
    expected[:2] = ["model_0000005.pth", "model_0000006.pth"]
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == expected


def test_a_checkpoint_of_the_last_iteration_becomes_the_final_one(tmp_path: Path) -> None:
    opts = ["SOLVER.CHECKPOINT_PERIOD", 6]
    trainer = trained(stand_in_cfg(tmp_path, *opts))
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    before = (tmp_path / "metrics.json").read_text()
    _resumed(tmp_path, *opts).train()
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert_same_state(final["model"], trainer.model.state_dict())
    assert final["iteration"] == 5
    assert (tmp_path / "metrics.json").read_text() == before


def test_the_best_of_later_iterations_is_kept(tmp_path: Path) -> None:
    """Its file was written after the checkpoint that the run is resumed from."""
    opts = ["SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2, "MODEL.MASK_ON", True]
    trained(stand_in_cfg(tmp_path, *opts))
    best = {"metric": "panoptic_seg/PQ", "value": 99.0, "iteration": 5}
    (tmp_path / "model_best.json").write_text(json.dumps(best))
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    _resumed(tmp_path, *opts).train()
    assert json.loads((tmp_path / "model_best.json").read_text()) == best
