"""Configs of this repository, merged with the defaults."""

from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from batchformer_panoptic import add_batchformer_panoptic_config


def default_config() -> CfgNode:
    """Detectron2's defaults and this project's."""
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    return cfg


def merged_config(path: Path) -> CfgNode:
    """The defaults with one YAML file."""
    cfg = default_config()
    cfg.merge_from_file(str(path))
    return cfg
