"""Golden files: where they are, and what they hold in this project's words."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchformer_panoptic.checkpoint.conversion.detr import official_to_ours
from batchformer_panoptic.modeling.set_prediction.targets import ImageTarget
from helpers.dense_masks import DenseMasks


def golden_dir() -> Path:
    """The folder that ``GOLDEN_DIR`` names, otherwise the one kept with the tests."""
    default = Path(__file__).resolve().parents[1] / "golden"
    return Path(os.environ.get("GOLDEN_DIR", default))


def load_golden(name: str) -> dict[str, Any]:
    """One golden file, as it is."""
    return torch.load(golden_dir() / name, weights_only=True)


def our_name(official: str) -> str:
    """The official DETR name of a parameter in this project's words."""
    name = official_to_ours(official)
    assert name is not None, f"no name of ours for {official}"
    return name


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under this project's names, in float32."""
    return {our_name(name): value.float() for name, value in state.items()}


def features_of(golden: dict[str, Any], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The backbone maps by name, in float32."""
    features = golden["inputs"]["features"]
    return {name: value.float().to(device) for name, value in features.items()}


def sizes_of(golden: dict[str, Any]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(height, width) of each image, and of the padded batch."""
    inputs = golden["inputs"]
    return [tuple(size) for size in inputs["image_sizes"]], tuple(inputs["padded_size"])


def image_targets(
    targets: Sequence[Mapping[str, Tensor]], device: torch.device | str = "cpu"
) -> list[ImageTarget]:
    """Targets as the criterion takes them; boxes and masks where the file has them."""
    moved = [{name: value.to(device) for name, value in target.items()} for target in targets]
    return [
        ImageTarget(t["labels"], t.get("boxes"), DenseMasks(t["masks"]) if "masks" in t else None)
        for t in moved
    ]
