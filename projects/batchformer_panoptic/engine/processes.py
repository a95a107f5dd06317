"""The processes of a run: started here, or joined after torchrun, srun or mpirun has started them.

Both ways lead to one process group with Detectron2's local groups, and end with the groups closed.
"""

import contextlib
import gc
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import (
    USER_ERROR_STATUS,
    Stopped,
    UserError,
    one_line,
    printable_output,
    user_message,
)
from ..signals import STOP_SIGNALS, Handler, describe, follow_parent, handling, ignore, stop_at_once

_Failure = ProcessExitedException | ProcessRaisedException

# Launcher: its variables for the rank, the number of processes, and the number on this machine.
# torchrun comes first, since srun may have started it.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
# "gpu[07-09,12],cpu1": the name, with the first number in brackets, and anything after a comma.
_FIRST_HOST = re.compile(r"([\w.-]+)(?:\[(\w+)[^\]]*\]([\w.-]*))?(?:,.*)?")
_UNANSWERED = 5.0  # seconds until a process counts as lost after a collective operation has failed


# Processes that are started here.


def launch_processes(
    main: Callable[..., None],
    processes: int,
    *,
    args: tuple[Any, ...] = (),
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = "auto",
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Run ``main`` in several processes: Detectron2's ``launch`` with a few additions.

    * The process groups are closed at the end. ``launch`` leaves them open; a gloo thread that
      still holds a tensor while Python shuts down then aborts a process that has finished its work
      ("terminate called without an active exception").
    * A `UserError` or `Stopped` of a launched process is raised here as the same object. ``launch``
      itself passes on nothing but the text of a traceback.
    * Signals are passed on to the processes, which end with this one, however it ends.

    Args:
        main: importable by name, since processes are spawned.
        processes: number of processes on this machine; with one in all, ``main`` is called here.
        args: arguments of ``main``.
        num_machines: see ``launch``, as for the remaining arguments.
        machine_rank: number of this machine, from 0.
        dist_url: where the processes meet; "auto" finds a free port on this machine.
        timeout: of collective operations.

    Raises:
        UserError: a user's mistake in any of the processes, or a process that was lost.
        Stopped: by a signal.
    """
    is_launched = processes * num_machines > 1
    # The start method must be the one that torch.multiprocessing uses.
    mistakes = multiprocessing.get_context("spawn").SimpleQueue() if is_launched else None
    received: list[int] = []
    passing_on = handling(_pass_on(processes, received))
    try:
        with passing_on if is_launched else contextlib.nullcontext():
            launch(
                _run_and_close_groups,
                processes,
                num_machines=num_machines,
                machine_rank=machine_rank,
                dist_url=dist_url,
                args=(main, args, mistakes),
                timeout=timeout,
            )
    except (ProcessExitedException, ProcessRaisedException) as error:
        lost = _describe_lost(error, machine_rank * processes)
        if lost and not received:
            if getattr(error, "signal_name", "") == "SIGABRT":
                # A thread of gloo may abort a process that has given its reason, at its end.
                _raise_first(mistakes, UserError)
            raise UserError(lost) from None
        number = received[0] if received else getattr(error, "exit_code", 0) - 128
        is_stopped = number in STOP_SIGNALS
        # The exception may come from another process, whose collective failed as a consequence. The
        # others get a SIGTERM, which is the reason only if the first one was stopped, too.
        _raise_first(mistakes, UserError if not is_stopped else (UserError, Stopped))
        if is_stopped:
            raise Stopped(describe(number), number) from None
        unmet = re.search(r"torch\.distributed\.Dist(?:Network|Store)Error: (.*)", error.msg)
        if unmet:
            raise UserError(f"the processes do not meet at {dist_url}: {unmet[1]}") from None
        raise
    _raise_first(mistakes, (UserError, Stopped))


def _raise_first(
    mistakes: "SimpleQueue[UserError | Stopped] | None",
    kinds: type[BaseException] | tuple[type[BaseException], ...],
) -> None:
    """Raise what a process has passed on: the first mistake, or else a stop with its line."""
    found = []
    while mistakes is not None and not mistakes.empty():
        found.append(mistakes.get())
    found = [reason for reason in found if isinstance(reason, kinds)]
    if found:
        raise max(found, key=lambda r: (isinstance(r, UserError), bool(str(r)))) from None


def _pass_on(processes: int, received: list[int]) -> Handler:
    """Return a handler that sends signals to the processes, and ends a start that it meets."""

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        children = multiprocessing.active_children()
        for child in children:
            if child.pid is not None:
                os.kill(child.pid, number)
        if len(children) < processes:
            stop_at_once(number, frame)

    return pass_on


def _describe_lost(error: _Failure, first_rank: int) -> str:
    """Return the line for a process that a signal has ended, "" for other failures."""
    if not isinstance(error, ProcessExitedException) or error.exit_code >= 0:
        return ""
    rank = first_rank + error.error_index
    hint = ", as the system does if memory runs out" if error.signal_name == "SIGKILL" else ""
    return (
        f"rank {rank} was ended by {error.signal_name}{hint}: "
        "--resume continues from the last checkpoint"
    )


def _run_and_close_groups(
    main: Callable[..., None],
    args: tuple[Any, ...],
    mistakes: "SimpleQueue[UserError | Stopped] | None",
) -> None:
    if mistakes is not None:
        follow_parent()
    try:
        with printable_output(), handling(stop_at_once):
            _run_reporting_refusals(main, args)
    except (UserError, Stopped) as reason:
        together = isinstance(reason, Stopped) and reason.together
        if mistakes is not None:
            mistakes.put(reason)
        if together:
            with handling(ignore):
                _close_groups()
        if mistakes is None:
            raise
        if not together:
            # A status other than 0 makes torch end the other processes.
            sys.exit(reason.status if isinstance(reason, Stopped) else USER_ERROR_STATUS)
        return
    # After an error the other processes may be inside a collective operation, so that waiting for
    # them is safe only here.
    _close_groups()


def _run_reporting_refusals(main: Callable[..., None], args: tuple[Any, ...]) -> None:
    try:
        _run_naming_lost_processes(main, args)
    except Exception as error:
        message = user_message(error)
        if message is None or isinstance(error, UserError):
            raise
        raise UserError(message) from error


def _close_groups() -> None:
    if dist.is_initialized():
        comm.synchronize()
        # References keep the threads of a group alive.
        comm._LOCAL_PROCESS_GROUP = None
        comm._get_global_gloo_group.cache_clear()
        gc.collect()  # a DistributedDataParallel in a reference cycle is such a reference
        dist.destroy_process_group()


# Processes that are lost.


def is_failed_collective(error: BaseException | None) -> bool:
    """Whether an error says that other processes do not take part in a collective operation."""
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return comm.get_world_size() > 1 and (is_gloo or isinstance(error, dist.DistError))


def _run_naming_lost_processes(main: Callable[..., None], args: tuple[Any, ...]) -> None:
    try:
        main(*args)
    except RuntimeError as error:
        lost = _silent_ranks() if is_failed_collective(error) else []
        if not lost:
            raise
        names = ", ".join(map(str, lost))
        raise UserError(
            f"rank {names} of {comm.get_world_size()} does not answer (it has died, hangs, or is "
            f"slower than --dist-timeout): {_reason(error)}; --resume continues from the last "
            "checkpoint"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the first line of an error without gloo's place in its source."""
    return re.sub(r"^\[[^]]*\] ?", "", one_line(error, first_line_only=True))


def _silent_ranks() -> list[int]:
    """Return the ranks in which no collective operation fails, though one has failed here."""
    store = dist.distributed_c10d._get_default_store()
    keys = [f"failed/{rank}" for rank in range(comm.get_world_size())]
    try:
        store.set(keys[comm.get_rank()], "")
        end = time.monotonic() + _UNANSWERED
        silent = list(range(len(keys)))
        while silent and time.monotonic() < end:
            silent = [rank for rank in silent if not store.check([keys[rank]])]
            time.sleep(0.1)
        return silent
    except RuntimeError:  # the store of `launch` and of srun is in the process of rank 0
        return [0]


# Processes that another program has started.


class Member(NamedTuple):
    """A process that a launcher has started together with others.

    Attributes:
        launcher: "torchrun", "srun" or "mpirun".
        rank: number of the process, from 0.
        world_size: number of processes, more than 1.
        local_rank: number of the process on its machine, from 0.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int


def find_member(environ: Mapping[str, str]) -> Member | None:
    """Return what a launcher has written into the environment, None for a process of its own.

    A batch script of SLURM has the variables of an srun with all tasks of the job, but is one task.

    Raises:
        UserError: variables that are missing or no numbers.
    """
    for launcher, names in _LAUNCHERS.items():
        if names[0] not in environ:
            continue
        values = {name: environ.get(name, "") for name in names}
        if launcher == "srun":
            is_script = environ.get("ENVIRONMENT") == "BATCH"
            tasks = "1" if is_script else environ.get("SLURM_NTASKS", "1")
            values["SLURM_NTASKS"] = environ.get("SLURM_STEP_NUM_TASKS", tasks)
        for name, value in values.items():
            if not value.isdecimal():
                raise UserError(f"{launcher} sets {', '.join(names)}, but {name} is {value!r}")
        member = Member(launcher, *map(int, values.values()))
        if member.rank >= member.world_size:
            raise UserError(f"{names[0]} is {member.rank}, but {names[1]} is {member.world_size}")
        return member if member.world_size > 1 else None
    if environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"WORLD_SIZE is {environ['WORLD_SIZE']}, but RANK is not set")
    return None


def restarted_by(environ: Mapping[str, str]) -> str:
    """Return the name of the scheduler that runs this command once more, "" the first time."""
    counts = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "SLURM": "SLURM_RESTART_COUNT"}
    return next((name for name, key in counts.items() if environ.get(key, "0") != "0"), "")


def run_as_member(
    main: Callable[..., None], member: Member, *, args: tuple[Any, ...], timeout: timedelta
) -> None:
    """Join the process group of a launcher's processes and run ``main``.

    Args:
        main: called with ``args``.
        member: this process.
        args: arguments of ``main``.
        timeout: of meeting, and of collective operations.

    Raises:
        UserError: the processes do not meet, or their places on the machines cannot be used; or a
            user's mistake in this process, or a process that was lost.
        Stopped: by a signal.
    """
    _set_meeting_point(member, os.environ)
    with handling(stop_at_once):
        _join_group(member, timeout)
    _run_and_close_groups(main, args, None)


def _set_meeting_point(member: Member, environ: MutableMapping[str, str]) -> None:
    """Fill in MASTER_ADDR and MASTER_PORT for srun, from its first host and the number of the job.

    Raises:
        UserError: they are missing, or the first host is not known.
    """
    if member.launcher == "srun":
        hosts = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
        found = _FIRST_HOST.fullmatch(hosts)
        if found:
            environ.setdefault("MASTER_ADDR", "".join(part or "" for part in found.groups()))
        job, step = (environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        if job.isdecimal() and step.isdecimal():
            # Below the ports that Linux gives to programs that do not choose one.
            environ.setdefault("MASTER_PORT", str(15000 + (int(job) + int(step)) % 15000))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise UserError(
            f"{member.launcher} has started {member.world_size} processes: set "
            f"{' and '.join(missing)}, where they meet: the host of rank 0, and a free port"
        )


def _restarts_here(environ: Mapping[str, str]) -> str:
    """Return how often torchrun has restarted this group, for groups on one machine.

    Its store outlives a restart, with the addresses of the processes before it, which the new ones
    must not find. Of several machines, each counts its own restarts.
    """
    one_machine = environ.get("LOCAL_WORLD_SIZE") == environ.get("WORLD_SIZE")
    return environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"


def _join_group(member: Member, timeout: timedelta) -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        # srun may show a process its own GPU only.
        gpus = torch.cuda.device_count()
        if 1 < gpus <= member.local_rank:
            raise UserError(
                f"{member.launcher} has started process {member.local_rank} (from 0) on a machine "
                f"with {gpus} GPUs: start one process for each GPU"
            )
        torch.cuda.set_device(member.local_rank if gpus > 1 else 0)
    try:
        store, *_ = next(dist.rendezvous("env://", member.rank, member.world_size, timeout=timeout))
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            store=dist.PrefixStore(f"start_{_restarts_here(os.environ)}", store),
            rank=member.rank,
            world_size=member.world_size,
            timeout=timeout,
        )
        local_ranks = comm.all_gather(member.local_rank)
    except (RuntimeError, ValueError) as error:  # ValueError: of MASTER_PORT
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {member.rank} of the {member.world_size} processes of {member.launcher} does "
            f"not meet the others at {place} (MASTER_ADDR, MASTER_PORT): {_reason(error)}"
        ) from error
    local_size = max(local_ranks) + 1
    if local_ranks != [rank % local_size for rank in range(member.world_size)]:
        raise UserError(
            f"{member.launcher} has placed the processes on the machines as {local_ranks}: start "
            "as many on each, with consecutive ranks (srun --distribution=block)"
        )
    comm.create_local_process_group(local_size)
    comm.synchronize()
