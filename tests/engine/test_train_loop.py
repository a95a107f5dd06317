"""One training step: streams, logging, errors, mixed precision."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils import comm
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from batchformer_panoptic.engine import trainer as trainer_module
from batchformer_panoptic.engine.train_loop import (
    FiniteCheck,
    KeptBuffers,
    MetricWindow,
    StreamTrainLoop,
    combine_streams,
)
from batchformer_panoptic.engine.trainer import _warn_about_single_images
from batchformer_panoptic.errors import NonFiniteError, UserError
from batchformer_panoptic.modeling.compiled import compile_regions
from helpers.stand_in import StandInTrainer, assert_same_state, stand_in_cfg, trained

LOSSES = {
    "loss_ce/original": torch.tensor(1.0),
    "loss_ce/batchformer": torch.tensor(2.0),
    "loss_bbox/original": torch.tensor(0.25),
    "loss_bbox/batchformer": torch.tensor(0.5),
}
ONE = {"original": 1.0, "batchformer": 1.0}


def test_total_is_the_sum_of_all_losses() -> None:
    combined = combine_streams(LOSSES, ONE)
    torch.testing.assert_close(combined.total, torch.tensor(3.75))
    torch.testing.assert_close(combined.logged["total_loss"], torch.tensor(3.75))
    torch.testing.assert_close(combined.logged["loss_ce"], torch.tensor(3.0))


def test_stream_values_compare_with_a_run_of_one_stream() -> None:
    logged = combine_streams(LOSSES, ONE).logged
    expected = {
        "original/loss_ce": 2.0,
        "original/loss_bbox": 0.5,
        "original/total_loss": 2.5,
        "batchformer/loss_ce": 4.0,
        "batchformer/loss_bbox": 1.0,
        "batchformer/total_loss": 5.0,
    }
    assert {k: v.item() for k, v in logged.items() if "/" in k} == expected


def test_stream_weights_scale_total_and_gradient_but_not_the_streams_own_values() -> None:
    leaves = {k: v.clone().requires_grad_() for k, v in LOSSES.items()}
    combined = combine_streams(leaves, {"original": 1.0, "batchformer": 0.5})
    combined.total.backward()
    torch.testing.assert_close(combined.total.detach(), torch.tensor(2.5))
    torch.testing.assert_close(leaves["loss_ce/original"].grad, torch.tensor(1.0))
    torch.testing.assert_close(leaves["loss_ce/batchformer"].grad, torch.tensor(0.5))
    torch.testing.assert_close(combined.logged["batchformer/loss_ce"], torch.tensor(4.0))


def test_losses_of_one_stream_keep_their_names() -> None:
    combined = combine_streams({"loss_ce": torch.tensor(1.5), "loss_bbox": torch.tensor(2.0)}, ONE)
    assert {k: v.item() for k, v in combined.logged.items()} == {
        "total_loss": 3.5,
        "loss_ce": 1.5,
        "loss_bbox": 2.0,
    }


def test_unknown_stream_is_refused() -> None:
    with pytest.raises(UserError, match="'sideways'"):
        combine_streams({"loss_ce/sideways": torch.tensor(1.0)}, ONE)


def test_metrics_of_first_and_last_iteration_reach_the_file(tmp_path: Path) -> None:
    trained(stand_in_cfg(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    records = [r for r in records if "total_loss" in r]
    assert [r["iteration"] for r in records] == [0, 5]
    for record in records:
        terms = record["loss_ce"] + record["loss_bbox"]
        assert record["total_loss"] == pytest.approx(terms, rel=1e-5)
        streams = record["original/total_loss"] + record["batchformer/total_loss"]
        assert streams / 2 == pytest.approx(record["total_loss"], rel=1e-5)
        assert {"grad_norm", "class_error", "original/loss_ce", "lr", "data_time"} <= record.keys()
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_means_are_over_the_iterations_that_have_the_metric(device: torch.device) -> None:
    window = MetricWindow()
    for one in ({"a": 1.0, "b": 5.0}, {"a": 4.0}, {"a": 2.0, "b": 7.0}, {"a": 5.0}):
        window.add({name: torch.tensor(value, device=device) for name, value in one.items()})
    assert window.flush() == {"a": 3.0, "b": 6.0}
    assert window.flush() == {}


@pytest.mark.parametrize("first", [2.5, math.inf, math.nan])
def test_a_check_is_of_the_first_value(first: float, device: torch.device) -> None:
    check = FiniteCheck(torch.tensor([first, 7.0], device=device))
    assert check.is_ready == (device.type == "cpu")
    assert check.passed() == math.isfinite(first)
    assert check.read()[1] == 7.0


def test_the_second_stream_rests_between_its_steps(tmp_path: Path) -> None:
    trainer = trained(stand_in_cfg(tmp_path, "MODEL.BATCHFORMER.EVERY", 4))
    weight = trainer.model.batchformer.blocks["0"].linear1.weight
    assert trainer.optimizer.state[weight]["step"] == 2  # of 6: iterations 0 and 4
    assert trainer.optimizer.state[trainer.model.head.weight]["step"] == 6


def test_console_line_shows_progress_and_totals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = stand_in_cfg(tmp_path)
    with caplog.at_level(logging.INFO, logger="batchformer_panoptic.engine.writers"):
        trained(cfg)
    name = "batchformer_panoptic.engine.writers"
    lines = [r.getMessage() for r in caplog.records if r.name == name]
    assert [line.split("  ")[0] for line in lines] == ["iter: 1/6", "iter: 6/6"]
    for word in ("eta:", "total_loss:", "batchformer/total_loss:", "loss_ce:", "grad_norm:", "lr:"):
        assert word in lines[-1]
    assert "batchformer/loss_ce" not in lines[-1]


class PoisonedTrainer(StandInTrainer):
    """The images of iteration 2 are not numbers."""

    @classmethod
    def build_train_loader(cls, cfg: Any, *, start_iter: int = 0) -> Any:
        """Poison one batch."""
        for iteration, batch in enumerate(super().build_train_loader(cfg), start_iter):
            if iteration == 2:
                batch[0]["image"] = batch[0]["image"] * float("nan")
            yield batch


def test_non_finite_loss_names_terms_and_images_and_keeps_the_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = trained(stand_in_cfg(tmp_path / "before", "SOLVER.MAX_ITER", 2))
    trainer = PoisonedTrainer(stand_in_cfg(tmp_path / "run"))
    trainer.resume_or_load(resume=False)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    for word in ("iteration 2", "loss_ce/original=nan", "20 (2_0.jpg)", "21 (2_1.jpg)"):
        assert word in str(error.value)
    assert "Traceback" not in caplog.text
    saved = torch.load(tmp_path / "run" / "model_nonfinite.pth", weights_only=True)
    assert saved["iteration"] == saved["trainer"]["iteration"] == 1
    assert_same_state(saved["model"], before.model.state_dict())


class RefusingTrainer(StandInTrainer):
    """The model finds infinities before there is a loss."""

    @classmethod
    def build_model(cls, cfg: Any) -> Any:
        """Raise in forward."""
        model = super().build_model(cfg)
        model.register_forward_hook(_refuse)
        return model


def _refuse(module: Any, inputs: Any, outputs: Any) -> None:
    raise NonFiniteError("matching cost is not finite")


def test_model_that_refuses_counts_as_non_finite(tmp_path: Path) -> None:
    trainer = RefusingTrainer(stand_in_cfg(tmp_path))
    with pytest.raises(NonFiniteError, match=r"iteration 0: matching cost .*0_0\.jpg"):
        trainer.train()
    assert (tmp_path / "model_nonfinite.pth").is_file()


def _spoil_gradients(
    trainer: StandInTrainer, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    trainer.model.head.weight.register_hook(spoil)


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def _loss_scaling(trainer: StandInTrainer) -> torch.amp.GradScaler:
    """Scale losses as on CUDA, which CPU tests do not have."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    trainer._trainer._scaler = scaler
    return scaler


