"""Processes that other programs start, processes that stop together, and those that are lost."""

import atexit
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils import comm

from batchformer_panoptic.engine.processes import (
    Member,
    _set_meeting_point,
    find_member,
    launch_processes,
    restarted_by,
    run_as_member,
)
from batchformer_panoptic.errors import Stopped, UserError
from helpers.commands import REPO_ROOT, load_script
from helpers.stand_in import StandInTrainer, stand_in_cfg
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.trained_files import write_run

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (TORCHRUN, Member("torchrun", 3, 4, 1)),
        ({**TORCHRUN, **SRUN}, Member("torchrun", 3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        (SRUN, Member("srun", 2, 4, 0)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "3"}, Member("srun", 2, 3, 0)),
        # srun in a batch script, one task of it, and the script itself.
        (
            {**SRUN, "SLURM_STEP_NUM_TASKS": "4", "ENVIRONMENT": "BATCH"},
            Member("srun", 2, 4, 0),
        ),
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**SRUN, "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}, None),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),
        ({"WORLD_SIZE": "4", **SRUN}, Member("srun", 2, 4, 0)),
    ],
)
def test_launchers_are_found_by_their_variables(
    environ: Mapping[str, str], expected: Member | None
) -> None:
    assert find_member(environ) == expected


@pytest.mark.parametrize("name", TORCHRUN)
def test_variables_that_are_no_numbers_are_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 'x'"):
        find_member({**TORCHRUN, name: "x"})


