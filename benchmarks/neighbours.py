"""The quickstart's training step beside busy processes, by threads and how they wait.

Each way runs in a process of its own; they take turns. "PyTorch's default" lets threads spin for
300 000 rounds, as GNU's OpenMP runtime does on its own.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from tabulate import tabulate

from batchformer_panoptic.engine.setup import at_least
from batchformer_panoptic.engine.threads import available_cores

ALL_CORES = {"OMP_NUM_THREADS": str(available_cores())}
WAYS = {
    "as chosen here": {},
    "a thread for each core, waiting passively": ALL_CORES,
    "PyTorch's default: a thread for each core, spinning": {
        **ALL_CORES,
        "GOMP_SPINCOUNT": "300000",
    },
}
BUSY = [sys.executable, "-c", "while True: pass"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=at_least(1), default=16, help="default: %(default)s")
    parser.add_argument(
        "--busy", type=at_least(0), nargs="+", default=[0, 1], help="busy processes beside it"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        steps = {name: stack.enter_context(step_process(name, args.images)) for name in WAYS}
        load = os.getloadavg()[0]
        rows = []
        for busy in args.busy:
            with busy_processes(busy):
                times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
                for _ in range(args.rounds):
                    for name, process in steps.items():
                        times[name].append(timed_step(process))
            rows += [{"busy": busy, "way": name, "times": times[name]} for name in WAYS]
    return {"rounds": args.rounds, "images": args.images, "load": load, "rows": rows}


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    started = [subprocess.Popen(BUSY) for _ in range(number)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


@contextlib.contextmanager
def step_process(name: str, images: int) -> Iterator["subprocess.Popen[str]"]:
    """Start a process that runs a step for each line that it reads."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.neighbours", str(images)],
        env={**ours, **WAYS[name]},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        timed_step(process)  # one without effect
        yield process
        process.stdin.close()


def timed_step(process: "subprocess.Popen[str]") -> tuple[float, float]:
    """Seconds of a step, and CPU seconds of all its threads."""
    print(file=process.stdin, flush=True)
    wall, cpu = map(float, process.stdout.readline().split())
    return wall, cpu


def serve(images: int) -> None:
    from batchformer_panoptic.engine import load_config
    from batchformer_panoptic.engine.threads import limit_threads
    from helpers.tiny_model import random_inputs

    from .quickstart_cost import CONFIG, make_model
    from .transformers_cost import training_step

    model = make_model("conditional")
    limit_threads(load_config(str(CONFIG)), model, images, training=True, workers=1)
    batch = random_inputs([(96, 96)] * images)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        training_step(model, batch)
        print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


def table(result: dict[str, Any]) -> str:
    wall, cpu = (median(result["rows"][0], which) for which in (0, 1))
    rows = [
        [
            row["busy"],
            row["way"],
            f"{median(row, 0) / wall:.2f}",
            f"{max(seconds for seconds, _ in row['times']) / wall:.2f}",
            f"{median(row, 1) / cpu:.2f}",
        ]
        for row in result["rows"]
    ]
    header = [
        "busy processes",
        "threads",
        "step ÷ the first",
        "slowest step",
        "CPU time ÷ the first",
    ]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def median(row: dict[str, Any], which: int) -> float:
    return statistics.median(times[which] for times in row["times"])


def how_taken(result: dict[str, Any]) -> str:
    return (
        f"medians of {result['rounds']} rounds; other programs were running, too: the load average "
        f"was {result['load']:.1f} before the busy processes were started."
    )


if __name__ == "__main__":
    serve(int(sys.argv[1]))
