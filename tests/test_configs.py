"""Every YAML merges and builds; every key of ours is read by somebody."""

import re

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from helpers.commands import REPO_ROOT
from helpers.config_files import default_config, merged_config

CONFIGS = sorted((REPO_ROOT / "configs").rglob("*.yaml"))
RECIPES = [path for path in CONFIGS if not path.name.startswith("Base-")]
CLASSIFIERS = [path for path in RECIPES if path.parent.name == "classification"]
DETECTORS = [path for path in RECIPES if path not in CLASSIFIERS]
PACKAGE = REPO_ROOT / "projects" / "batchformer_panoptic"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(REPO_ROOT / "configs")))
def test_config_merges(path):
    cfg = merged_config(path)
    classifies = path.parent.name == "classification"
    assert ("ImageClassifier" if classifies else "PanopticDETR") == cfg.MODEL.META_ARCHITECTURE


@pytest.mark.parametrize("path", DETECTORS, ids=lambda p: p.stem)
def test_recipe_builds_what_its_name_says(path):
    cfg = merged_config(path)
    cfg.MODEL.DEVICE, cfg.MODEL.DETR.NUM_CLASSES = "meta", 133
    with torch.device("meta"):  # shapes without numbers: six times as fast
        model = build_model(cfg)
    assert any("batchformer" in name for name, _ in model.named_parameters()) == (
        "batchformer" in path.stem
    )
    boxes_alone = path.parent.name == "detection" or "boxes" in path.stem
    assert (model.mask_head is None) == boxes_alone
    assert cfg.DATASETS.TRAIN
    assert cfg.DATASETS.TEST
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert (trained == {"mask_head"}) == ("masks" in path.stem)


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda p: p.stem)
def test_classifier_builds_what_its_name_says(path):
    cfg = merged_config(path)
    cfg.MODEL.DEVICE, cfg.MODEL.CLASSIFIER.NUM_CLASSES = "meta", 10
    with torch.device("meta"):
        model = build_model(cfg)
    with_block = any("batchformer" in name for name, _ in model.named_parameters())
    assert with_block == path.stem.startswith("batchformer_")
    widths = {"tiny": 192, "small": 384, "base": 768}
    if "deit" in path.stem:
        _, size, _ = path.stem.removeprefix("batchformer_").split("_")
        assert model.vit.model.embed_dim == widths[size]
        assert f"deit_{size}_" in cfg.MODEL.CLASSIFIER.NAME
    folders = [name for name, _ in cfg.DATASETS.CUSTOM_IMAGE_FOLDERS]
    assert [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] == folders
    assert f"output/classification/{path.stem}" == cfg.OUTPUT_DIR


def test_recipes_write_to_folders_of_their_own():
    folders = [merged_config(path).OUTPUT_DIR for path in RECIPES]
    assert len(set(folders)) == len(folders)
    assert "./output" not in folders
    coco = [path for path in RECIPES if path.parts[-3] == "coco"]
    for path in coco:
        assert f"output/coco_{path.parent.name}/{path.stem}" == merged_config(path).OUTPUT_DIR


def leaves(node: CfgNode, prefix: str = "") -> set[str]:
    found = set()
    for key, value in node.items():
        path = f"{prefix}{key}"
        found |= leaves(value, path + ".") if isinstance(value, CfgNode) else {path}
    return found


def test_every_key_of_ours_is_read():
    new = leaves(default_config()) - leaves(get_cfg())
    assert len(new) > 40
    code = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py") if p.name != "config.py")
    unread = {key for key in new if not re.search(rf"\b{key.split('.')[-1]}\b", code)}
    assert unread == set()
