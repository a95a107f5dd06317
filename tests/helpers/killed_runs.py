"""Trainings of the stand-in, killed at a place and resumed, in processes of their own."""

import argparse
import functools
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine.launch import _distributed_worker
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from batchformer_panoptic.data.io import name_of_temporary
from batchformer_panoptic.engine.output_folder import LOCK
from batchformer_panoptic.engine.setup import _prepare_output_dir
from batchformer_panoptic.engine.writers import TensorBoardWriter
from helpers.stand_in import StandInTrainer, WeightEvaluator, stand_in_cfg

OPTIONS = ["SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.CHECKPOINTS_KEPT", 2]
OPTIONS += ["TEST.EVAL_PERIOD", 4, "SOLVER.EMA_DECAY", 0.5, "SOLVER.BASE_LR", 0.1]
OPTIONS += ["SOLVER.STEPS", (9,), "MODEL.MASK_ON", True]

# Inside every write, and around some: a word for what is done there, and the file.
PLACES = [
    "half of model_0000003.pth",
    "before model_0000003.pth",
    "after model_0000003.pth",
    "half of last_checkpoint",
    "half of model_best.pth",
    "after model_best.pth",
    "half of model_best.json",
    "after model_best.json",
    "half of config.yaml",
    "half of report.html",
    "half of model_final.pth",
    "after model_final.pth",
    "removal of model_0000003.pth",
    "line 4 of metrics.json",
    "record 4 of events",
    "evaluation 1",
    "evaluation 3",
]
_OF_TRAINING = re.compile("batchformer_panoptic|detectron2|fvcore|tensorboard|torch/serialization")
_TIMES = {"time", "data_time", "eta_seconds", "images_per_second", "cpu_memory", "gpu_memory"}


class SplitTrainer(StandInTrainer):
    """Each process reads batches of its own."""

    @classmethod
    def build_train_loader(cls, cfg: Any, *, start_iter: int = 0) -> Any:
        """Batch i of process r is a function of i and r."""
        return super().build_train_loader(cfg, start_iter=start_iter + 1000 * comm.get_rank())

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> Any:
        """See PeakEvaluator."""
        return PeakEvaluator()


class PeakEvaluator(WeightEvaluator):
    """Best in the middle of the run."""

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return the negative distance from a sum of weights."""
        return {"panoptic_seg": {"PQ": -abs(self._value - 0.45)}}


class Killer:
    """Ends this process with SIGKILL where it is told to; counts calls otherwise."""

    def __init__(self, place: str, call: int) -> None:
        self.calls = 0
        self._place = place
        self._call = call
        self._counts: dict[str, int] = {}

    def reach(self, place: str, spoil: Callable[[], None] = lambda: None) -> None:
        """Spoil a file and die, if this is the place."""
        if place == self._place:
            spoil()
            os.kill(os.getpid(), signal.SIGKILL)

    def reach_next(self, kind: str, name: str, spoil: Callable[[], None] = lambda: None) -> None:
        """Count a kind of event; its number is part of the place."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        self.reach(f"{kind} {self._counts[kind]}{name}", spoil)

    def count(self, frame: Any, event: str, _argument: Any) -> None:
        """Count calls in the code of a training, not in that of charts; for `sys.setprofile`."""
        if event in ("call", "c_call") and _OF_TRAINING.search(frame.f_code.co_filename):
            self.calls += 1
            if self.calls == self._call:
                os.kill(os.getpid(), signal.SIGKILL)


