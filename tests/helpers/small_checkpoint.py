"""A model with the names of the real one and a few weights, and files of its weights."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from safetensors.torch import save_file
from torch import Tensor, nn

from batchformer_panoptic.checkpoint import PanopticCheckpointer
from helpers.tiny_model import tiny_cfg

CATEGORIES = [
    {"id": 1, "name": "ball", "isthing": 1, "color": [1, 2, 3]},
    {"id": 5, "name": "grass", "isthing": 0, "color": [4, 5, 6]},
]


# Enough of them for a file that can be cut anywhere.
WEIGHTS = {"a.weight": torch.arange(600.0).view(20, 30), "a.bias": torch.arange(3)}


class Model(nn.Module):
    """The names of the real one with a few weights."""

    def __init__(
        self,
        *,
        block: bool = False,
        masks: bool = False,
        pixels: bool = False,
        classes: int = 2,
        queries: int = 4,
    ) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": nn.Linear(2, 3), "res2": nn.BatchNorm1d(3)})
        self.transformer = nn.ModuleDict(
            {"layer": nn.Linear(3, 3), "query_embed": nn.Embedding(queries, 3)}
        )
        if block:
            self.transformer["batchformer"] = nn.Linear(3, 3)
        self.box_head = nn.ModuleDict(
            {"class_embed": nn.Linear(3, classes + 1), "bbox_embed": nn.Linear(3, 4)}
        )
        if pixels:
            self.semantic_head = nn.ModuleDict({"res5": nn.Linear(3, classes)})
        if masks:
            self.mask_head = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))


def save_weights(path: Path, model: nn.Module | dict[str, Any], **extra: Any) -> str:
    weights = model.state_dict() if isinstance(model, nn.Module) else model
    torch.save({"model": weights, **extra}, path)
    return str(path)


def load_weights(model: nn.Module, path: str, *, training: bool = False, **options: Any) -> None:
    checkpointer = PanopticCheckpointer(model, training=training, **options)
    checkpointer.resume_or_load(path, resume=False)


def assert_loaded(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        if name in weights:
            assert torch.equal(value, weights[name]), name


def without_key(weights: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in weights.items() if k != key}


def write_image_net_pkl(path: Path, extra: dict[str, np.ndarray]) -> str:
    weights = {k: v.numpy() for k, v in Model().backbone.state_dict().items()}
    weights = {k: v for k, v in weights.items() if "num_batches" not in k} | extra
    content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    return str(path)


def resnet_cfg(**overrides: Any) -> CfgNode:
    """Settings of the recipes with torchvision's ResNet-50."""
    defaults = {
        "INPUT__FORMAT": "RGB",
        "MODEL__PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL__PIXEL_STD": [58.395, 57.12, 57.375],
        "MODEL__BACKBONE__NAME": "build_resnet_backbone",
        "MODEL__RESNETS__STRIDE_IN_1X1": False,
    }
    return tiny_cfg(**{**defaults, **overrides})


def write_pth(path: Path, content: Any = None, **options: Any) -> Path:
    torch.save({"model": WEIGHTS} if content is None else content, path, **options)
    return path


def write_safetensors(path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file(WEIGHTS, str(path), metadata=metadata)
    return path


def write_pkl(path: Path, content: Any = None) -> Path:
    arrays = {name: value.numpy() for name, value in WEIGHTS.items()}
    default = {"model": arrays, "__author__": "x", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(default if content is None else content))
    return path
