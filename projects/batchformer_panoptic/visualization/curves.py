"""Curves of one or several runs, from the ``metrics.json`` that each of them writes."""

import fnmatch
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..errors import UserError

METRICS_NAME = "metrics.json"

# Shown unless other metrics are named.
MAIN_METRICS = (
    *("total_loss", "original/total_loss", "batchformer/total_loss"),
    *("*/PQ", "*/PQ_th", "*/PQ_st", "*/AP", "*/mIoU", "*/top1", "class_error"),
    *("kept_queries", "matched_objects", "attention_entropy_*", "grad_norm", "lr"),
    *("images_per_second", "time", "data_time", "gpu_memory", "cpu_memory"),
)
_UNITS = {
    "class_error": "%",
    "attention_entropy": "nats",
    "time": "s",
    "data_time": "s",
    "gpu_memory": "MiB",
    "cpu_memory": "MiB",
}
_MAX_PANELS = 200
_MAX_POINTS = 300
_DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
_COLUMNS = 4
_PANEL_INCHES = (3.6, 2.5)
_LEGEND_CHARACTERS = 130  # of a row, at the width of four panels

Curves = dict[str, dict[int, float]]
"""Name of a metric: its values by iteration, from 1."""


def read_curves(path: Path) -> Curves:
    """Read the metrics of a run.

    Of an iteration that occurs twice, as in a run that was killed and resumed, the later value
    counts. An incomplete last line, which a killed run leaves, is passed over.

    Args:
        path: ``metrics.json``.

    Raises:
        UserError: the file is missing, or is not what a run writes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"{path} cannot be read: {reason}") from None
    lines = text.splitlines()
    if not text.endswith(("\n", "}")):
        del lines[-1:]
    records = [_record(line, f"{path}, line {n}") for n, line in enumerate(lines, 1)]
    # The last evaluation is logged as one iteration after the last step.
    steps = max((r["iteration"] for r in records if "total_loss" in r), default=math.inf)
    curves: Curves = {}
    for record in records:
        iteration = int(min(record.pop("iteration"), steps)) + 1
        for name, value in record.items():
            curves.setdefault(name, {})[iteration] = value
    return curves


def _record(line: str, where: str) -> dict[str, float]:
    try:
        record = json.loads(line)
        if isinstance(record, dict) and 0 <= record["iteration"] < math.inf:
            return {name: float(value) for name, value in record.items()}
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        pass
    raise UserError(f"{where}: not a record of metrics, a JSON object of numbers with iteration")


def find_metrics(run: str) -> Path:
    """Return the ``metrics.json`` of a run, which is a folder or the file itself.

    Raises:
        UserError: there is none.
    """
    path = Path(run) / METRICS_NAME if os.path.isdir(run) else Path(run)
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the OUTPUT_DIR of a training")
    return path


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return the folders of runs, relative to the one that contains them all."""
    folders = [path.resolve().parent for path in paths]
    shared = os.path.commonpath(folders) if len(folders) > 1 else folders[0].parent
    return [str(folder.relative_to(shared)) for folder in folders]


def choose_metrics(runs: Sequence[Curves], patterns: Sequence[str]) -> list[str]:
    """Return the metrics of any run that match a pattern, in the order of the patterns.

    Raises:
        UserError: there are none, or too many for one figure.
    """
    known = list(dict.fromkeys(name for curves in runs for name in curves))
    chosen = [name for pattern in patterns for name in fnmatch.filter(known, pattern)]
    chosen = list(dict.fromkeys(chosen))
    if not chosen:
        listed = ", ".join(sorted(known)[:20]) or "none"
        raise UserError(f"no metric matches {' '.join(patterns)}; there are: {listed}")
    if len(chosen) > _MAX_PANELS:
        raise UserError(
            f"{len(chosen)} metrics match {' '.join(patterns)}; choose at most {_MAX_PANELS}"
        )
    return chosen


def draw_curves(runs: Mapping[str, Curves], metrics: Sequence[str]) -> Figure:
    """Draw a panel for each metric, with a line for each run that has it.

    Of a long run, consecutive values are averaged, so that a line has at most 300 points. Values
    that are not finite are left out.
    """
    columns = min(_COLUMNS, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    width, height = _PANEL_INCHES
    longest = max(map(len, runs)) + 6
    in_row = max(1, min(len(runs), int(_LEGEND_CHARACTERS * columns / _COLUMNS) // longest))
    legend_rows = math.ceil(len(runs) / in_row) if len(runs) > 1 else 0
    size = (max(width * columns, 0.09 * longest), height * rows + 0.2 * legend_rows + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    styles = [_style(index) for index in range(len(runs))]
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, metric in zip(panels, metrics, strict=False):
        for curves, style in zip(runs.values(), styles, strict=True):
            _draw(axes, curves.get(metric, {}), style)
        _finish(axes, metric)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    if legend_rows:
        handles = [Line2D([], [], **style) for style in styles]
        # Set afterwards: a legend leaves out labels that start with an underscore.
        legend = figure.legend(
            handles,
            ["run"] * len(runs),
            loc="outside lower center",
            ncols=in_row,
            fontsize=8,
            frameon=False,
        )
        for text, name in zip(legend.get_texts(), runs, strict=True):
            text.set(text=name, parse_math=False)
    return figure


def _style(index: int) -> dict[str, Any]:
    """Colour and dashes of a run; ten runs with the same dashes differ in colour."""
    return {"color": f"C{index % 10}", "linestyle": _DASHES[index // 10 % len(_DASHES)]}


def _draw(axes: Axes, points: Mapping[int, float], style: Mapping[str, Any]) -> None:
    finite = np.array([point for point in sorted(points.items()) if math.isfinite(point[1])])
    shown = np.array([group.mean(0) for group in np.array_split(finite, _MAX_POINTS) if len(group)])
    marker = "o" if len(shown) <= 20 else ""
    axes.plot(*shown.reshape(-1, 2).T, marker=marker, markersize=2.5, linewidth=1.1, **style)


def _finish(axes: Axes, metric: str) -> None:
    unit = next((u for n, u in _UNITS.items() if re.fullmatch(rf"{n}(_\d+)?", metric)), None)
    title = axes.set_title(f"{metric}, {unit}" if unit else metric, fontsize=9)
    title.set(parse_math=False, wrap=True)
    axes.set_xlabel("iteration", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
