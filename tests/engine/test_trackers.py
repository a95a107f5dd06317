"""Metrics go to the trackers that LOGGERS names, and a resumed run continues theirs."""

import importlib.machinery
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from batchformer_panoptic.engine.trackers import LOGGERS, check_loggers
from batchformer_panoptic.errors import UserError
from helpers.stand_in import StandInTrainer, stand_in_cfg, trained


class Tracker:
    """Takes the calls of both packages; a run is (id, name), a row (id, iteration, scalars)."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, str]] = []
        self.rows: list[tuple[str, int, dict[str, float]]] = []
        self.ended = 0
        self.failure: Exception | None = None

    def start(self, run_id: str | None, name: str) -> str:
        self.runs.append((run_id or f"run{len(self.runs)}", name))
        return self.runs[-1][0]

    def log(self, scalars: dict[str, float], step: int, **_: Any) -> None:
        if self.failure is not None:
            raise self.failure
        self.rows.append((self.runs[-1][0], step, dict(scalars)))

    def end(self) -> None:
        self.ended += 1

    def init(self, **options: Any) -> Any:
        assert options["config"]["SEED"] == 3
        run_id = self.start(options["id"], options["name"])
        return SimpleNamespace(id=run_id, log=self.log, finish=self.end)

    def start_run(self, *, run_id: str | None, run_name: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id=self.start(run_id, run_name)))


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    found = Tracker()
    wandb, mlflow = module("wandb"), module("mlflow")
    wandb.init = found.init  # type: ignore[attr-defined]
    vars(mlflow).update(start_run=found.start_run, log_metrics=found.log, end_run=found.end)
    vars(mlflow).update(log_text=lambda text, path: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return found


def module(name: str) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="made by a test")
    return made


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_gets_the_scalars_of_the_file(
    name: str, tmp_path: Path, tracker: Tracker
) -> None:
    trained(stand_in_cfg(tmp_path / "run", "LOGGERS", [name]))
    assert tracker.runs == [("run0", "run")]
    assert tracker.ended == 1
    sent = {step: scalars for _, step, scalars in tracker.rows}
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    written = {record.pop("iteration"): record for record in map(json.loads, lines)}
    assert sent == written
    assert not list((tmp_path / "run").glob("events.*"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_resumed_run_continues_the_run_of_the_tracker(
    name: str, tmp_path: Path, tracker: Tracker
) -> None:
    opts = ["LOGGERS", [name], "SOLVER.MAX_ITER"]
    trained(stand_in_cfg(tmp_path, *opts, 3))
    trained(stand_in_cfg(tmp_path, *opts, 6), resume=True)
    assert [run_id for run_id, _ in tracker.runs] == ["run0", "run0"]
    assert {run_id for run_id, _, _ in tracker.rows} == {"run0"}
    trained(stand_in_cfg(tmp_path, *opts, 6))  # anew
    assert tracker.runs[-1][0] != "run0"


def test_names_that_mlflow_refuses_are_changed(tmp_path: Path, tracker: Tracker) -> None:
    trainer = StandInTrainer(stand_in_cfg(tmp_path, "LOGGERS", ["mlflow"]))
    trainer.before_step = lambda: trainer.storage.put_scalar("bbox/AP-a(b)\u00e9", 1.0)
    trainer.train()
    assert "bbox/AP-a_b_\u00e9" in tracker.rows[0][2]


def test_a_tracker_that_fails_later_does_not_end_the_run(
    tmp_path: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    tracker.failure = OSError("no\nnetwork")
    with caplog.at_level(logging.WARNING):
        trained(stand_in_cfg(tmp_path, "LOGGERS", ["wandb"]))
    assert "sending metrics to wandb failed: OSError: no network" in caplog.text
    assert (tmp_path / "model_final.pth").is_file()


def test_a_tracker_that_does_not_start_is_one_line(
    tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match="wandb does not start a run: no API key config"):
        trained(stand_in_cfg(tmp_path, "LOGGERS", ["wandb"]))


def test_without_tensorboard_no_pictures_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[object] = []
    monkeypatch.setattr(StandInTrainer, "_store_pictures", lambda self, results: drawn.append(1))
    trained(stand_in_cfg(tmp_path / "none", "LOGGERS", []))
    assert not drawn
    trained(stand_in_cfg(tmp_path / "default"))
    assert drawn


@pytest.mark.parametrize("names", [["tensorbord"], "tensorboard", [3]])
def test_unknown_loggers_are_refused(names: Any) -> None:
    with pytest.raises(UserError, match="LOGGERS is a list of tensorboard, wandb, mlflow, not"):
        check_loggers(names)


def test_a_logger_that_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_loggers(["tensorboard"])
    (tmp_path / "mlflow").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="names mlflow, which is not installed"):
        check_loggers(["mlflow"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in LOGGERS:
        with pytest.raises(UserError, match=f"names {name}, .*: pip install {name}"):
            check_loggers([name])
