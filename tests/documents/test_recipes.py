"""docs/recipes.md against the configs: every value in its tables, and every schedule."""

import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

from batchformer_panoptic import add_batchformer_panoptic_config
from helpers.commands import REPO_ROOT

DOCUMENT = REPO_ROOT / "docs" / "recipes.md"
COCO = REPO_ROOT / "configs" / "coco"
RECIPES = sorted(p for p in COCO.rglob("*.yaml") if not p.name.startswith("Base-"))
TRAIN_IMAGES = 118287
CLASSIFICATION = REPO_ROOT / "configs" / "classification"
CLASSIFIERS = sorted(p for p in CLASSIFICATION.glob("*.yaml") if not p.name.startswith("Base-"))
IMAGENET_IMAGES = 1281167


class Row(NamedTuple):
    """One line of a table with a column ``key``."""

    config: str
    key: str
    value: str
    verdict: str


class Schedule(NamedTuple):
    """One config of a line of the table of schedules."""

    config: str
    processes: int
    images: int
    epochs: int
    drop: int
    max_iter: int
    steps: int


@functools.cache
def merged(path: Path) -> CfgNode:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


def load(path: Path) -> CfgNode:
    return merged(path).clone()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def values() -> list[Row]:
    rows, config, columns = [], "", 0
    for line in DOCUMENT.read_text().splitlines():
        if found := re.match(r"Config: \[(\S+)\]", line):
            config = found[1]
        if line.startswith("| what |"):
            assert cells(line) == ["what", "public code", "key", "value", ""]
            columns = 5
        elif not line.startswith("|"):
            columns = 0
        elif columns and not line.startswith("|---"):
            _, _, key, value, verdict = cells(line)
            rows.append(Row(config, key.strip("`"), value, verdict))
    return rows


def schedules() -> list[Schedule]:
    pattern = re.compile(
        r"\| (?P<configs>[\w/, ]+) \| (\d+) \S (\d+) \| (\d+) / (\d+) \| .+ \| (\d+) \| (\d+) \|"
    )
    found = [pattern.fullmatch(line) for line in DOCUMENT.read_text().splitlines()]
    return [
        Schedule(config, *map(int, match.groups()[1:]))
        for match in found
        if match is not None
        for config in match["configs"].split(", ")
    ]


def plain(value: Any) -> Any:
    """Lists for the tuples that YAML cannot write."""
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_the_document_is_understood() -> None:
    rows = values()
    assert len(rows) > 70
    assert {row.config for row in rows} >= {
        "configs/Base-DETR.yaml",
        "configs/coco/panoptic/detr_R50_masks_25ep.yaml",
        "configs/coco/detection/deformable_detr_R50_50ep.yaml",
    }
    assert len(schedules()) > 15


@pytest.mark.parametrize("row", values(), ids=lambda row: f"{Path(row.config).stem}-{row.key}")
def test_documented_value(row: Row) -> None:
    node: Any = merged(REPO_ROOT / row.config)
    for name in row.key.split("."):
        node = node[name]
    assert plain(node) == yaml.safe_load(row.value)
    assert row.verdict, "same, or what differs and why"


@pytest.mark.parametrize("schedule", schedules(), ids=lambda schedule: schedule.config)
def test_documented_schedule(schedule: Schedule) -> None:
    cfg = load(COCO / f"{schedule.config}.yaml").SOLVER
    epoch = math.ceil(TRAIN_IMAGES / schedule.processes) // schedule.images
    assert schedule.processes * schedule.images == cfg.IMS_PER_BATCH
    assert epoch * schedule.epochs == schedule.max_iter == cfg.MAX_ITER
    assert (epoch * schedule.drop,) == (schedule.steps,) == cfg.STEPS
    assert 5 * epoch == cfg.CHECKPOINT_PERIOD
    assert schedule.config.endswith(f"_{schedule.epochs}ep")


