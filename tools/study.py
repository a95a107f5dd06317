"""Run a study: arms of a comparison on the same pictures, in the same order, from the same weights.

python tools/study.py benchmarks/studies/shapes_100.yaml --jobs 2   # run what is missing
python tools/study.py benchmarks/studies/shapes_100.yaml --table    # write it into docs/study.md

Each run is one call of train_net.py with one CPU thread. Its result is one JSON file in RESULTS; a
run that has one is not run again, not for another study either, and a run that was stopped is
resumed. Weights are deleted when the result is written. Exit status 1: some runs failed.

The file of a study:

    cases:                        # each with each number of pictures, each batch, each length
      shapes:
        config: configs/quickstart/batchformer_conditional_detr_shapes.yaml
        shapes: 300               # generate the pictures of each seed, and 300 held-out ones;
                                  # without it: draw them from the first of DATASETS.TRAIN
        options: {KEY: VALUE}     # config changes of the case
    arms:                         # the first one is the unit of time
      without: {options: {MODEL.BATCHFORMER.ENABLED: False}}
      with: {}
      equal_time: {options: {MODEL.BATCHFORMER.ENABLED: False}, more_steps: 1.3}
    compare: [[with, without]]    # differences to report, paired by seed
    pictures: [100]               # training pictures; "all": those of the data set
    batch: [16]
    steps: [900]                  # or images: [14400], seen in training
    seeds: 8

A seed determines the training pictures, their order and augmentation, and the initial weights of
everything but the block. Arms differ in what only training has: another model is another case.
"""

import argparse
import contextlib
import fcntl
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import yaml
from matplotlib.figure import Figure
from tabulate import tabulate

from batchformer_panoptic.data.io import (
    read_coco_json,
    read_json,
    read_json_lines,
    write_atomically,
    write_json,
)
from batchformer_panoptic.engine.setup import at_least, load_config
from batchformer_panoptic.errors import UserError, command, one_line
from batchformer_panoptic.evaluation.panoptic_evaluator import RESULTS_NAME

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = ROOT / "docs" / "results" / "study", ROOT / "docs" / "study.md"
GROUPS = ("all", "things", "stuff")
PACKAGES = ("torch", "torchvision", "numpy")
# Of a stopped run, at most this part is run again.
CHECKPOINTS = 4
MISSING = "-"

Result = Mapping[str, Any]


# --- the study -----------------------------------------------------------------------------------


class Point(NamedTuple):
    """A condition under which the arms are compared."""

    case: str
    pictures: int | str
    batch: int
    steps: int