def test_a_number_of_processes_without_a_rank_is_an_error() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE is 4, but RANK is not set"):
        find_member({"WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("node7", "node7"),
        ("a-1.example.org,b-2", "a-1.example.org"),
        ("gpu[07-09,12]", "gpu07"),
        ("gpu[3,5],cpu[1-2]", "gpu3"),
        ("n[1-2].local", "n1.local"),
    ],
)
def test_the_tasks_of_srun_meet_at_the_first_host(hosts: str, expected: str) -> None:
    environ = {"SLURM_JOB_NODELIST": hosts, "SLURM_JOB_ID": "30007", "SLURM_STEP_ID": "1"}
    _set_meeting_point(Member("srun", 0, 2, 0), environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == (expected, "15008")
    own = {"MASTER_ADDR": "mine", "MASTER_PORT": "9", **environ, "SLURM_STEP_NODELIST": "other"}
    _set_meeting_point(Member("srun", 0, 2, 0), own)
    assert own["MASTER_ADDR"] == expected


def test_a_restart_is_noticed() -> None:
    assert restarted_by({"TORCHELASTIC_RESTART_COUNT": "0"}) == ""
    assert restarted_by({"TORCHELASTIC_RESTART_COUNT": "2"}) == "torchrun"
    assert restarted_by({"SLURM_RESTART_COUNT": "1"}) == "SLURM"


# Two processes.


def _train(output_dir: Path, method: str, ranks: tuple[int, ...]) -> None:
    """Train; processes of some ranks get a signal in their second step, or evaluation."""
    torch.set_num_threads(1)

    class Signalled(StandInTrainer):
        def run_step(self) -> None:
            self._act("run_step")
            super().run_step()

        def test(self, *args: Any) -> Any:
            self._act("test")
            return StandInTrainer.test(*args)

        def _act(self, name: str) -> None:
            if name == method and self.iter == 1 and comm.get_rank() in ranks:
                os.kill(os.getpid(), signal.SIGUSR1)

    trainer = Signalled(stand_in_cfg(output_dir, "TEST.EVAL_PERIOD", 2))
    trainer.resume_or_load(resume=False)
    trainer.train()


def _stop_three_times(folder: Path) -> None:
    for name, ranks in {"one": (1,), "both": (0, 1)}.items():
        with pytest.raises(Stopped) as stopped:
            _train(folder / name, "run_step", ranks)
        assert stopped.value.together
        (folder / f"{name}_{comm.get_rank()}").write_text(str(stopped.value))
    _train(folder / "evaluation", "test", (0, 1))


@pytest.mark.distributed
def test_processes_stop_after_the_same_step(tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stopped:
        launch_processes(_stop_three_times, 2, args=(tmp_path,))
    assert stopped.value.status == 138
    lines = {name: (tmp_path / f"{name}_0").read_text() for name in ("one", "both")}
    for name, line in {**lines, "evaluation": str(stopped.value)}.items():
        assert line == (
            "stopped by SIGUSR1 after iteration 2 of 6: --resume continues from "
            f"{tmp_path}/{name}/model_0000001.pth"
        )
        assert (tmp_path / name / "last_checkpoint").read_text() == "model_0000001.pth"
    assert [(tmp_path / f"{name}_1").read_text() for name in lines] == ["", ""]


def _hang() -> None:
    if comm.get_rank() == 1:
        time.sleep(120)
    comm.synchronize()


@pytest.mark.distributed
def test_a_process_that_hangs_is_named() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^rank 1 of 2 does not answer"):
        launch_processes(_hang, 2, timeout=timedelta(seconds=2))
    assert time.monotonic() - start < 100


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _write_place(folder: Path) -> None:
    places = [comm.get_rank(), comm.get_world_size(), comm.get_local_rank(), comm.get_local_size()]
    (folder / f"rank_{comm.get_rank()}").write_text(str(places))


# Numbers of two processes on their machines, and what they find, or say.
PLACES = {
    (0, 1): "[{rank}, 2, {rank}, 2]",
    (0, 0): "[{rank}, 2, 0, 1]",  # two machines
    (1, 0): "srun has placed the processes on the machines as [1, 0]",
}


def _be_tasks(rank: int, ports: list[int], folder: Path) -> None:
    for port, local_ranks in zip(ports, PLACES, strict=True):
        os.environ.update(SLURM_PROCID=str(rank), SLURM_LOCALID=str(local_ranks[rank]))
        os.environ.update(SLURM_NTASKS="2", MASTER_PORT=str(port), SLURM_JOB_NODELIST="localhost")
        member = find_member(os.environ)
        assert member is not None
        target = folder / str(local_ranks)
        try:
            run_as_member(_write_place, member, args=(target,), timeout=timedelta(seconds=60))
        except UserError as error:
            (target / f"rank_{rank}").write_text(str(error))


@pytest.mark.distributed
def test_tasks_of_srun_are_one_group(tmp_path: Path) -> None:
    for local_ranks in PLACES:
        (tmp_path / str(local_ranks)).mkdir()
    ports = [_free_port() for _ in PLACES]
    context = multiprocessing.get_context("spawn")
    tasks = [context.Process(target=_be_tasks, args=(rank, ports, tmp_path)) for rank in (0, 1)]
    for task in tasks:
        task.start()
    for rank, task in enumerate(tasks):
        task.join()
        for local_ranks, expected in PLACES.items():
            found = (tmp_path / str(local_ranks) / f"rank_{rank}").read_text()
            assert found.startswith(expected.format(rank=rank))


@pytest.mark.parametrize("port", [None, "http", "99999"])
def test_processes_that_do_not_meet_are_named(
    monkeypatch: pytest.MonkeyPatch, port: str | None
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port or str(_free_port()))
    with pytest.raises(UserError, match=r"^rank 1 of the 2 processes of torchrun does not meet"):
        run_as_member(
            _write_place,
            Member("torchrun", 1, 2, 1),
            args=(Path(),),
            timeout=timedelta(seconds=1),
        )


# torchrun.


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _refuse_and_abort() -> None:
    atexit.register(os.abort)  # as a thread of gloo does now and then
    raise UserError("the reason")


@pytest.mark.distributed
def test_the_reason_of_a_process_that_aborts_at_its_end_is_kept() -> None:
    with pytest.raises(UserError, match=r"^the reason$"):
        launch_processes(_refuse_and_abort, 2)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes on Linux")
def test_torchrun_trains_one_model_and_continues_after_a_lost_process(
    tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset
) -> None:
    config_file = write_run(tmp_path / "run", tiny_panoptic_dataset).config_file
    settings = ["SOLVER.MAX_ITER", "30", "SOLVER.IMS_PER_BATCH", "2", "SEED", "1"]
    settings += ["SOLVER.CHECKPOINT_PERIOD", "5", "DATALOADER.NUM_WORKERS", "0"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    arguments = ["--config-file", str(config_file), *settings]
    text = (REPO_ROOT / "GETTING_STARTED.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("torchrun --"))
    documented = line.split()[1:]
    documented[documented.index("--config-file") + 1] = str(config_file)
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", *documented]
    process = subprocess.Popen(
        [*torchrun, *settings, "OUTPUT_DIR", str(torn)], cwd=REPO_ROOT, env=environ
    )
    while process.poll() is None and not (torn / "model_0000004.pth").exists():
        time.sleep(0.05)
    os.kill(_children(process.pid)[-1], signal.SIGKILL)
    assert process.wait() == 0
    log = (torn / "log.txt").read_text()
    assert "restarted by torchrun: continuing the run" in log
    assert (torn / "log.txt.rank1").exists()

    own = [*arguments, "OUTPUT_DIR", str(whole)]
    assert load_script("train_net.py").main(["--num-gpus", "2", *own]) == 0
    models = [
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (whole, torn)
    ]
    assert all(torch.equal(models[1][name], value) for name, value in models[0].items())
