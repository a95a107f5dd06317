"""Every YAML merges and builds; every key of ours is read by somebody."""

import re
from pathlib import Path

import pytest
from conftest import REPO_ROOT
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from batchformer_panoptic import add_batchformer_panoptic_config

CONFIGS = sorted((REPO_ROOT / "configs").rglob("*.yaml"))
RECIPES = [path for path in CONFIGS if not path.name.startswith("Base-")]
PACKAGE = REPO_ROOT / "projects" / "batchformer_panoptic"


def load(path: Path) -> CfgNode:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(REPO_ROOT / "configs")))
def test_config_merges(path):
    cfg = load(path)
    assert cfg.MODEL.META_ARCHITECTURE == "PanopticDETR"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_builds_what_its_name_says(path):
    cfg = load(path)
    cfg.MODEL.DEVICE, cfg.MODEL.DETR.NUM_CLASSES = "cpu", 133
    model = build_model(cfg)
    assert any("batchformer" in name for name, _ in model.named_parameters()) == (
        "batchformer" in path.stem
    )
    assert (model.mask_head is not None) == ("boxes" not in path.stem)
    assert cfg.DATASETS.TRAIN
    assert cfg.DATASETS.TEST
    assert cfg.OUTPUT_DIR != "./output"
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert (trained == {"mask_head"}) == ("masks" in path.stem)


def test_published_recipe():
    boxes = load(REPO_ROOT / "configs/coco/panoptic/detr_R50_boxes_300ep.yaml")
    masks = load(REPO_ROOT / "configs/coco/panoptic/detr_R50_masks_25ep.yaml")
    epoch = 118287 // boxes.SOLVER.IMS_PER_BATCH
    assert (300 * epoch, (200 * epoch,)) == (boxes.SOLVER.MAX_ITER, boxes.SOLVER.STEPS)
    assert (25 * epoch, (15 * epoch,)) == (masks.SOLVER.MAX_ITER, masks.SOLVER.STEPS)
    for cfg in (boxes, masks):
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.BACKBONE_MULTIPLIER) == (1e-4, 0.1)
        assert cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE == 0.1
        assert cfg.MODEL.DETR.NUM_OBJECT_QUERIES == 100


def leaves(node: CfgNode, prefix: str = "") -> set[str]:
    found = set()
    for key, value in node.items():
        path = f"{prefix}{key}"
        found |= leaves(value, path + ".") if isinstance(value, CfgNode) else {path}
    return found


def test_every_key_of_ours_is_read():
    ours = get_cfg()
    add_batchformer_panoptic_config(ours)
    new = leaves(ours) - leaves(get_cfg())
    assert len(new) > 40
    code = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py") if p.name != "config.py")
    unread = {key for key in new if not re.search(rf"\b{key.split('.')[-1]}\b", code)}
    assert unread == set()
