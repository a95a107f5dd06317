"""Handwritten digits with few labels: a vision Transformer with and without BatchFormerV2.

Every run is a training of ``train_net.py`` with a config of ``configs/classification``. A round has
one seed for all arms, which determines the training images, their order and the initial weights.
All arms take the same number of steps, although a step with the block takes longer. The settings
were chosen without the block. In the arm "self" each image attends to itself only.
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import prepare_digits
import torch
from tabulate import tabulate

from batchformer_panoptic.engine.setup import add_opts_argument, at_least
from batchformer_panoptic.engine.threads import available_cores

from . import ROOT

CONFIGS = ROOT / "configs" / "classification"
ARMS = {
    "plain": ("digits_vit.yaml", ()),
    "block": ("batchformer_digits_vit.yaml", ()),
    "self": ("batchformer_digits_vit.yaml", ("MODEL.BATCHFORMER.ATTEND", "self")),
}
LABELS = (5, 10, 20)
SEEDS = 8
PACKAGES = ("torchvision", "timm", "scikit-learn")


class Job(NamedTuple):
    """One training run and its folder."""

    labels: int
    seed: int
    arm: str
    folder: str
    opts: tuple[str, ...]

    @property
    def data(self) -> Path:
        """Folder of the data set, shared by all arms."""
        return Path(self.folder) / f"digits_{self.labels}_{self.seed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rounds=SEEDS)
    parser.add_argument(
        "--labels",
        type=at_least(1),
        nargs="+",
        default=list(LABELS),
        help="of each class, in training",
    )
    parser.add_argument(
        "--jobs", type=at_least(1), default=available_cores(), help="runs at a time (%(default)s)"
    )
    add_opts_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            Job(labels, seed, arm, folder, tuple(args.opts))
            for labels in args.labels
            for seed in range(args.rounds)
            for arm in ARMS
        ]
        for job in jobs:
            prepare_digits.prepare(job.data, job.labels, job.seed, overwrite=False)
        outcomes = in_parallel(jobs, args.jobs) if args.jobs > 1 else [train(job) for job in jobs]
    rows: dict[int, dict[str, Any]] = {labels: {"labels": labels} for labels in args.labels}
    for job, outcome in zip(jobs, outcomes, strict=True):
        for what, value in outcome.items():
            rows[job.labels].setdefault(f"{job.arm}_{what}", []).append(value)
    return {
        "rounds": args.rounds,
        "options": list(args.opts),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "config": settings(args.opts),
        "rows": list(rows.values()),
    }


def settings(opts: list[str]) -> dict[str, Any]:
    """Settings of the training for the caption."""
    from batchformer_panoptic.engine import load_config

    cfg = load_config(str(CONFIGS / ARMS["plain"][0]), opts)
    return {"steps": cfg.SOLVER.MAX_ITER, "images": cfg.SOLVER.IMS_PER_BATCH}


def in_parallel(jobs: list[Job], workers: int) -> list[dict[str, Any]]:
    """Run the jobs in processes of one thread; return the outcomes in order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        outcomes = []
        for job, outcome in zip(jobs, pool.map(train, jobs), strict=True):
            print(f"{job.labels} labels, seed {job.seed}, {job.arm}: {outcome['top1']:.2f} %")
            outcomes.append(outcome)
        return outcomes


def train(job: Job) -> dict[str, Any]:
    """Train and evaluate with ``train_net.py``, without its output."""
    from batchformer_panoptic.engine import argument_parser
    from batchformer_panoptic.engine import run as train_net

    output = Path(job.folder) / f"{job.data.name}_{job.arm}"
    # Names are registered for the whole process, which may run several experiments.
    names = [f"{Path(job.folder).name}_{job.data.name}_{split}" for split in ("train", "val")]
    folders = [[name, str(job.data / name.rpartition("_")[2])] for name in names]
    opts = ["DATASETS.CUSTOM_IMAGE_FOLDERS", str(folders), "DATASETS.TRAIN", str((names[0],))]
    opts += ["DATASETS.TEST", str((names[1],)), "SEED", str(job.seed), "OUTPUT_DIR", str(output)]
    config, changes = ARMS[job.arm]
    argv = ["--config-file", str(CONFIGS / config), *opts, "MODEL.DEVICE", "cpu", *changes]
    argv += job.opts
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train_net(argument_parser().parse_args(argv))
    finally:
        logging.disable(logging.NOTSET)
    (results,) = output.rglob("classification_results.json")
    return {"top1": json.loads(results.read_text())["top1"]}


def table(result: dict[str, Any]) -> str:
    header = ["labels of each digit", "without", "with", "self"]
    header += ["with - without", "better with", "self - without", "better with self"]
    rows = []
    for row in result["rows"]:
        plain = row["plain_top1"]
        cells = [spread(row[f"{arm}_top1"]) for arm in ARMS]
        for arm in ("block", "self"):
            differences = [b - a for a, b in zip(plain, row[f"{arm}_top1"], strict=True)]
            better = sum(difference > 0 for difference in differences)
            cells += [spread(differences, "+"), f"{better} of {len(differences)}"]
        rows.append([row["labels"], *cells])
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def spread(values: list[float], sign: str = "") -> str:
    """Format the mean and, for several values, their standard deviation."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def how_taken(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{versions}; top-1 in percent on 899 pictures, mean ± standard deviation of "
        f"{result['rounds']} seeds, {result['config']['steps']} steps of "
        f"{result['config']['images']} pictures."
    )
