"""Numbers on their way from the device to the log, without stopping the device."""

from collections.abc import Mapping

import torch
from detectron2.utils import comm
from torch import Tensor


class MetricWindow:
    """Averages 0-d tensors over iterations and processes with one transfer per window.

    Between two calls of :meth:`flush` everything stays on the device: each iteration costs one
    stacking and one addition. The names must be the same within a window and in all processes.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the values of one iteration; other names than before start a new window."""
        values = torch.stack([value.detach().float() for value in metrics.values()])
        names = tuple(metrics)
        if self._sum is None or names != self._names:
            self._names, self._sum, self._count = names, values, 1
        else:
            self._sum = self._sum + values
            self._count += 1

    def flush(self) -> dict[str, float]:
        """Return the means since the last call and start anew.

        All processes must call; only the main process gets the means over processes.
        """
        if self._sum is None:
            return {}
        mean = self._sum / (self._count * comm.get_world_size())
        if comm.get_world_size() > 1:
            torch.distributed.reduce(mean, dst=0)
        self._sum = None
        return dict(zip(self._names, mean.tolist(), strict=True))


class FiniteCheck:
    """Asks in every iteration, in all processes at once, whether the total loss is finite.

    On CUDA the answer is copied to pinned memory right behind the forward pass. It is looked at
    after the backward pass has been queued: waiting for it then waits for a point that the device
    has passed or is about to pass, with the backward pass still ahead of it, so it never idles.
    """

    def __init__(self, total: Tensor) -> None:
        value = total.detach().float().clone()
        if comm.get_world_size() > 1:
            # The sum is finite if and only if every process has a finite loss.
            torch.distributed.all_reduce(value)
        self._event: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty((), pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._value = value

    @property
    def is_ready(self) -> bool:
        """Whether :meth:`passed` needs no waiting."""
        return self._event is None

    def passed(self) -> bool:
        """Whether the loss is finite in every process."""
        if self._event is not None:
            self._event.synchronize()
        return bool(torch.isfinite(self._value))
