"""A tiny model as a training run leaves it: a config file, and a checkpoint with its classes."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from batchformer_panoptic.checkpoint import PanopticCheckpointer
from batchformer_panoptic.data import ClassTable
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.tiny_model import tiny_cfg, tiny_model


class Run(NamedTuple):
    """Files of a run, and the config with the classes still to be derived."""

    cfg: CfgNode
    config_file: Path
    weights: Path
    table: ClassTable

    @property
    def opts(self) -> list[str]:
        """The end of a command line that uses the weights."""
        return ["--opts", "MODEL.WEIGHTS", str(self.weights)]


def write_run(
    folder: Path, dataset: TinyPanopticDataset, *, with_classes: bool = True, **overrides: Any
) -> Run:
    """Save a random model; overrides are those of `tiny_cfg`."""
    table = ClassTable.from_metadata(MetadataCatalog.get(dataset.name))
    overrides = {"INPUT__MIN_SIZE_TEST": 48, "INPUT__MIN_SIZE_TRAIN": [48], **overrides}
    cfg = tiny_cfg(**overrides)
    cfg.DATASETS.CUSTOM_PANOPTIC = [dataset.row]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (dataset.name,)
    cfg.MODEL.DETR.NUM_CLASSES, cfg.MODEL.PANOPTIC.THING_CLASS_IDS = 0, []
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "config.yaml"
    config_file.write_text(cfg.dump())
    model = tiny_model(**overrides)
    with torch.no_grad():
        model.box_head.class_embed.bias[:-1] += 3  # a random model finds no objects
    PanopticCheckpointer(model, str(folder), class_table=table if with_classes else None).save(
        "model_final"
    )
    return Run(cfg, config_file, folder / "model_final.pth", table)


def file_names(folder: Path) -> list[str]:
    """Names of everything in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())
