"""Signals at every moment of a run, and launchers whose processes do not fit together."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from batchformer_panoptic.checkpoint import PanopticCheckpointer
from batchformer_panoptic.engine import PanopticTrainer
from helpers.run_faults import Place, RunFault

STEP = "the state after that step is saved, `last_checkpoint` names it"
NOTHING = "no weights are written"
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
MPIRUN = {f"OMPI_COMM_WORLD_{key}": value for key, value in TORCHRUN.items() if key != "WORLD_SIZE"}
MPIRUN["OMPI_COMM_WORLD_SIZE"] = "2"


def _train(place: Place, *options: object, settings: Sequence[object] = ()) -> Path:
    output = place.folder / "out"
    opts = ["SOLVER.MAX_ITER", 4, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0]
    opts += ["TEST.EVAL_PERIOD", 3, "OUTPUT_DIR", output, *settings]
    config_file = place.trained().config_file
    place.command("train_net.py", "--config-file", config_file, *options, "--opts", *opts)
    return output


def _before(
    place: Place, of: Any, name: str, act: Callable[[], None], when: Callable[..., bool]
) -> None:
    """Act before calls of a method or function."""
    method = getattr(of, name)

    def acting(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            act()
        return method(*args, **kwargs)

    place.monkeypatch.setattr(of, name, acting)


def _in_third_step(place: Place, act: Callable[[], None]) -> None:
    _before(place, PanopticTrainer, "run_step", act, lambda trainer: trainer.iter == 2)


def _always(*_args: object) -> bool:
    return True


def _send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def _is_saved(output: Path, name: str) -> None:
    assert (output / "last_checkpoint").read_text() == name
    assert (output / name).is_file()
    assert not (output / "model_final.pth").exists()


def _in_step(*numbers: int) -> Callable[[Place], None]:
    def act(place: Place) -> None:
        _in_third_step(place, lambda: _send(*numbers))
        _is_saved(_train(place), "model_0000002.pth")

    return act


def _ctrl_c_twice(place: Place) -> None:
    def press() -> None:
        _send(signal.SIGINT)
        time.sleep(1.1)
        _send(signal.SIGINT)

    _in_third_step(place, press)
    assert not list(_train(place).glob("*.pth"))


def _in_evaluation(place: Place) -> None:
    _before(place, PanopticTrainer, "test", lambda: _send(signal.SIGTERM), _always)
    _is_saved(_train(place), "model_0000002.pth")


def _in_last_evaluation(place: Place) -> None:
    _before(place, PanopticTrainer, "test", lambda: _send(signal.SIGTERM), _always)
    output = _train(place, settings=["SOLVER.MAX_ITER", 2])
    assert (output / "last_checkpoint").read_text() == "model_final.pth"


def _while_saving(place: Place) -> None:
    _before(
        place,
        PanopticCheckpointer,
        "save",
        lambda: _send(signal.SIGTERM),
        lambda _, name: name == "model_0000001",
    )
    _is_saved(_train(place, settings=["SOLVER.CHECKPOINT_PERIOD", 2]), "model_0000001.pth")


def _before_training(place: Place) -> None:
    _before(place, PanopticTrainer, "resume_or_load", lambda: _send(signal.SIGTERM), _always)
    assert not list(_train(place).glob("*.pth"))


def _eval_only(place: Place) -> None:
    _before(place, PanopticTrainer, "test", lambda: _send(signal.SIGUSR1), _always)
    weights = place.trained().weights
    output = _train(place, "--eval-only", settings=["MODEL.WEIGHTS", weights])
    assert not (output / "inference").exists()


def _under_nohup(place: Place) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _in_third_step(place, lambda: _send(signal.SIGHUP))
        assert (_train(place) / "model_final.pth").is_file()
    finally:
        signal.signal(signal.SIGHUP, before)


def _to_rank(place: Place, number: int) -> Path:
    """Send a signal to rank 1 of two processes once they train."""
    output = place.folder / "out"

    def send() -> None:
        deadline = time.monotonic() + 120
        metrics = output / "metrics.json"  # is opened before the training
        while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        ranks = sorted(child.pid or 0 for child in multiprocessing.active_children())
        os.kill(ranks[-1], number)

    sender = threading.Thread(target=send)
    sender.start()
    place.monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = ["SOLVER.MAX_ITER", 10**6, "TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 10**6]
    _train(place, "--num-gpus", 2, settings=settings)
    sender.join()
    return output


def _one_rank_stopped(place: Place) -> None:
    output = _to_rank(place, signal.SIGTERM)
    _is_saved(output, (output / "last_checkpoint").read_text())
    # The number of the step depends on the speed of the machine.
    place.words = place.words.replace((output / "last_checkpoint").read_text(), "model_N.pth")
    place.words = " ".join("N" if word.isdigit() else word for word in place.words.split())


def _one_rank_killed(place: Place) -> None:
    before = multiprocessing.active_children()  # workers of data loaders of other rows
    assert not list(_to_rank(place, signal.SIGKILL).glob("*.pth"))
    assert set(multiprocessing.active_children()) <= set(before)


def _launched_by(variables: dict[str, str], *options: object) -> Callable[[Place], None]:
    def act(place: Place) -> None:
        for name, value in variables.items():
            place.monkeypatch.setenv(name, value)
        assert not list(_train(place, *options).glob("*.pth"))

    return act


def _script_of_slurm(place: Place) -> None:
    for name, value in {**SLURM, "ENVIRONMENT": "BATCH"}.items():
        place.monkeypatch.setenv(name, value)
    assert (_train(place) / "model_final.pth").is_file()


def _requeued(place: Place) -> None:
    _in_third_step(place, lambda: _send(signal.SIGUSR1))
    _is_saved(_train(place), "model_0000002.pth")
    place.monkeypatch.undo()
    place.monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    output = _train(place, "--overwrite")
    assert (output / "model_0000002.pth").is_file()
    assert (output / "model_final.pth").is_file()


def _fault(
    fault: str, state: str, act: Callable[[Place], None], status: int, options: str = ""
) -> RunFault:
    return RunFault(fault, f"`train_net.py{options}`", state, act, status)


FAULTS = [
    *(
        _fault(f"{signal.Signals(n).name} in a step", STEP, _in_step(n), 128 + n)
        for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
    ),
    _fault("Ctrl-C in a step", STEP, _in_step(signal.SIGINT), 130),
    _fault(
        "the same signal from the scheduler and from the launcher",
        STEP,
        _in_step(signal.SIGTERM, signal.SIGTERM),
        143,
    ),
    _fault("Ctrl-C, and again after a second", NOTHING, _ctrl_c_twice, 130),
    _fault("SIGTERM in an evaluation", STEP, _in_evaluation, 143),
    _fault("SIGTERM in the last evaluation", "the weights are final", _in_last_evaluation, 143),
    _fault("SIGTERM while a checkpoint is written", "it is whole", _while_saving, 143),
    _fault("SIGTERM before the first step", NOTHING, _before_training, 143),
    _fault("SIGUSR1 in an evaluation", "no results", _eval_only, 138, " --eval-only"),
    _fault("the terminal closes, under `nohup`", "the run goes on to its end", _under_nohup, 0),
    _fault("SIGTERM for one of two processes", STEP, _one_rank_stopped, 143, " --num-gpus 2"),
    _fault(
        "one of two processes killed",
        "no process is left",
        _one_rank_killed,
        2,
        " --num-gpus 2",
    ),
    _fault("SLURM requeues the job", "the run continues", _requeued, 0, " --overwrite"),
    _fault(
        "torchrun and processes of its own",
        NOTHING,
        _launched_by({**TORCHRUN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "--num-gpus", 2),
        2,
        " --num-gpus 2",
    ),
    _fault("RANK without WORLD_SIZE", NOTHING, _launched_by({"RANK": "1", "LOCAL_RANK": "1"}), 2),
    _fault(
        "a rank that is not below the size", NOTHING, _launched_by({**TORCHRUN, "RANK": "2"}), 2
    ),
    _fault("mpirun without a place to meet", NOTHING, _launched_by(MPIRUN), 2),
    _fault(
        "srun on hosts that are not a simple list",
        NOTHING,
        _launched_by({**SLURM, "SLURM_JOB_NODELIST": "rack[1-2]n[1-4]"}),
        2,
    ),
    _fault("a batch script of SLURM without srun", "one training", _script_of_slurm, 0),
    _fault(
        "a machine beyond the number of machines",
        NOTHING,
        _launched_by({}, "--num-machines", 2, "--machine-rank", 2, "--dist-url", "tcp://a:1"),
        2,
        " --num-machines 2 --machine-rank 2",
    ),
]
