"""Mask2Former: a training step and an inference against transformers' and Conditional-DETR's.

Full-size R50 models with random weights, the same for this project and transformers. The run
asserts that their losses agree when both draw the same points, and class logits and masks in
inference. Conditional-DETR is the panoptic recipe with boxes and masks, on the same images. Peak
memory is that of tensors, in addition to the weights.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor, nn

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.checkpoint.conversion.export import to_huggingface
from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.run import tune_allocation
from batchformer_panoptic.engine.setup import add_opts_argument
from batchformer_panoptic.modeling.set_prediction.targets import TargetBatch, to_targets

from . import ROOT
from .measure import in_turns, median_ratio, peak_bytes
from .training_step import Step, add_batch_arguments, make_batch

CONFIGS = ROOT / "configs" / "coco" / "panoptic"
OURS, WITH_BLOCK = "this project", "this project, with BatchFormerV2"
PEER, CONDITIONAL = "transformers", "Conditional-DETR of this project"
ARMS = {
    OURS: "mask2former_R50_50ep.yaml",
    WITH_BLOCK: "batchformer_mask2former_R50_50ep.yaml",
    PEER: "mask2former_R50_50ep.yaml",
    CONDITIONAL: "conditional_R50_joint_50ep.yaml",
}
NUM_CLASSES = 133
LOSS_TOLERANCE, PREDICTION_TOLERANCE = 1e-3, 1e-6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_batch_arguments(parser)
    add_opts_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    tune_allocation()
    settings = {key: getattr(args, key) for key in ("size", "images", "objects", "opts")}
    batch = make_batch(settings)
    models = {arm: make_model(arm, args.opts) for arm in ARMS}
    peer = PeerStep(models[PEER], models[OURS], batch)
    steps = {arm: peer if arm == PEER else Step(model, batch) for arm, model in models.items()}
    predictions = {arm: partial(predict, models[arm], peer.pixels) for arm in (OURS, PEER)}
    differences = {"loss_difference": difference_of_losses(steps)}
    rows: list[dict[str, Any]] = []
    measured: dict[str, dict[str, Callable[[], object]]] = {
        "training": {**steps},
        "inference": {**predictions},
    }
    for what, functions in measured.items():
        if what == "inference":
            for model in models.values():
                model.eval()
        memory = {arm: peak_bytes(function) for arm, function in functions.items()}
        times = in_turns(functions, args.rounds)
        rows += [
            {
                "what": what,
                "arm": arm,
                "seconds": statistics.median(times[arm]),
                "times_as_long": median_ratio(times[arm], times[OURS]),
                "tensor_bytes": memory[arm],
            }
            for arm in functions
        ]
    differences["prediction_difference"] = difference_of_predictions(
        models[OURS], models[PEER], peer.pixels
    )
    return {**settings, "rounds": args.rounds, **differences, "rows": rows}


def make_model(arm: str, opts: list[str]) -> nn.Module:
    cfg = load_config(str(CONFIGS / ARMS[arm]), opts)
    cfg.MODEL.DETR.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(80))
    torch.manual_seed(0)
    model = build_model(cfg)
    assert isinstance(model, PanopticDETR)
    if arm != PEER:
        return model.train()
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        to_huggingface(model.state_dict(), Path(folder), cfg=cfg, classes=None)
        kind = transformers.Mask2FormerForUniversalSegmentation
        peer: nn.Module = kind.from_pretrained(folder)
    # The norms of the backbone are frozen, as in ours and as published.
    for module in peer.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return peer


class PeerStep(Step):
    """A step of transformers' model on the preprocessed images and targets of ours."""

    def __init__(self, model: nn.Module, ours: nn.Module, batch: list[dict[str, Any]]) -> None:
        super().__init__(model, batch)
        assert isinstance(ours, PanopticDETR)
        self.pixels = ours.preprocess(batch).tensor
        targets = to_targets(batch, self.pixels.device, with_masks=True)
        self.labels = {
            "class_labels": [target.labels for target in targets],
            "mask_labels": [masks_of(target).float() for target in targets],
        }

    def losses(self) -> dict[str, Tensor]:
        return {"loss": self.model(pixel_values=self.pixels, **self.labels).loss}


def masks_of(target: Any) -> Tensor:
    own = torch.arange(len(target))
    masks: Tensor = TargetBatch([target]).masks.gather(torch.zeros_like(own), own)
    return masks


@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits (B, Q, K + 1) and masks at stride 4 (B, Q, h, w) of all queries."""
    if not isinstance(model, PanopticDETR):
        output = model(pixel_values=pixels)
        return output.class_queries_logits, output.masks_queries_logits
    size = (pixels.shape[-2], pixels.shape[-1])
    output = model.predict(model.backbone(pixels), [size] * len(pixels), size)
    logits = output.logits[-1]
    entries, queries = logits.shape[:2]
    image = torch.arange(entries).repeat_interleave(queries)
    masks = output.masks(-1, image, torch.arange(queries).repeat(entries))
    return logits, masks.unflatten(0, (entries, queries))


@contextmanager
def same_points() -> Iterator[None]:
    """Let every mask draw the same points, in whatever order a model draws them."""
    fixed = torch.Generator().manual_seed(0)
    points = torch.rand(1 << 16, 2, generator=fixed)

    def draw(*size: Any, **_: Any) -> Tensor:
        shape = size[0] if isinstance(size[0], tuple | list | torch.Size) else size
        return points[: shape[-2]].expand(*shape).clone()

    with mock.patch.object(torch, "rand", draw):
        yield


def difference_of_losses(steps: dict[str, Step]) -> float:
    """Relative difference of the total losses of this project and transformers."""
    with torch.no_grad(), same_points():
        ours, peer = (
            float(torch.stack(list(steps[arm].losses().values())).sum()) for arm in (OURS, PEER)
        )
    assert abs(ours - peer) < LOSS_TOLERANCE * abs(peer), (ours, peer)
    return abs(ours - peer) / abs(peer)


def difference_of_predictions(ours: nn.Module, peer: nn.Module, pixels: Tensor) -> float:
    """Largest difference of class logits and masks, relative to the largest value.

    In double precision: a mask logit that rounds to the other side of 0 changes what a query of the
    next layer attends to.
    """
    found = [predict(model.double(), pixels.double()) for model in (ours, peer)]
    for model in (ours, peer):
        model.float()
    pairs = zip(*found, strict=True)
    largest = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    assert largest < PREDICTION_TOLERANCE, largest
    return largest


def table(result: dict[str, Any]) -> str:
    header = ["", "training step ÷ ours", "its tensors (GB)", "inference ÷ ours", "tensors (GB)"]
    rows = {(row["what"], row["arm"]): row for row in result["rows"]}
    cells = []
    for arm in ARMS:
        numbers = []
        for what in ("training", "inference"):
            row = rows.get((what, arm))
            numbers += [
                "" if row is None else f"{row['times_as_long']:.2f}",
                "" if row is None else f"{row['tensor_bytes'] / 1e9:.2f}",
            ]
        cells.append([arm, *numbers])
    return tabulate(cells, header, tablefmt="github", disable_numparse=True)
