"""Curves of runs: reading of metrics.json, names of runs, choice of metrics, the figure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchformer_panoptic.errors import UserError
from batchformer_panoptic.visualization.curves import (
    MAIN_METRICS,
    choose_metrics,
    draw_curves,
    read_curves,
    run_names,
)
from helpers.commands import load_script

RECORDS = [
    {"iteration": 0, "total_loss": 5.0, "lr": 0.1},
    {"iteration": 19, "total_loss": 3.0, "lr": 0.1},
    {"iteration": 20, "panoptic_seg/PQ": 40.0},  # the last evaluation
]


def write_metrics(folder: Path, records: list[Any] = RECORDS, end: str = "\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    path.write_text("\n".join(map(json.dumps, records)) + end)
    return path


def test_values_are_those_after_an_iteration(tmp_path: Path) -> None:
    assert read_curves(write_metrics(tmp_path)) == {
        "total_loss": {1: 5.0, 20: 3.0},
        "lr": {1: 0.1, 20: 0.1},
        "panoptic_seg/PQ": {20: 40.0},
    }


def test_a_resumed_run_counts_and_a_torn_last_line_does_not(tmp_path: Path) -> None:
    again = [*RECORDS[:2], {"iteration": 19, "total_loss": 2.0}]
    path = write_metrics(tmp_path, again, end='\n{"iteration": 39, "tot')
    assert read_curves(path)["total_loss"] == {1: 5.0, 20: 2.0}


@pytest.mark.parametrize(
    "record",
    [
        *("text", [1], {"total_loss": 1.0}, {"iteration": -1}, {"iteration": 3, "lr": "high"}),
        {"iteration": float("inf")},
    ],
)
def test_other_files_are_refused_with_their_line(tmp_path: Path, record: Any) -> None:
    path = write_metrics(tmp_path, [RECORDS[0], record])
    with pytest.raises(UserError, match=r"metrics\.json, line 2: not a record"):
        read_curves(path)


def test_runs_have_the_names_by_which_they_differ(tmp_path: Path) -> None:
    def names(*folders: str) -> list[str]:
        return run_names([tmp_path / folder / "metrics.json" for folder in folders])

    assert names("a/run") == ["run"]
    assert names("a/run", "b/run") == ["a/run", "b/run"]
    assert names("x/a", "x/a/more", "x/b") == ["a", "a/more", "b"]


def test_metrics_are_chosen_in_the_order_of_the_patterns() -> None:
    runs = [{"loss_a": {}, "lr": {}}, {"bbox/AP": {}, "loss_b": {}}]
    assert choose_metrics(runs, ["*/AP", "loss_*", "l*"]) == ["bbox/AP", "loss_a", "loss_b", "lr"]
    assert choose_metrics(runs, MAIN_METRICS) == ["bbox/AP", "lr"]
    with pytest.raises(UserError, match="no metric matches PQ; there are: bbox/AP, loss_a"):
        choose_metrics(runs, ["PQ"])
    with pytest.raises(UserError, match=r"201 metrics match \*; choose at most 200"):
        choose_metrics([{str(number): {} for number in range(201)}], ["*"])


def test_each_run_has_a_line_of_its_own_and_a_label() -> None:
    curves = {"loss": {i: float(i) for i in range(1, 2001)}, "$x_": {3: float("nan"), 4: 1.0}}
    runs = {f"_$run {number}": dict(curves) for number in range(30)}
    del runs["_$run 0"]["loss"]
    figure = draw_curves(runs, ["loss", "$x_"])
    loss, other = figure.axes
    assert (len(loss.lines), loss.get_title()) == (30, "loss")
    styles = {(line.get_color(), line.get_linestyle()) for line in other.lines}
    assert len(styles) == 30
    assert len(loss.lines[0].get_xdata()) == 0
    assert len(loss.lines[1].get_xdata()) == 300  # means of consecutive values
    assert np.mean(loss.lines[1].get_ydata()) == pytest.approx(1000.5, rel=0.05)
    assert list(other.lines[1].get_xdata()) == [4]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == list(runs)
    figure.draw_without_rendering()  # no "$" is taken for a formula


def test_the_command_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_metrics(tmp_path / name)
    output = tmp_path / "new" / "curves.png"
    runs = [str(tmp_path / "a"), str(write_metrics(tmp_path / "b")), str(tmp_path / "a")]
    main = load_script("tools/plot_metrics.py").main
    assert main([*runs, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: 3 metrics of 2 runs\n"
    with Image.open(output) as picture:
        assert picture.width > 1000
    assert main([*runs, "--output", str(output.with_suffix(".doc"))]) == 2
    assert "must end with one of" in capsys.readouterr().err