@pytest.mark.parametrize(
    "path", [p for p in CLASSIFIERS if "imagenet" in p.stem], ids=lambda p: p.stem
)
def test_schedule_of_deit(path: Path) -> None:
    cfg = load(path).SOLVER
    epoch = IMAGENET_IMAGES // 256 * 256 // cfg.IMS_PER_BATCH
    assert (300 * epoch, 5 * epoch) == (cfg.MAX_ITER, cfg.WARMUP_ITERS)
    assert pytest.approx(5e-4 * cfg.IMS_PER_BATCH / 512) == cfg.BASE_LR
    assert pytest.approx(1e-6) == cfg.BASE_LR * cfg.WARMUP_FACTOR
    assert f"{epoch} iterations" in DOCUMENT.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_documented_schedule(path: Path) -> None:
    documented = {schedule.config for schedule in schedules()}
    name = f"{path.parent.name}/{path.stem}"
    if name in documented:
        return
    plain_name = name.replace("batchformer_", "")
    assert plain_name in documented
    mine, twin = load(path), load(COCO / f"{plain_name}.yaml")
    assert mine.SOLVER == twin.SOLVER
    assert mine.TEST == twin.TEST


@pytest.mark.parametrize(
    "path",
    [p for p in [*RECIPES, *CLASSIFIERS] if p.stem.startswith("batchformer_")],
    ids=lambda path: path.stem,
)
def test_the_block_is_the_one_difference_of_the_model(path: Path) -> None:
    mine, twin = load(path), load(path.with_name(path.name.removeprefix("batchformer_")))
    assert mine.MODEL.BATCHFORMER.ENABLED
    assert not twin.MODEL.BATCHFORMER.ENABLED
    mine.MODEL.BATCHFORMER.ENABLED = False
    if "masks" in path.stem:  # on top of the boxes with the block
        assert twin.MODEL.WEIGHTS.replace("detr_", "batchformer_detr_") == mine.MODEL.WEIGHTS
        mine.MODEL.WEIGHTS = twin.MODEL.WEIGHTS
    for section in ("MODEL", "DATASETS", "INPUT", "DATALOADER"):
        assert mine[section] == twin[section]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_names_say_what_is_inside(path: Path) -> None:
    cfg = load(path)
    name = path.stem.removeprefix("batchformer_")
    transformer = cfg.MODEL.DETR.TRANSFORMER_NAME
    assert name.startswith(transformer)
    assert not name.removeprefix(transformer).startswith("_multi")
    assert (transformer == "detr") == (cfg.MODEL.DETR.SCORING == "softmax")
    assert (101 if "_R101_" in name else 50) == cfg.MODEL.RESNETS.DEPTH
    assert cfg.MODEL.WEIGHTS.endswith("R-101.pkl" if "_R101_" in name else ("R-50.pkl", "al.pth"))
    assert (cfg.MODEL.RESNETS.RES5_DILATION == 2) == ("_DC5_" in name)
    assert ("_refine" in name or "_two_stage" in name) == cfg.MODEL.DEFORMABLE.BOX_REFINE
    assert ("_two_stage" in name) == cfg.MODEL.DEFORMABLE.TWO_STAGE
    kind = "_panoptic" if path.parent.name == "panoptic" else ""
    assert (f"coco_2017_train{kind}",) == cfg.DATASETS.TRAIN
    assert (f"coco_2017_val{kind}",) == cfg.DATASETS.TEST


def test_the_factors_give_the_published_rates() -> None:
    deformable = load(COCO / "detection" / "deformable_detr_R50_50ep.yaml")
    rate = deformable.SOLVER.BASE_LR
    assert rate * deformable.SOLVER.BACKBONE_MULTIPLIER == pytest.approx(2e-5)
    assert rate * deformable.MODEL.DEFORMABLE.LR_FACTOR == pytest.approx(2e-5)
    detr = load(COCO / "detection" / "detr_R50_50ep.yaml")
    assert pytest.approx(1e-5) == detr.SOLVER.BASE_LR * detr.SOLVER.BACKBONE_MULTIPLIER