def test_overflow_under_loss_scaling_skips_the_step_and_halves_the_scale(tmp_path: Path) -> None:
    trainer = StandInTrainer(stand_in_cfg(tmp_path, "SOLVER.MAX_ITER", 3))
    trainer._trainer._log_periods = [1]
    scaler = _loss_scaling(trainer)
    steps = []

    def overflow_in_the_second(gradient: torch.Tensor) -> torch.Tensor:
        steps.append(trainer.model.head.weight.detach().clone())
        return gradient / 0 if len(steps) == 2 else gradient

    _spoil_gradients(trainer, overflow_in_the_second)
    trainer.train()
    assert scaler.get_scale() == 2.0**15
    assert not torch.equal(steps[0], steps[1])
    assert torch.equal(steps[1], steps[2])
    records = [r for r in _records(tmp_path) if "total_loss" in r]
    assert [r["skipped_steps"] for r in records] == [0, 1, 0]
    assert ["grad_norm" in r for r in records] == [True, False, True]


def test_loss_scaling_gives_up_when_no_scale_helps(tmp_path: Path) -> None:
    trainer = StandInTrainer(stand_in_cfg(tmp_path, "SOLVER.MAX_ITER", 100))
    _loss_scaling(trainer)
    _spoil_gradients(trainer, lambda gradient: gradient * float("nan"))
    # 2 ** 16 halved 30 times is below 1e-4.
    with pytest.raises(
        NonFiniteError, match=r"iteration 30: .* nan, though .* fallen to 6.1\d*e-05"
    ):
        trainer.train()


