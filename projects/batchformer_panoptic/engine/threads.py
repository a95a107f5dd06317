"""CPU threads of a process: no more than its cores, and no more than its work is worth.

A parallel operation ends when its slowest thread does. If another process takes a core for a while,
the threads on the others wait. GNU's OpenMP runtime, that of PyTorch on Linux, lets them spin for
300 000 rounds first, which keeps their cores from the thread that they wait for. The package
therefore asks for passive waiting (``OMP_WAIT_POLICY``, in ``batchformer_panoptic/__init__.py``). A
thread then has to be woken up for every operation, so that small models are faster with one thread.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from ..config import classifies

logger = logging.getLogger(__name__)

# Parameters times pixels of a batch; two threads are used from twice as much on. The CPU time of a
# training step on two threads is 1.6 times that on one at this much work, 1.4 times at twice as
# much, and 1.1 times at seven times as much.
_WORK_PER_THREAD = 2e11

_CGROUPS = Path("/sys/fs/cgroup")


def limit_threads(
    cfg: CfgNode, model: nn.Module, images: int = 1, *, training: bool = False, workers: int = 0
) -> None:
    """Set the number of threads of PyTorch's operations, unless ``OMP_NUM_THREADS`` is set.

    The cores are divided among the processes of a run on this machine. Of four or more, one is left
    to the loader, whose workers would each time stop one of the threads and so all of them. The
    number depends on machine and config only, so that a resumed run has the same one.

    Args:
        cfg: INPUT and, of a classifier, its image size.
        model: counted with its frozen parameters.
        images: of a batch in this process.
        training: the size of training images, not of test images.
        workers: of the data loader.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = available_cores() // comm.get_local_size()
    if workers > 0 and cores >= 4:
        cores -= 1
    parameters = sum(parameter.numel() for parameter in model.parameters())
    work = parameters * images * _pixels(cfg, training)
    torch.set_num_threads(max(1, int(min(cores, work / _WORK_PER_THREAD))))
    logger.debug(f"CPU threads: {torch.get_num_threads()}")


def _pixels(cfg: CfgNode, training: bool) -> int:
    """Return the pixels of the largest image that the config allows."""
    if classifies(cfg):
        return int(cfg.MODEL.CLASSIFIER.IMAGE_SIZE**2)
    if training and cfg.INPUT.LARGE_SCALE_JITTER.ENABLED:
        return int(cfg.INPUT.LARGE_SCALE_JITTER.SIZE**2)
    split = "TRAIN" if training else "TEST"
    short, long = int(np.max(cfg.INPUT[f"MIN_SIZE_{split}"])), int(cfg.INPUT[f"MAX_SIZE_{split}"])
    return (short or long) * long  # 0: images keep their size


def available_cores(cgroups: Path = _CGROUPS) -> int:
    """Return the number of cores that this process may use, at least 1.

    Schedulers restrict a process to some cores, containers to a share of the time of all cores.

    Args:
        cgroups: where Linux shows the limits of a container.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas(cgroups)])))


def _quotas(cgroups: Path) -> Iterator[float]:
    """Yield the limits of cgroups, version 2 and 1, in cores."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((cgroups / name).read_text(encoding="ascii") for name in names)
            quota, period = map(int, words.split())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if quota > 0:  # -1: no limit
            yield quota / period
