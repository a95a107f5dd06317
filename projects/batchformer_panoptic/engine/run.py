"""The body of ``train_net.py``: arguments, processes and the errors that cross their borders."""

import argparse
import ctypes
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..data.check import check_before_run
from ..errors import USER_ERROR_STATUS, UserError, printable_output, user_message
from .setup import at_least, command_parser, setup_cfg
from .trainer import PanopticTrainer

# Parameters of glibc's mallopt (malloc.h), and the upper limit of its adaptive mmap threshold.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 32 * 2**20


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
    """Run ``main`` in several processes: Detectron2's ``launch`` with two additions.

    * The process groups are closed at the end. ``launch`` leaves them open; a gloo thread that
      still holds a tensor while Python shuts down then aborts a process that has finished its work
      ("terminate called without an active exception").
    * A `UserError` of a launched process is raised here as the same object. ``launch`` itself
      passes on nothing but the text of a traceback.

    Args:
        main: importable by name, since processes are spawned.
        processes: number of processes on this machine; with one in all, ``main`` is called here.
        args: arguments of ``main``.
        num_machines: see ``launch``, as for the remaining arguments.
        machine_rank: number of this machine, from 0.
        dist_url: where the processes meet; "auto" finds a free port on this machine.
        timeout: of collective operations.

    Raises:
        UserError: a user's mistake in any of the processes.
    """
    is_launched = processes * num_machines > 1
    # The start method must be the one that torch.multiprocessing uses.
    mistakes = multiprocessing.get_context("spawn").SimpleQueue() if is_launched else None
    try:
        launch(
            _run_and_close_groups,
            processes,
            num_machines=num_machines,
            machine_rank=machine_rank,
            dist_url=dist_url,
            args=(main, args, mistakes),
            timeout=timeout,
        )
    except (ProcessExitedException, ProcessRaisedException):
        # The exception may come from another process, whose collective failed as a consequence.
        if mistakes is None or mistakes.empty():
            raise
        raise mistakes.get() from None


def _run_and_close_groups(
    main: Callable[..., None],
    args: tuple[Any, ...],
    mistakes: "SimpleQueue[UserError] | None",
) -> None:
    try:
        with printable_output():
            main(*args)
    except Exception as error:
        message = user_message(error)
        if mistakes is None or message is None:
            raise
        mistakes.put(error if isinstance(error, UserError) else UserError(message))
        # A status other than 0 makes torch end the other processes.
        sys.exit(USER_ERROR_STATUS)
    # After an error the other processes may be inside a collective operation, so that waiting for
    # them is safe only here.
    if dist.is_initialized():
        comm.synchronize()
        # References keep the threads of a group alive.
        comm._LOCAL_PROCESS_GROUP = None
        comm._get_global_gloo_group.cache_clear()
        gc.collect()  # a DistributedDataParallel in a reference cycle is such a reference
        dist.destroy_process_group()


def argument_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of Detectron2's usual arguments, ``--init-from`` and ``--overwrite``.

    Without ``--dist-url``, the processes of one machine meet at a free port.

    Args:
        description: for ``--help``, shown with its line breaks.
    """
    parser = command_parser(description, config_required=False)
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in OUTPUT_DIR, if there is one",
    )
    parser.add_argument(
        "--num-gpus",
        type=at_least(0),
        default=1,
        metavar="N",
        help="processes on this machine, one for each GPU (default: 1)",
    )
    parser.add_argument(
        "--num-machines", type=at_least(1), default=1, metavar="N", help="default: 1"
    )
    parser.add_argument(
        "--machine-rank",
        type=at_least(0),
        default=0,
        metavar="I",
        help="number of this machine, from 0 (default: 0)",
    )
    parser.add_argument(
        "--dist-url",
        metavar="URL",
        help="where several machines meet: tcp://HOST:PORT, with the host of machine 0",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        action="extend",
        metavar="KEY VALUE",
        help="config changes, as after --opts",
    )
    parser.add_argument(
        "--init-from",
        default="",
        metavar="FILE",
        help="start training from a trained model of other classes, instead of MODEL.WEIGHTS: "
        "everything is loaded except the rows of new classes (sets MODEL.INIT_FROM)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="delete the earlier run in OUTPUT_DIR (weights, logs, results) and train anew",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Train or evaluate in one or several processes.

    Raises:
        UserError: a user's mistake in any of the processes.
    """
    tune_allocation()
    _check_processes(args)
    several_machines = args.num_machines > 1
    launch_processes(
        train_or_evaluate,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url or (None if several_machines else "auto"),
        args=(args,),
    )


def train_or_evaluate(args: argparse.Namespace) -> None:
    """Run what the arguments ask for in this process.

    Raises:
        UserError: a user's mistake.
    """
    _share_cores(args.num_gpus)
    cfg = setup_cfg(args)
    check_before_run(cfg, eval_only=args.eval_only)
    if args.eval_only:
        PanopticTrainer.evaluate_weights(cfg, resume=args.resume)
        return
    trainer = PanopticTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def _check_processes(args: argparse.Namespace) -> None:
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and args.num_gpus > gpus:
        raise UserError(f"--num-gpus {args.num_gpus}, but this machine has {gpus}")
    if args.num_machines > 1 and not args.dist_url:
        raise UserError("several machines need --dist-url tcp://HOST:PORT")


def _share_cores(processes: int) -> None:
    """Divide the cores among the processes of a CPU run; each would use all of them."""
    if comm.get_world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def tune_allocation() -> None:
    """Reduce page faults of large CPU tensors: huge pages, and reuse of freed memory.

    PyTorch is told to allocate tensors above 2 MiB in huge pages where the system supports them.
    It reads the setting once, when it creates its first CPU tensor; child processes inherit it.
    glibc is told to keep freed memory (as after a backward pass) for the next step instead of
    returning it to the system, so peak memory stays with the process. Blocks above 32 MiB are still
    mapped anew each time, as by default.

    A user who has set ``THP_MEM_ALLOC_ENABLE``, ``GLIBC_TUNABLES`` or one of the ``MALLOC_``
    variables keeps that choice. Without glibc there is no effect.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
