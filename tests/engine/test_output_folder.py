"""One process writes to OUTPUT_DIR, and what a killed one has left is removed."""

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from batchformer_panoptic.engine.output_folder import (
    LOCK,
    cut_metrics,
    hold,
    last_logged,
    logged_values,
    release,
    remove_temporaries,
)
from batchformer_panoptic.errors import UserError

FORK = multiprocessing.get_context("fork")
DIGITS = "0123456789abcdef" * 2


def _hold_with_worker(folder: Path, ready: Connection) -> None:
    hold(folder)
    worker = os.fork()
    if worker == 0:  # as a worker of a data loader
        time.sleep(60)
        os._exit(0)
    ready.send(worker)
    time.sleep(60)


def test_a_lock_ends_with_its_process_and_not_with_its_workers(tmp_path: Path) -> None:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_hold_with_worker, args=(tmp_path, theirs))
    process.start()
    worker = ours.recv()
    try:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on "):
            hold(tmp_path)
        process.kill()
        process.join()
        assert (tmp_path / LOCK).exists()
        hold(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
    release(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_process_may_hold_a_folder_again(tmp_path: Path) -> None:
    hold(tmp_path)
    hold(tmp_path)
    release(tmp_path)
    release(tmp_path)
    assert not list(tmp_path.iterdir())


def test_temporary_files_of_the_run_are_removed_and_others_kept(tmp_path: Path) -> None:
    inference = tmp_path / "inference" / "set"
    inference.mkdir(parents=True)
    left = [f".model_0000003.{DIGITS}.pth", f".last_checkpoint.{DIGITS}"]
    kept = [f".mine.{DIGITS}.pth", ".model_0000003.pth", "model_0000003.pth", ".hidden"]
    for name in left + kept:
        (tmp_path / name).touch()
    (inference / f".results.{DIGITS}.json").touch()
    remove_temporaries(tmp_path, ["model_[0-9]*.pth", "last_checkpoint"])
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == sorted(kept)
    assert not list(inference.iterdir())


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (["0", "1", "3", "5"], 2),
        (["0", "1", "2 and half a li"], 2),
        (["0", "half", "1", "4"], 3),  # of an older version, which wrote behind half a line
        (["0", "4", "1", "4"], 3),  # and repeated iterations
        (["5"], 0),
    ],
)
def test_metrics_are_cut_where_the_run_is_resumed(
    tmp_path: Path, lines: list[str], kept: int
) -> None:
    rows = [json.dumps({"iteration": int(x)}) if x.isdigit() else x for x in lines]
    text = [f"{row}\n" for row in rows]
    text[-1] = text[-1] if lines[-1].isdigit() else rows[-1]
    (tmp_path / "metrics.json").write_text("".join(text))
    cut_metrics(tmp_path, 3)
    assert (tmp_path / "metrics.json").read_text() == "".join(text[:kept])


def test_values_of_an_iteration(tmp_path: Path) -> None:
    assert last_logged(tmp_path) == -1
    assert logged_values(tmp_path, 1) == {}
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "lr": 0.5}\n[1]\n{"iter')
    assert logged_values(tmp_path, 1) == {"iteration": 1, "lr": 0.5}
    assert last_logged(tmp_path) == 1