def test_buffers_of_several_types_are_restored() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].register_buffer("empty", torch.zeros(0, 4))
    kept = KeptBuffers(model)
    kept.keep()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model[:1](torch.randn(5, 3))
    model[1](torch.randn(5, 2))
    assert model[1].num_batches_tracked == 1
    kept.restore()
    assert_same_state(dict(model.named_buffers()), before)


def test_a_state_that_cannot_be_saved_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = RefusingTrainer(stand_in_cfg(tmp_path))

    def refuse_to_save(*args: Any, **kwargs: Any) -> None:
        raise UserError("No space left on device")

    monkeypatch.setattr(trainer.checkpointer, "save", refuse_to_save)
    with pytest.raises(NonFiniteError, match=r"iteration 0: .*is not saved: No space left"):
        trainer.train()


def test_amp_on_cpu_runs_the_model_in_bfloat16(tmp_path: Path) -> None:
    trainer = StandInTrainer(stand_in_cfg(tmp_path, "SOLVER.AMP.ENABLED", True))
    seen: list[torch.dtype] = []
    trainer.model.head.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert trainer.model.head.weight.dtype == torch.float32


def test_a_compiled_training_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(trainer_module, "compile_regions", lambda m: compile_regions(m, counter))
    expected = trained(stand_in_cfg(tmp_path / "plain"))
    found = trained(stand_in_cfg(tmp_path / "compiled", "SOLVER.COMPILE", True))
    assert counter.frame_count == 1  # the block
    assert_same_state(found.model.state_dict(), expected.model.state_dict())


@pytest.mark.parametrize(
    ("images", "attend", "warned"),
    [(1, "batch", True), (2, "batch", False), (1, "self", False)],
)
def test_one_image_per_process_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, images: int, attend: str, warned: bool
) -> None:
    opts = ["SOLVER.IMS_PER_BATCH", images, "MODEL.BATCHFORMER.ATTEND", attend]
    StandInTrainer(stand_in_cfg(tmp_path, *opts))
    assert ("ONE image" in caplog.text) == warned


@pytest.mark.parametrize("sync", [False, True])
def test_one_image_in_each_of_two_processes_is_enough_with_sync(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    sync: bool,
) -> None:
    cfg = stand_in_cfg(tmp_path, "SOLVER.IMS_PER_BATCH", 2, "MODEL.BATCHFORMER.SYNC", sync)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    _warn_about_single_images(cfg)
    words = "to at least 4, or set MODEL.BATCHFORMER.SYNC True"
    assert (words in caplog.text) == ("ONE image" in caplog.text) == (not sync)


def test_metrics_of_block_speed_and_memory_reach_the_file(tmp_path: Path) -> None:
    opts = ["MODEL.BATCHFORMER.EVERY", 2, "SOLVER.GRADIENT_ACCUMULATION", 2]
    trained(stand_in_cfg(tmp_path, *opts))
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    first, last = (r for r in map(json.loads, lines) if "total_loss" in r)
    assert 0 < first["attention_entropy_0"] < math.log(4)  # images of a batch
    assert "attention_entropy_0" not in last  # the block rests in iteration 5
    assert last["images_per_second"] > 0
    if sys.platform == "linux":
        assert 100 < last["cpu_memory"] < 100_000  # MiB


def test_images_per_second_are_those_of_the_window(tmp_path: Path) -> None:
    trainer = SlowTrainer(stand_in_cfg(tmp_path))
    trainer.train()
    rate = trainer.storage.latest()["images_per_second"][0]
    assert 0.5 * 4 / 0.05 < rate < 4 / 0.05  # 4 images in 0.05 s and a little more


class SlowTrainer(StandInTrainer):
    """A batch takes 50 ms."""

    @classmethod
    def build_train_loader(cls, cfg: Any, *, start_iter: int = 0) -> Any:
        """Wait for each batch."""
        for batch in super().build_train_loader(cfg, start_iter=start_iter):
            time.sleep(0.05)
            yield batch


def test_monitoring_changes_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for is_logged in (True, False):
        monkeypatch.setattr(StreamTrainLoop, "is_logged", lambda self, number, on=is_logged: on)
        trainer = trained(stand_in_cfg(tmp_path / str(is_logged)))
        weights.append(trainer.model.state_dict())
    assert_same_state(*weights)
    assert "attention_entropy_0" in (tmp_path / "True" / "metrics.json").read_text()
