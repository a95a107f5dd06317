"""Measurement of time and memory: side by side in one run, in turns, medians of ratios."""

import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, including the work that it started on a GPU."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one untimed call of each.

    A round calls all functions one after the other, so that other load on the machine affects all
    of them. Every second round is in reverse order.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        names = list(functions)[:: -1 if number % 2 else 1]
        for name in names:
            times[name].append(seconds(functions[name]))
    return times


def median_ratio(times: list[float], reference: list[float]) -> float:
    """Median over the rounds of the ratio of both times."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def compared(
    ours: Callable[..., Tensor],
    usual: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    rounds: int,
) -> dict[str, float]:
    """Time two functions with the same result, with and without the gradients of their inputs.

    Asserts that results and gradients differ by less than 1e-4 relative to the largest value.
    """
    ways = {"ours": ours, "usual": usual}
    found = ([_forward(way, inputs), *_with_backward(way, inputs)] for way in (ours, usual))
    differences = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True)
    ]
    assert max(differences) < 1e-4, differences
    row = {"largest_difference": max(differences)}
    for what, step in (("forward", _forward), ("with_backward", _with_backward)):
        times = in_turns({name: partial(step, way, inputs) for name, way in ways.items()}, rounds)
        row[what] = median_ratio(times["usual"], times["ours"])
        row[f"{what}_seconds"] = statistics.median(times["ours"])
    return row


def table_of_compared(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows of `compared`, each with a ``case``, as a table."""
    header = ["case", "forward: times as fast", "with backward", "largest relative difference"]
    cells = [
        [
            row["case"],
            f"{row['forward']:.2f}",
            f"{row['with_backward']:.2f}",
            f"{row['largest_difference']:.0e}",
        ]
        for row in rows
    ]
    return tabulate(cells, header, tablefmt="github", disable_numparse=True)


def _forward(way: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return way(*inputs)


def _with_backward(way: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(way(*inputs).square().sum(), inputs)


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak bytes of tensors during one call, in addition to those alive before it.

    Measured by the allocator on a GPU, and from the allocations that the profiler records on a CPU.
    """
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    # Only the raw events contain the allocations within an operation.
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((nbytes for _, nbytes in changes), initial=0))


def python_peak_bytes(function: Callable[[], object]) -> int:
    """Peak bytes of Python and numpy objects during one call, without PyTorch's tensors."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def exponent(steps: Sequence[int], costs: Sequence[float]) -> float:
    """Fit p in cost = c * step ** p by least squares of logarithms."""
    slope, _ = np.polyfit(np.log(steps), np.log(costs), 1)
    return float(slope)


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of a measurement."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