def _shorten(path: str | Path) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def _watch(killer: Killer) -> None:
    """Let the killer see every write."""
    replace, unlink = os.replace, os.unlink

    def replacing(source: Any, target: Any) -> None:
        name = os.path.basename(target)
        killer.reach(f"half of {name}", lambda: _shorten(source))
        killer.reach(f"before {name}")
        replace(source, target)
        killer.reach(f"after {name}")

    def unlinking(path: Any, *args: Any, **kwargs: Any) -> None:
        killer.reach(f"removal of {os.path.basename(path)}")
        unlink(path, *args, **kwargs)

    os.replace, os.unlink = replacing, unlinking  # type: ignore[assignment]
    write_metrics, write_events = JSONWriter.write, TensorBoardWriter.write

    def writing_metrics(self: Any) -> None:
        def half() -> None:
            self._file_handle.write('{"data_time": 0.1, "iter')
            self._file_handle.flush()

        killer.reach_next("line", " of metrics.json", half)
        write_metrics(self)

    def writing_events(self: Any) -> None:
        write_events(self)
        path = self._writer.file_writer.event_writer._file_name
        size = os.path.getsize(path)
        killer.reach_next("record", " of events", lambda: os.truncate(path, size - 5))

    JSONWriter.write, TensorBoardWriter.write = writing_metrics, writing_events
    process = PeakEvaluator.process

    def processing(self: Any, *args: Any) -> None:
        killer.reach_next("evaluation", "")
        process(self, *args)

    PeakEvaluator.process = processing


def _train(folder: Path, resume: bool, place: str, call: int) -> None:
    torch.set_num_threads(1)
    cfg = stand_in_cfg(folder, *OPTIONS)
    killer = Killer(place, call)
    if comm.is_main_process():
        _watch(killer)
        if not place:
            sys.setprofile(killer.count)
        args = argparse.Namespace(overwrite=False, resume=resume, eval_only=False)
        _prepare_output_dir(cfg, args)
    comm.synchronize()
    trainer = SplitTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    sys.setprofile(None)
    if comm.is_main_process():
        (folder.parent / f"{folder.name}.calls").write_text(str(killer.calls))


@functools.cache
def _context() -> Any:
    """Processes are forked from one that has imported everything, and trained nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # the server does not get this sys.path otherwise
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    return context


def run(
    folder: Path, *, processes: int = 1, resume: bool = False, place: str = "", call: int = 0
) -> list[int]:
    """Train into a folder; return the exit status of each process, -9 for a killed one."""
    arguments = (folder, resume, place, call)
    started: list[ForkServerProcess]
    if processes == 1:
        started = [_context().Process(target=_train, args=arguments)]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        started = [
            _context().Process(
                target=_distributed_worker,
                args=(rank, _train, processes, processes, 0, url, arguments),
            )
            for rank in range(processes)
        ]
    for process in started:
        process.start()
    started[0].join(60)
    for process in started[1:]:
        process.join(60 if started[0].exitcode == 0 else 0)
        process.kill()  # as the launcher does after the death of another process
        process.join()
    return [process.exitcode for process in started]


def calls_of(folder: Path) -> int:
    """Number of function calls of the run into a folder that was not killed."""
    return int((folder.parent / f"{folder.name}.calls").read_text())


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    """The files of two runs are equal, apart from times and paths."""
    names, expected = (
        sorted(p.name for p in x.iterdir() if "tfevents" not in p.name)
        for x in (folder, undisturbed)
    )
    assert names == expected
    assert LOCK not in names
    assert not [p for p in folder.rglob("*") if name_of_temporary(p.name)]
    for path in undisturbed.glob("*.pth"):
        theirs = torch.load(path, weights_only=True)
        ours = torch.load(folder / path.name, weights_only=True)
        assert_equal(ours["model"], theirs["model"], path.name)
        assert ours["iteration"] == theirs["iteration"], path.name
        assert_equal(
            ours["trainer"]["_trainer"]["optimizer"]["state"],
            theirs["trainer"]["_trainer"]["optimizer"]["state"],
            path.name,
        )
    for name in ("model_best.json", "last_checkpoint"):
        assert (folder / name).read_text() == (undisturbed / name).read_text()
    configs = [(x / "config.yaml").read_text().replace(str(x), "") for x in (folder, undisturbed)]
    assert configs[0] == configs[1]
    assert metrics(folder) == metrics(undisturbed)
    assert events(folder) == events(undisturbed)


def assert_equal(ours: Any, theirs: Any, name: str) -> None:
    """Nested dicts of tensors are equal in every bit."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        for key, value in theirs.items():
            assert_equal(ours[key], value, f"{name} {key}")
    else:
        assert torch.equal(ours, theirs), name


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.json without times."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in _TIMES} for line in lines]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder, without times."""
    accumulator = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
        if tag not in _TIMES
    }
