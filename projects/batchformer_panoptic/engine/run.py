"""The whole of ``train_net.py``: arguments, processes, errors.

Several processes that are joined at the start and take leave at the end.
"""

import argparse
import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser, launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessRaisedException

from ..errors import UserError
from ..modeling.cpu import tune_allocation
from .setup import setup_cfg
from .trainer import PanopticTrainer


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
    """Run ``main`` like Detectron2's ``launch``, whose arguments these are, and end cleanly.

    ``launch`` leaves the process groups open. A thread of gloo that still holds a tensor while
    Python shuts down then aborts a process that has done all its work ("terminate called without
    an active exception").
    """
    launch(
        _run_and_leave,
        processes,
        num_machines=num_machines,
        machine_rank=machine_rank,
        dist_url=dist_url,
        args=(main, args),
        timeout=timeout,
    )


def _run_and_leave(main: Callable[..., None], args: tuple[Any, ...]) -> None:
    main(*args)
    # After an error the other processes may be inside a collective: then nobody waits here.
    if dist.is_initialized():
        comm.synchronize()
        # References keep the threads of a group alive.
        comm._LOCAL_PROCESS_GROUP = None
        comm._get_global_gloo_group.cache_clear()
        gc.collect()  # so does a DistributedDataParallel in a cycle
        dist.destroy_process_group()


# How a traceback ends that crossed a process border (data loader worker, launched process).
_MARKER = "batchformer_panoptic.errors.UserError: "


def argument_parser() -> argparse.ArgumentParser:
    """Return Detectron2's usual arguments and ``--init-from``.

    A free port is found unless ``--dist-url`` is given.
    """
    parser = default_argument_parser()
    parser.set_defaults(dist_url=None)
    parser.add_argument(
        "--init-from",
        default="",
        metavar="FILE",
        help="start training from a trained model of other classes: all but the class head is "
        "loaded, instead of MODEL.WEIGHTS (sets MODEL.INIT_FROM)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Train or evaluate in one or several processes.

    Raises:
        UserError: a user's mistake in whichever process it showed, in one line.
    """
    tune_allocation()
    try:
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
    except ProcessRaisedException as error:
        line = user_error_line(error)
        if line is None:
            raise
        raise UserError(line) from None


def train_or_evaluate(args: argparse.Namespace) -> None:
    """Do in one process what the arguments ask for.

    Raises:
        UserError: always of this very class, so that its message survives a process border.
    """
    try:
        _share_cores(args.num_gpus)
        cfg = setup_cfg(args)
        if args.eval_only:
            PanopticTrainer.evaluate_weights(cfg, resume=args.resume)
            return
        trainer = PanopticTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
    except UserError as error:
        raise UserError(user_error_line(error)) from error


def user_error_line(error: Exception) -> str | None:
    """Return the message of a user error, dug out of the traceback it may come with.

    None when ``error`` stems from something else.
    """
    text = str(error)
    if _MARKER in text:
        return text.rsplit(_MARKER, 1)[1].strip().splitlines()[0]
    return text if isinstance(error, UserError) else None


def _check_processes(args: argparse.Namespace) -> None:
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and args.num_gpus > gpus:
        raise UserError(f"--num-gpus {args.num_gpus}, but this machine has {gpus}")
    if args.num_machines > 1 and not args.dist_url:
        raise UserError("several machines need --dist-url tcp://HOST:PORT")


def _share_cores(processes: int) -> None:
    """Keep several CPU processes from using every core each."""
    if comm.get_world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
