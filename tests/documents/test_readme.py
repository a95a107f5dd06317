"""README.md: the code for prediction runs as printed, and its tables hold the recorded numbers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchformer_panoptic.data import load_dataset_dicts
from batchformer_panoptic.visualization import read_image, write_image
from helpers.commands import REPO_ROOT, load_script
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.trained_files import write_run

PACKAGE = REPO_ROOT / "projects" / "batchformer_panoptic"
README = (REPO_ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_prediction_runs_as_printed(
    tmp_path: Path,
    tiny_panoptic_dataset: TinyPanopticDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_run(tmp_path / "output" / "quickstart", tiny_panoptic_dataset)
    monkeypatch.chdir(tmp_path)
    dicts = load_dataset_dicts([tiny_panoptic_dataset.name], filter_empty=False)
    image = read_image(dicts[0]["file_name"])
    write_image(tmp_path / "image.png", image[:, :, ::-1])
    (block,) = re.findall(r"```python\n(.*?)```", section("Quick start"), re.S)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["segment_map"].shape == image.shape[:2]
    ids = {segment.id for segment in names["segments"]}
    assert ids
    assert ids == set(np.unique(names["segment_map"]).tolist()) - {0}


def test_prediction_of_the_guide_runs_as_printed(
    tmp_path: Path,
    tiny_panoptic_dataset: TinyPanopticDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_run(tmp_path / "output" / "quickstart", tiny_panoptic_dataset)
    shutil.copy(tiny_panoptic_dataset.image_root / "000.png", tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(
        r"```python\n(.*?)```", (REPO_ROOT / "GETTING_STARTED.md").read_text(), re.S
    )
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["prediction"].segments
    assert names["prediction"].draw().shape == (48, 64, 3)


def test_comparisons_are_those_of_the_study_and_the_benchmark() -> None:
    study = load_script("tools/study.py")
    plan = study.read_study(REPO_ROOT / "benchmarks" / "studies" / "shapes_100.yaml")
    folder = REPO_ROOT / "docs" / "results" / "study"
    results = {run: study.read_result(plan, run, folder) for run in plan.runs()}
    finished = {run: result for run, result in results.items() if result is not None}
    (point,) = plan.points
    arms = [study.of_arm(finished, point, arm) for arm in ("without", "equal_time", "with", "self")]
    seeds = set(arms[0])
    assert all(set(arm) == seeds for arm in arms)
    expected = [
        ["synthetic images, 100 for training", "PQ"]
        + [study.spread(study.values(arm, "all")) for arm in arms]
    ]
    spread = load_script("tools/make_model_zoo.py").spread
    digits = json.loads((REPO_ROOT / "benchmarks" / "results" / "digits.json").read_text())
    expected += [
        [
            f"handwritten digits, {row['labels']} labels per class",
            "top-1",
            spread(row["plain_top1"]),
            "",
            spread(row["block_top1"]),
            spread(row["self_top1"]),
        ]
        for row in digits["rows"]
    ]
    text = section("Does the block help?")
    assert rows(text) == expected
    gain, over_longer = (study.gains(arms[2], arms[other], "all") for other in (0, 1))
    assert f"{len(seeds)} seeds" in text
    assert f"{np.mean(gain):.1f} PQ" in text
    assert f"{np.mean(over_longer):.1f} more than" in text


def test_results_are_those_of_the_result_files() -> None:
    expected = []
    for name in ("quickstart_mask2former", "pennfudan_mask2former"):
        result = json.loads((REPO_ROOT / "docs" / "results" / f"{name}.json").read_text())
        expected += [
            [str(result[metric][group]) for metric in ("PQ", "SQ", "RQ")]
            for group in ("all", "things", "stuff")
        ]
    found = [row[1:] for row in rows(section("Results"))]
    assert [row for row in found if row[0] not in ("PQ", "---")] == expected


def test_the_first_minute_stays_short() -> None:
    assert section("Features").count("\n- ") <= 6
    (tree,) = re.findall(r"```\n(.*?)```", section("Repository map"), re.S)
    assert len(tree.splitlines()) <= 20
    folders = (REPO_ROOT, PACKAGE, PACKAGE / "modeling")
    for line in tree.splitlines():
        for name in re.split(r"\s{2,}", line.strip())[0].split(", "):
            assert any((folder / name).exists() for folder in folders), name