class Run(NamedTuple):
    point: Point
    arm: str
    seed: int

    @property
    def name(self) -> str:
        case, pictures, batch, steps = self.point
        return f"{case}_{pictures}_batch{batch}_steps{steps}_{self.arm}_seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Case:
    config: str
    shapes: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Arm:
    options: dict[str, Any] = field(default_factory=dict)
    more_steps: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Study:
    """The content of a study's file.

    Raises:
        ValueError: a value that the file cannot have.
    """

    name: str
    cases: dict[str, Case]
    arms: dict[str, Arm]
    compare: list[list[str]]
    pictures: list[int | str]
    batch: list[int]
    steps: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    seeds: int

    def __post_init__(self) -> None:
        for name in (*self.cases, *self.arms):
            if not re.fullmatch(r"[a-z0-9_]+", name):
                raise ValueError(f"the name {name!r} may have a-z, 0-9 and _ only")
        if bool(self.steps) == bool(self.images):
            raise ValueError("give either steps or images")
        generates = any(case.shapes for case in self.cases.values())
        numbers = [n for n in self.pictures if n != "all" or generates]
        for number in (*numbers, *self.batch, *self.steps, *self.images, self.seeds):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{number!r} is not a number from 1 on")
        if any(number % batch for number in self.images for batch in self.batch):
            raise ValueError("images must be multiples of every batch")
        for pair in self.compare:
            if len(pair) != 2 or not set(pair) <= set(self.arms):
                raise ValueError(f"compare: {pair!r} does not name two of the arms")

    @property
    def points(self) -> list[Point]:
        return [
            Point(case, pictures, batch, length if self.steps else length // batch)
            for case in self.cases
            for pictures in self.pictures
            for batch in self.batch
            for length in self.steps or self.images
        ]

    def runs(self) -> list[Run]:
        """All runs; a seed is complete before the next one begins."""
        return [
            Run(point, arm, seed)
            for seed in range(self.seeds)
            for point in self.points
            for arm in self.arms
        ]

    def steps_of(self, point: Point, arm: str) -> int:
        return round(point.steps * self.arms[arm].more_steps)

    def settings(self, run: Run) -> dict[str, Any]:
        """What determines the result of a run, as it is recorded with the result."""
        case = self.cases[run.point.case]
        return {
            "config": case.config,
            "shapes": case.shapes,
            "options": {**case.options, **self.arms[run.arm].options},
            "pictures": run.point.pictures,
            "batch": run.point.batch,
            "steps": self.steps_of(run.point, run.arm),
            "seed": run.seed,
        }


def read_study(path: Path) -> Study:
    """Read and check the file of a study.

    Raises:
        UserError: the file is unreadable or no study, or the config refuses its options.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    try:
        for part, kind in (("cases", Case), ("arms", Arm)):
            content[part] = {name: kind(**value) for name, value in content[part].items()}
        study = Study(name=path.stem, **content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no study: {one_line(error)}; see --help") from error
    for run in study.runs():
        if run.seed == 0:
            settings = study.settings(run)
            load_config(settings["config"], as_words(settings["options"]))
    return study


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Config changes -> the words KEY VALUE of a command line."""
    return [word for key, value in options.items() for word in (key, str(value))]


# --- data and initial weights, the same for all arms ---------------------------------------------


def data_options(study: Study, point: Point, seed: int, work: Path) -> dict[str, Any]:
    """The training and test set of a point as config options; what does not exist is made.

    Raises:
        UserError: a data set cannot be made, or has fewer pictures.
    """
    case = study.cases[point.case]
    cfg = load_config(case.config, as_words(case.options))
    rows = {row[0]: list(row) for row in cfg.DATASETS.CUSTOM_PANOPTIC}
    if not cfg.DATASETS.TRAIN or not cfg.DATASETS.TEST:
        raise UserError(f"{case.config} names no data sets in DATASETS.TRAIN and DATASETS.TEST")
    train, test = cfg.DATASETS.TRAIN[0], cfg.DATASETS.TEST[0]
    if case.shapes:
        folder = work / "data" / f"shapes_{point.pictures}_{case.shapes}_seed{seed}"
        make_shapes(folder, int(point.pictures), case.shapes, seed)
        for name, split in ((train, "train"), (test, "val")):
            annotations = folder / "annotations" / f"panoptic_{split}.json"
            rows[name] = [name, *map(str, (folder / split, folder / f"panoptic_{split}"))]
            rows[name].append(str(annotations))
    elif point.pictures != "all":
        if train not in rows:
            raise UserError(f"{case.config}: {train} is not in DATASETS.CUSTOM_PANOPTIC")
        chosen = work / "data" / f"{train}_{point.pictures}_seed{seed}.json"
        source = os.path.expanduser(os.path.expandvars(rows[train][3]))
        content = drawn(read_coco_json(source), int(point.pictures), seed, source)
        write_json(chosen, content)
        rows[train][3] = str(chosen)
    return {
        "DATASETS.CUSTOM_PANOPTIC": list(rows.values()),
        "DATASETS.TRAIN": (train,),
        "DATASETS.TEST": (test,),
    }


def make_shapes(folder: Path, pictures: int, held_out: int, seed: int) -> None:
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.partial")
    script = ROOT / "datasets" / "prepare_shapes_panoptic.py"
    arguments = ["--output", unfinished, "--overwrite", "--seed", seed]
    arguments += ["--num-train", pictures, "--num-val", held_out]
    call(script, arguments, folder.with_suffix(".txt"))
    unfinished.rename(folder)


def drawn(content: dict[str, Any], pictures: int, seed: int, source: str) -> dict[str, Any]:
    """Some of the images of a COCO panoptic JSON, drawn by a seed, in their order."""
    images = content["images"]
    if pictures > len(images):
        raise UserError(f"{source} has {len(images)} pictures, not {pictures}")
    kept = sorted(random.Random(seed).sample(range(len(images)), pictures))
    ids = {images[index]["id"] for index in kept}
    annotations = [one for one in content["annotations"] if one["image_id"] in ids]
    return {**content, "images": [images[i] for i in kept], "annotations": annotations}


def initial_weights(study: Study, point: Point, seed: int, work: Path) -> Path:
    """A file with the weights that all arms start from; written by one step at learning rate 0.

    The model is built without the block, whose parameters would be drawn between those of the
    other parts and change them. An arm draws those of its block from the same seed.
    """
    path = work / "start" / f"{point.case}_seed{seed}.pth"
    if path.exists():
        return path
    folder = path.with_suffix("")
    case = study.cases[point.case]
    options = {
        **case.options,
        **data_options(study, point, seed, work),
        "MODEL.BATCHFORMER.ENABLED": False,
        "DATASETS.TEST": (),
        "SOLVER.MAX_ITER": 1,
        "SOLVER.WARMUP_ITERS": 1,
        "SOLVER.WARMUP_FACTOR": 0.0,
        "SOLVER.WARMUP_METHOD": "linear",
        "SOLVER.IMS_PER_BATCH": 2,
        "SEED": seed,
        "OUTPUT_DIR": folder,
    }
    train_net(case.config, options, folder / "console.txt")
    (folder / "model_final.pth").rename(path)
    return path


# --- one run -------------------------------------------------------------------------------------


def perform(study: Study, run: Run, results: Path, work: Path) -> Path:
    """Train and evaluate one arm, and write its result.

    Raises:
        UserError: the run failed; the message has the last line of its output.
    """
    folder, path = work / run.name, results / f"{run.name}.json"
    settings = study.settings(run)
    with locked(folder) as lock:
        if path.exists():  # another call of the study has finished it meanwhile
            return path
        with locked(work):
            weights = initial_weights(study, run.point, run.seed, work)
            data = data_options(study, run.point, run.seed, work)
        options = {
            **settings["options"],
            **data,
            "MODEL.WEIGHTS": weights,
            "SOLVER.IMS_PER_BATCH": settings["batch"],
            "SOLVER.MAX_ITER": settings["steps"],
            "SOLVER.CHECKPOINT_PERIOD": math.ceil(settings["steps"] / CHECKPOINTS),
            "TEST.EVAL_PERIOD": 0,
            "SEED": run.seed,
            "OUTPUT_DIR": folder,
        }
        train_net(settings["config"], options, folder / "console.txt", lock)
        write_json(path, {**settings, **measured(folder, settings["steps"])}, indent=1)
        for checkpoint in folder.glob("*.pth"):
            checkpoint.unlink()
    return path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock of a folder; wait for a process that a killed study has left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def train_net(config: str, options: Mapping[str, Any], log: Path, *inherited: int) -> None:
    call(
        ROOT / "train_net.py",
        ["--config-file", config, "--resume", *as_words(options)],
        log,
        *inherited,
    )


def call(script: Path, arguments: Sequence[object], log: Path, *inherited: int) -> None:
    """Run a command of this checkout with one thread; it inherits open files (a lock).

    Raises:
        UserError: its exit status is not 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT / "projects"), os.environ.get("PYTHONPATH")]))
    with open(log, "w", encoding="utf-8") as output:
        status = subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            pass_fds=inherited,
            check=False,
        ).returncode
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise UserError(f"{last.removeprefix('error: ')} (exit status {status}; see {log})")


def measured(folder: Path, steps: int) -> dict[str, Any]:
    """Quality in percent, seconds of training, and the versions behind them."""
    (evaluation,) = folder.rglob(RESULTS_NAME)
    quality = read_json(evaluation)
    records = read_json_lines(folder / "metrics.json")
    times = [record["time"] for record in records if "time" in record]
    result: dict[str, Any] = {
        metric.upper(): {group: percent((quality[group] or {}).get(metric)) for group in GROUPS}
        for metric in ("pq", "sq", "rq")
    }
    return {
        **result,
        "per_class": {one["name"]: percent(one["pq"]) for one in quality["per_class"]},
        "seconds": round(statistics.median(times) * steps, 1) if times else None,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 3)


def run_missing(study: Study, results: Path, work: Path, jobs: int) -> list[str]:
    """Run what has no result, several runs side by side; return one line for each failure."""
    missing = [run for run in study.runs() if read_result(study, run, results) is None]
    print(f"{study.name}: {len(missing)} of {len(study.runs())} runs to do", flush=True)
    failures = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(perform, study, run, results, work): run for run in missing}
        try:
            for future in as_completed(futures):
                name = futures[future].name
                try:
                    result = read_json(future.result())
                except UserError as error:
                    failures.append(f"{name}: {error}")
                    print(f"{name}: failed", flush=True)
                else:
                    print(f"{name}: PQ {result['PQ']['all']}, {result['seconds']} s", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def read_result(study: Study, run: Run, results: Path) -> Result | None:
    """The result of a run, or None.

    Raises:
        UserError: it was made with other settings.
    """
    path = results / f"{run.name}.json"
    if not path.exists():
        return None
    result: Result = read_json(path)
    for key, value in study.settings(run).items():
        if result.get(key) != value:
            raise UserError(
                f"{path} was made with {key} {result.get(key)}, and the study has {value}: "
                "remove the file, or give the case or the arm another name"
            )
    return result


# --- the report ----------------------------------------------------------------------------------


def report(study: Study, results: Path, document: Path) -> None:
    """Rewrite the study's part of the document, and its figure.

    Raises:
        UserError: the document is unreadable, or has no part for the study.
    """
    found = {run: read_result(study, run, results) for run in study.runs()}
    finished = {run: result for run, result in found.items() if result is not None}
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{document} cannot be read: {one_line(error)}") from error
    begin, end = f"<!-- {study.name} -->\n", f"<!-- end {study.name} -->"
    head, _, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not closed:
        raise UserError(f"{document} needs the lines {begin.strip()} and {end} to write between")
    # Studies share runs: a single point is not a curve, nor one arm a comparison.
    complete = [
        point for point in study.points if all(of_arm(finished, point, arm) for arm in study.arms)
    ]
    content = "Too few runs have finished yet.\n"
    if len(complete) >= min(2, len(study.points)):
        picture = Path("images") / f"study_{study.name}.svg"
        write_atomically(str(document.parent / picture), partial(draw, study, finished))
        content = f"{tables(study, finished)}\n![PQ of each arm]({picture})\n"

    def save(name: str) -> None:
        Path(name).write_text(f"{head}{begin}{content}{end}{tail}", "utf-8")

    write_atomically(str(document), save)


def of_arm(finished: Mapping[Run, Result], point: Point, arm: str) -> dict[int, Result]:
    """Results of one arm at one point, by seed."""
    return {run.seed: one for run, one in finished.items() if (run.point, run.arm) == (point, arm)}


def tables(study: Study, finished: Mapping[Run, Result]) -> str:
    """Quality and time of each arm, differences between arms, and how both were taken."""
    qualities, differences = [], []
    for point in study.points:
        arms = {arm: of_arm(finished, point, arm) for arm in study.arms}
        unit = next(iter(arms.values()))
        for arm, runs in arms.items():
            if not runs:
                continue
            times = [a / b for a, b in paired(runs, unit, lambda one: one["seconds"])]
            steps = study.steps_of(point, arm)
            qualities.append(
                [*point[:3], title(arm), steps, len(runs)]
                + [spread(values(runs, group)) for group in GROUPS]
                + [f"{statistics.mean(times):.2f}" if times else MISSING]
            )
        for one, other in study.compare:
            of_group = {group: gains(arms[one], arms[other], group) for group in GROUPS}
            gain = of_group["all"]
            if not gain:
                continue
            differences.append(
                [*point, f"{title(one)} - {title(other)}", len(gain)]
                + [spread(of_group[group], "+") for group in GROUPS]
                + [t_value(gain), f"{sum(value > 0 for value in gain)} of {len(gain)}"]
            )
    place = ["data", "pictures", "batch"]
    quality = ["PQ", "things", "stuff"]
    return "\n".join(
        [
            table(qualities, [*place, "arm", "steps", "seeds", *quality, "time"]),
            table(differences, [*place, "steps", "difference", "seeds", *quality, "t", "better"]),
            how_taken(study, list(finished.values())),
        ]
    )


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    return tabulate(rows, header, tablefmt="github", disable_numparse=True) + "\n"


def title(arm: str) -> str:
    return arm.replace("_", " ")


def values(runs: Mapping[int, Result], group: str) -> list[float]:
    """PQ of a group over the seeds, without those where the group does not exist."""
    return [one["PQ"][group] for one in runs.values() if one["PQ"][group] is not None]


def gains(runs: Mapping[int, Result], others: Mapping[int, Result], group: str) -> list[float]:
    """PQ of one arm minus that of another, by seed."""
    return [a - b for a, b in paired(runs, others, lambda one: one["PQ"][group])]


def paired(
    runs: Mapping[int, Result],
    others: Mapping[int, Result],
    value: Callable[[Result], float | None],
) -> list[tuple[float, float]]:
    """A value of two arms at each seed where both have it."""
    pairs = [(value(runs[seed]), value(others[seed])) for seed in runs if seed in others]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Format the mean and, for several values, their standard deviation."""
    if not values:
        return MISSING
    mean = f"{statistics.mean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def t_value(differences: Sequence[float]) -> str:
    """Mean over its standard error, of paired differences."""
    deviation = statistics.stdev(differences) if len(differences) > 1 else 0.0
    if deviation == 0:
        return MISSING
    return f"{statistics.mean(differences) / (deviation / math.sqrt(len(differences))):.1f}"


def how_taken(study: Study, finished: Sequence[Result]) -> str:
    versions = {f"{name} {v}" for one in finished for name, v in one["versions"].items()}
    configs = sorted({f"`{case.config}`" for case in study.cases.values()})
    devices = sorted({one["device"] for one in finished})
    return (
        "Mean ± standard deviation over the seeds; differences are paired by seed, and t is their "
        "mean over its standard error. Time of training relative to "
        f"{title(next(iter(study.arms)))}, measured while other runs took place. "
        f"{', '.join(configs)}; {', '.join(devices)}, {', '.join(sorted(versions))}.\n"
    )


def draw(study: Study, finished: Mapping[Run, Result], path: str) -> None:
    """Draw PQ: each seed of each arm, or its mean along the axis with the most values (SVG)."""
    counts = {
        "pictures": len(study.pictures),
        "batch": len(study.batch),
        "steps": len(study.steps or study.images),
    }
    axis = max(counts, key=lambda name: counts[name])
    panels: dict[tuple[str, ...], list[Point]] = {}
    for point in study.points:
        texts = {
            "pictures": f"{point.pictures} pictures",
            "batch": f"batch {point.batch}",
            "steps": f"{point.steps} steps"
            if study.steps
            else f"{point.batch * point.steps} images seen",
        }
        if counts[axis] > 1:
            del texts[axis]
        panels.setdefault((point.case, *texts.values()), []).append(point)
    # Fixed ids and no date, so that the file changes with its content only.
    with matplotlib.rc_context({"svg.hashsalt": study.name, "svg.fonttype": "none"}):
        width = max(4.5, 0.9 * len(study.arms))
        figure = Figure(figsize=(width * len(panels), 3.2), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (key, points) in zip(grid, panels.items(), strict=True):
            axes.set_title(", ".join(key), fontsize="medium")
            axes.set_ylabel("PQ")
            axes.spines[["top", "right"]].set_visible(False)
            if counts[axis] == 1:
                draw_seeds(axes, study, finished, points[0])
            else:
                draw_curves(axes, study, finished, points, axis)
        figure.savefig(path, metadata={"Date": None})


def draw_seeds(axes: Any, study: Study, finished: Mapping[Run, Result], point: Point) -> None:
    arms = {arm: of_arm(finished, point, arm) for arm in study.arms}
    for seed in range(study.seeds):
        found = {x: runs[seed] for x, runs in enumerate(arms.values()) if seed in runs}
        quality = [one["PQ"]["all"] for one in found.values()]
        axes.plot([*found], quality, "o-", color="0.75", markersize=4, linewidth=0.8)
    for x, runs in enumerate(arms.values()):
        if runs:
            axes.hlines(statistics.mean(values(runs, "all")), x - 0.25, x + 0.25, linewidth=2.5)
    axes.set_xticks(range(len(arms)), [title(arm) for arm in arms])


def draw_curves(
    axes: Any, study: Study, finished: Mapping[Run, Result], points: Sequence[Point], axis: str
) -> None:
    for number, arm in enumerate(study.arms):
        apart = 1.03**number  # so that the bars of several arms can be told apart
        by_point = {point: values(of_arm(finished, point, arm), "all") for point in points}
        known = {point: found for point, found in by_point.items() if found}
        axes.errorbar(
            [getattr(point, axis) * apart for point in known],
            [statistics.mean(found) for found in known.values()],
            [statistics.stdev(found) if len(found) > 1 else 0.0 for found in known.values()],
            marker="o",
            markersize=4,
            capsize=3,
            label=title(arm),
        )
    axes.set_xscale("log", base=2)
    ticks = [getattr(point, axis) for point in points]
    axes.set_xticks(ticks, ticks)
    axes.set_xlabel({"pictures": "training pictures", "batch": "batch", "steps": "steps"}[axis])
    axes.legend(frameon=False)


# --- the command ---------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, metavar="STUDY", help="YAML file of the study")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--table", action="store_true", help="write the document, run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="file with the tables")
    parser.add_argument(
        "--work", type=Path, default=Path("output/study"), help="folder of the runs (%(default)s)"
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    study = read_study(args.study)
    if args.table:
        report(study, args.results, args.document)
        print(args.document)
        return 0
    failures = run_missing(study, args.results, args.work, args.jobs)
    if failures:
        sys.stderr.write("".join(f"failed: {line}\n" for line in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
