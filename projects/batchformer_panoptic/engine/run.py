"""The body of ``train_net.py``: arguments, the choice of processes, and what each of them runs."""

import argparse
import contextlib
import ctypes
import logging
import os
from datetime import timedelta
from pathlib import Path

import torch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..data.check import check_before_run
from ..errors import UserError
from ..signals import follow_parent
from .output_folder import replacing
from .processes import Member, find_member, launch_processes, restarted_by, run_as_member
from .setup import at_least, command_parser, setup_cfg
from .trainer import PanopticTrainer

logger = logging.getLogger(__name__)

# The options of processes that are started here, with their defaults.
_OWN_PROCESSES = {"--num-gpus": 1, "--num-machines": 1, "--machine-rank": 0, "--dist-url": None}

# Parameters of glibc's mallopt (malloc.h), and the upper limit of its adaptive mmap threshold.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 32 * 2**20


def argument_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of Detectron2's usual arguments and a few of this project.

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
        "--dist-timeout",
        type=at_least(1),
        default=int(DEFAULT_TIMEOUT.total_seconds()),
        metavar="SECONDS",
        help="give up a process that does not answer the others for so long (default: %(default)s)",
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

    They are started here, unless torchrun, srun or mpirun has started several. A command that
    torchrun or SLURM runs once more continues the run as with ``--resume``.

    Raises:
        UserError: a user's mistake in any of the processes, or a process that was lost.
        Stopped: by a signal.
    """
    tune_allocation()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow_parent()
    several_machines = args.num_machines > 1
    member = find_member(os.environ)
    if member is not None and member.launcher == "srun" and several_machines:
        member = None  # one task for each machine, which starts the processes of its GPUs
    _check_processes(args, member)
    timeout = timedelta(seconds=args.dist_timeout)
    if member is not None:
        run_as_member(train_or_evaluate, member, args=(args,), timeout=timeout)
        return
    launch_processes(
        train_or_evaluate,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url or (None if several_machines else "auto"),
        args=(args,),
        timeout=timeout,
    )


def train_or_evaluate(args: argparse.Namespace) -> None:
    """Run what the arguments ask for in this process.

    Raises:
        UserError: a user's mistake.
    """
    # Of several machines, torchrun counts a restart only where it has lost a process.
    schedulers = [name for name in comm.all_gather(restarted_by(os.environ)) if name]
    if schedulers and not args.eval_only:
        args.resume, args.overwrite = True, False
    cfg = setup_cfg(args)
    # Until the training starts, --overwrite has deleted nothing.
    folder = Path(cfg.OUTPUT_DIR)
    with replacing(folder) if comm.is_main_process() else contextlib.nullcontext():
        check_before_run(cfg, eval_only=args.eval_only)
        if args.eval_only:
            PanopticTrainer.evaluate_weights(cfg, resume=args.resume)
            return
        if schedulers:
            logger.info(f"restarted by {schedulers[0]}: continuing the run as with --resume")
        trainer = PanopticTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
    trainer.train()


def _check_processes(args: argparse.Namespace, member: Member | None) -> None:
    if member is not None:
        for option, default in _OWN_PROCESSES.items():
            value = getattr(args, option[2:].replace("-", "_"))
            if value != default:
                raise UserError(
                    f"{member.launcher} has started {member.world_size} processes: leave out "
                    f"{option} {value}, which is for runs that start their processes themselves"
                )
        return
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and args.num_gpus > gpus:
        raise UserError(f"--num-gpus {args.num_gpus}, but this machine has {gpus}")
    if args.num_machines > 1 and not args.dist_url:
        raise UserError("several machines need --dist-url tcp://HOST:PORT")
    if args.machine_rank >= args.num_machines:
        raise UserError(
            f"--machine-rank {args.machine_rank} of --num-machines {args.num_machines}: machines "
            "are numbered from 0"
        )


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
