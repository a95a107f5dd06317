"""A training step in several processes against the same step in one: what the exchange costs.

The quickstart's model, with --images for each process; several CPU processes with one thread each
or, on a machine with GPUs, one process for each of --processes GPUs. A round lets one process work
while the others wait, and then all of them: without exchange of gradients, with it, and with
gradients in bfloat16. A step ends when all processes are done.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from batchformer_panoptic.data.io import read_json, write_json
from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.processes import launch_processes
from batchformer_panoptic.engine.setup import at_least
from batchformer_panoptic.engine.trainer import parallel
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.set_prediction import criterion
from helpers.tiny_model import NUM_CLASSES, NUM_THINGS, random_inputs

from .measure import in_turns, median_ratio
from .quickstart_cost import CONFIG
from .transformers_cost import training_step

ONE, NO_EXCHANGE = "one process, the others wait", "all, without exchange"
EXCHANGES = {"all": "none", "all, gradients in bfloat16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=at_least(2), default=2, help="default: %(default)s")
    parser.add_argument(
        "--images", type=at_least(1), default=8, help="of a process; default: %(default)s"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and args.processes > gpus:
        raise UserError(f"--processes {args.processes}, but this machine has {gpus} GPUs")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        launch_processes(
            in_process, args.processes, args=(str(path), args.rounds, args.images), dist_url="auto"
        )
        found: dict[str, Any] = read_json(path)
    times = found.pop("times")
    rows = [
        {
            "way": way,
            "seconds": statistics.median(seconds),
            "times_as_long": median_ratio(seconds, times[ONE]),
        }
        for way, seconds in times.items()
    ]
    settings = {"processes": args.processes, "images": args.images, "rounds": args.rounds}
    return {**settings, **found, "rows": rows}


def in_process(path: str, rounds: int, images: int) -> None:
    """Take the turns of all processes together; the first one writes its times."""
    torch.set_num_threads(1)
    batch = random_inputs([(96, 96)] * images, seed=comm.get_rank())
    model = make_model("none")
    assert isinstance(model, nn.parallel.DistributedDataParallel)

    def one() -> None:
        if comm.is_main_process():
            # The losses of a run of one process need no mean over the others.
            with mock.patch.object(criterion, "num_processes", return_value=1):
                training_step(model.module, batch)

    def without_exchange() -> None:
        with model.no_sync():
            training_step(model, batch)

    ways = {ONE: one, NO_EXCHANGE: without_exchange}
    for name, compression in EXCHANGES.items():
        ways[name] = partial(training_step, make_model(compression), batch)
    times = in_turns({name: partial(together, way) for name, way in ways.items()}, rounds)
    if comm.is_main_process():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        write_json(Path(path), {"trained_parameters": trained, "times": times})


def make_model(compression: str) -> nn.Module:
    cfg = load_config(str(CONFIG), ["SOLVER.GRADIENT_COMPRESSION", compression])
    cfg.MODEL.DETR.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(NUM_THINGS))
    torch.manual_seed(0)
    return parallel(build_model(cfg), cfg)


def together(way: Any) -> None:
    way()
    comm.synchronize()


def table(result: dict[str, Any]) -> str:
    count, images = result["processes"], result["images"]
    header = [f"{count} processes, {images} images each", "step ÷ that of one", "images a second ÷"]
    rows = [
        [
            row["way"],
            f"{row['times_as_long']:.2f}",
            f"{(1 if row['way'] == ONE else count) / row['times_as_long']:.2f}",
        ]
        for row in result["rows"]
    ]
    bytes_of_gradients = result["trained_parameters"] * 4 / 1e6
    return (
        f"{tabulate(rows, header, tablefmt='github', disable_numparse=True)}\n\n"
        f"Gradients of {bytes_of_gradients:.1f} MB in float32."
    )
