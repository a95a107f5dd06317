"""A model of a few weights, and a trainer that feeds it, for tests of the engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from batchformer_panoptic.batchformer import Losses
from batchformer_panoptic.batchformer.batchformer import SINGLE
from batchformer_panoptic.config import add_batchformer_panoptic_config
from batchformer_panoptic.engine import PanopticTrainer
from batchformer_panoptic.modeling.transformer.base import build_hook

DATASET = "stand_in_set"
CLASSES = ["ball", "grass"]


class StandIn(nn.Module):
    """Two streams, three terms, dropout, batch norm; predicts nothing in evaluation."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        torch.manual_seed(0)  # every stand-in starts alike
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        self.batchformer = build_hook(cfg, embed_dim=8, num_layers=1, layers_are="one layer")
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 2)
        self.mask_head = nn.Linear(8, 1) if cfg.MODEL.MASK_ON else None

    def forward(self, batch: list[dict[str, Any]]) -> Any:
        """Losses in training; the sum of the weights as the only result in evaluation."""
        if not self.training:
            return [{"weights": self.head.weight.sum().item()} for _ in batch]
        images = torch.stack([x["image"] for x in batch]).to(self.head.weight.device)
        features = self.dropout(self.backbone(images))
        tokens, streams = self.batchformer.after_layer(0, features[:, None], SINGLE, None)
        losses = {}
        for name, stream in zip(streams.names, streams.split(tokens[:, 0]), strict=True):
            out = self.head(self.norm(stream))
            suffix = "" if streams == SINGLE else f"/{name}"
            losses[f"loss_ce{suffix}"] = out[:, 0].exp().mean() / streams.num_streams
            losses[f"loss_bbox{suffix}"] = out[:, 1].square().mean() / streams.num_streams
            if self.mask_head is not None:
                losses[f"loss_mask{suffix}"] = self.mask_head(stream).square().mean()
        return Losses(losses, {"class_error": out[:, 0].mean()})


class WeightEvaluator(DatasetEvaluator):
    """Reports the sum of the weights it was shown as "PQ"."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the last."""
        self._value = outputs[-1]["weights"]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return it as panoptic quality."""
        return {"panoptic_seg": {"PQ": self._value}}


class StandInTrainer(PanopticTrainer):
    """PanopticTrainer with batches made of numbers."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, *, start_iter: int = 0) -> Any:
        """Batch i is a function of i."""
        return stand_in_batches(cfg.SOLVER.IMS_PER_BATCH, start_iter)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """One batch of one image."""
        return [[{"image": torch.ones(4)}]]

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See WeightEvaluator."""
        return WeightEvaluator()


def stand_in_batches(size: int, start_iter: int) -> Iterator[list[dict[str, Any]]]:
    """Endless batches from iteration ``start_iter`` on."""
    iteration = start_iter
    while True:
        images = torch.randn(size, 4, generator=torch.Generator().manual_seed(iteration))
        yield [
            {"image": image, "image_id": 10 * iteration + k, "file_name": f"{iteration}_{k}.jpg"}
            for k, image in enumerate(images)
        ]
        iteration += 1


def stand_in_cfg(output_dir: Path, *opts: Any) -> CfgNode:
    """A config for the stand-in; registers model and data set on first use."""
    if "StandIn" not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(StandIn)
    if DATASET not in DatasetCatalog:
        DatasetCatalog.register(DATASET, list)
        MetadataCatalog.get(DATASET).set(
            thing_classes=CLASSES,
            stuff_classes=CLASSES,
            thing_dataset_id_to_contiguous_id={1: 0},
            stuff_dataset_id_to_contiguous_id={1: 0, 2: 1},
        )
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    defaults: list[Any] = ["MODEL.META_ARCHITECTURE", "StandIn", "MODEL.DEVICE", "cpu"]
    defaults += ["MODEL.WEIGHTS", "", "DATASETS.TRAIN", (DATASET,), "DATASETS.TEST", (DATASET,)]
    defaults += ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 6, "SOLVER.WARMUP_ITERS", 0]
    defaults += ["SOLVER.STEPS", (4,), "SOLVER.BASE_LR", 0.01, "MODEL.BATCHFORMER.ENABLED", True]
    defaults += ["OUTPUT_DIR", str(output_dir), "SEED", 3]
    cfg.merge_from_list([*defaults, *opts])
    cfg.freeze()
    return cfg


def trained(cfg: CfgNode, *, resume: bool = False) -> StandInTrainer:
    """Train the stand-in to the end of the config."""
    trainer = StandInTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
