"""Several processes that are joined at the start and take leave at the end."""

import gc
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm


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
