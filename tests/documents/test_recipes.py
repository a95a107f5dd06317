"""docs/recipes.md: every value in its tables and every schedule equals that of the configs."""

import functools
import itertools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge

from batchformer_panoptic.engine.solver import build_lr_scheduler
from helpers.commands import REPO_ROOT
from helpers.config_files import merged_config

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


merged = functools.cache(merged_config)


def load(path: Path) -> CfgNode:
    return merged(path).clone()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def values() -> list[Row]:
    rows, config, columns = [], "", 0
    for line in DOCUMENT.read_text().splitlines():
        if found := re.match(r"Config: \[(\S+)\]", line):
            config = found[1]
        if line.startswith("| setting |"):
            assert cells(line) == ["setting", "public code", "key", "value", "comparison"]
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


def test_the_document_is_parsed() -> None:
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
    assert row.verdict, "same, or the difference and its reason"


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
    # Mask2Former counts iterations and has two steps: its schedule is in the table of its values.
    documented |= {"panoptic/mask2former_R50_50ep", "panoptic/mask2former_swin_tiny_50ep"}
    name = f"{path.parent.name}/{path.stem}"
    if name in documented:
        return
    plain_name = name.replace("batchformer_", "").replace("_pilot_", "_")
    assert plain_name in documented
    mine, twin = load(path), load(COCO / f"{plain_name}.yaml")
    assert mine.SOLVER == twin.SOLVER
    assert mine.TEST == twin.TEST


@pytest.mark.parametrize(
    "path",
    [p for p in [*RECIPES, *CLASSIFIERS] if p.stem.startswith("batchformer_")],
    ids=lambda path: path.stem,
)
def test_the_block_is_the_only_difference_of_the_model(path: Path) -> None:
    mine, twin = load(path), load(path.with_name(path.name.removeprefix("batchformer_")))
    assert mine.MODEL.BATCHFORMER.ENABLED
    assert not twin.MODEL.BATCHFORMER.ENABLED
    mine.MODEL.BATCHFORMER.ENABLED = False
    if "masks" in path.stem:  # starts from the boxes trained with the block
        assert twin.MODEL.WEIGHTS.replace("detr_", "batchformer_detr_") == mine.MODEL.WEIGHTS
        mine.MODEL.WEIGHTS = twin.MODEL.WEIGHTS
    for section in ("MODEL", "DATASETS", "INPUT", "DATALOADER"):
        assert mine[section] == twin[section]


def test_pilot_queries_are_the_only_difference_of_their_recipe() -> None:
    mine, twin = (load(COCO / "panoptic" / f"mask2former_R50{x}_50ep.yaml") for x in ("_pilot", ""))
    assert mine.MODEL.MASK2FORMER.PILOT.ENABLED
    mine.MODEL.MASK2FORMER.PILOT.ENABLED = False
    mine.OUTPUT_DIR = twin.OUTPUT_DIR
    assert mine == twin


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_names_describe_the_config(path: Path) -> None:
    cfg = load(path)
    name = path.stem.removeprefix("batchformer_")
    transformer = cfg.MODEL.DETR.TRANSFORMER_NAME
    assert name.startswith(transformer)
    assert not name.removeprefix(transformer).startswith("_multi")
    softmax = transformer in ("detr", "mask2former")
    assert softmax == (cfg.MODEL.DETR.SCORING == "softmax")
    if "swin_tiny" in name:
        assert cfg.MODEL.BACKBONE.NAME == "build_swin_backbone"
        assert (cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.DEPTHS) == (96, [2, 2, 6, 2])
        assert Path(cfg.MODEL.WEIGHTS).stem == "swin_tiny_patch4_window7_224"
    else:
        weights = "R-101.pkl" if "_R101_" in name else ("R-50.pkl", "al.pth")
        assert (101 if "_R101_" in name else 50) == cfg.MODEL.RESNETS.DEPTH
        assert cfg.MODEL.WEIGHTS.endswith(weights)
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


def deviation(subject: str) -> list[str]:
    (row,) = [r for r in map(cells, DOCUMENT.read_text().splitlines()) if r[0] == subject]
    return row


@pytest.mark.parametrize(
    ("name", "early"),
    [
        ("detr_R50_300ep", 2),
        ("detr_R50_DC5_300ep", 4),
        ("detr_R50_50ep", 0),
        ("conditional_detr_R50_DC5_50ep", 0),
        ("deformable_detr_R50_50ep", 0),
    ],
)
def test_the_drop_of_the_rate_is_as_early_as_documented(name: str, early: int) -> None:
    assert "2 iterations earlier" in deviation("learning rate drop")[2]
    assert "(4 with 1 image per GPU)" in deviation("learning rate drop")[2]
    cfg = load(COCO / "detection" / f"{name}.yaml")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_lr_scheduler(cfg, optimizer)
    (drop,) = cfg.SOLVER.STEPS

    def rate(iteration: int) -> float:
        schedule.last_epoch = iteration
        return schedule.get_lr()[0]

    before = next(i for i in range(drop + 1, 0, -1) if rate(i) == 1.0)
    assert drop - (before + 1) == early


def published_size(height: int, width: int, short: int, limit: int) -> tuple[int, int]:
    """Size of a resized image in the public code: the longer side is truncated to an integer."""
    smaller, larger = sorted((height, width))
    if larger / smaller * short > limit:
        short = round(limit * smaller / larger)
    longer = int(short * larger / smaller)
    return (short, longer) if height <= width else (longer, short)


def test_sizes_differ_from_the_public_ones_by_as_much_as_documented() -> None:
    limit = 1333
    largest = {"free": 0, "limited": 0}
    for height, width in itertools.product(range(200, 641, 12), repeat=2):
        for short in (480, 608, 800):
            ours = ResizeShortestEdge.get_output_shape(height, width, short, limit)
            theirs = published_size(height, width, short, limit)
            difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            is_limited = max(height, width) / min(height, width) * short > limit
            case = "limited" if is_limited else "free"
            largest[case] = max(largest[case], difference)
    (row,) = [row for row in values() if row.key == "INPUT.MAX_SIZE_TRAIN"]
    assert "up to 1 pixel, and by up to 2" in row.verdict
    assert largest == {"free": 1, "limited": 2}


def test_the_class_token_starts_as_documented() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    token = timm.create_model("deit_tiny_patch16_224").cls_token
    assert deviation("class token of ViT and DeiT")[2].startswith("1e-6")
    assert 5e-7 < token.std().item() < 2e-6
