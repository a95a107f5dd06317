"""A panoptic training step against decoding the masks of all queries, and against transformers.

DETR panoptic R50 in one stream, with equal weights and dropout 0, so that losses and gradients can
be compared; the same run asserts that they are equal. "All queries" decodes every query with the
mask head of this project and computes the losses of the matched masks. "Nothing shared" stands for
the published code: its mask head, with copies of the maps of an image for every query.

Gradients are compared in double precision. With random weights, queries are nearly equal; another
order of additions in float32 then changes which ReLUs are active, which is visible in gradients
that almost cancel. Peak memory is measured in a child process that runs one step: ru_maxrss
including interpreter, libraries and weights, and the peak of tensors in addition to the weights.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.checkpoint.conversion.export import to_huggingface
from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.run import tune_allocation
from batchformer_panoptic.engine.setup import add_opts_argument, at_least
from batchformer_panoptic.modeling.set_prediction.criterion import MaskLoss
from batchformer_panoptic.modeling.set_prediction.mask_losses import mask_dice_loss, mask_focal_loss
from batchformer_panoptic.modeling.set_prediction.matcher import Matching
from batchformer_panoptic.modeling.set_prediction.targets import TargetBatch, to_targets
from helpers.tiny_model import random_inputs

from . import ROOT
from .inference_ways import AllQueries, Naive, with_head
from .measure import in_turns, median_ratio, peak_bytes

CONFIG = ROOT / "configs" / "coco" / "panoptic" / "detr_R50_joint_300ep.yaml"
NUM_CLASSES, OURS, PEER = 133, "this project", "transformers"
ALL_QUERIES = {"all queries": AllQueries, "all queries, nothing shared among them": Naive}
ARMS = (OURS, *ALL_QUERIES, PEER)
# Largest relative differences: of losses in float32, and of gradients in double precision relative
# to the largest value of the parameter's gradient. Losses keep only the digits of float32.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-5
# The parts frozen by MODEL.BACKBONE.FREEZE_AT 2, in transformers' names.
FROZEN_OF_PEER = ("embedder.", "stages.0.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_batch_arguments(parser)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add_opts_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    tune_allocation()
    settings = {
        "size": list(args.size),
        "images": args.images,
        "objects": args.objects,
        "opts": args.opts,
    }
    batch = make_batch(settings)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save(make_model(settings).state_dict(), weights)
        memory = {arm: memory_of_child(arm, weights, settings) for arm in args.arms}
        steps = {arm: make_step(arm, weights, settings, batch) for arm in args.arms}
        reference = losses_of(steps[OURS])
        gradients = gradients_of(make_step(OURS, weights, settings, batch))
        rows = [{"arm": arm, **memory[arm]} for arm in args.arms]
        for row in rows:
            arm = row["arm"]
            if arm in ALL_QUERIES:
                row["loss_difference"] = largest_difference(
                    losses_of(steps[arm]), reference, LOSS_TOLERANCE
                )
                found = gradients_of(make_step(arm, weights, settings, batch))
                row["gradient_difference"] = largest_difference(
                    found, gradients, GRADIENT_TOLERANCE
                )
            if arm == PEER:
                totals = [{"total": sum(x.values())} for x in (losses_of(steps[arm]), reference)]
                row["loss_difference"] = largest_difference(*totals, LOSS_TOLERANCE)
    times = in_turns(steps, args.rounds)
    for row in rows:
        row["seconds"] = statistics.median(times[row["arm"]])
        row["times_as_long"] = median_ratio(times[row["arm"]], times[OURS])
    return {**settings, "rounds": args.rounds, "rows": rows}


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the numbers of `make_batch`, and a default of three rounds."""
    parser.set_defaults(rounds=3)
    parser.add_argument(
        "--size", type=at_least(1), nargs=2, default=[384, 512], metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--images", type=at_least(1), default=2, help="default: %(default)s")
    parser.add_argument(
        "--objects", type=at_least(1), default=12, help="of an image; default: %(default)s"
    )


def make_batch(settings: dict[str, Any]) -> list[dict[str, Any]]:
    sizes = [tuple(settings["size"])] * settings["images"]
    return random_inputs(sizes, [settings["objects"]] * settings["images"])


def make_cfg(settings: dict[str, Any]) -> CfgNode:
    cfg = load_config(str(CONFIG), ["MODEL.DETR.DROPOUT", "0.0", *settings["opts"]])
    cfg.MODEL.MASK_HEAD.STEP_MEMORY = 1 << 20  # MiB, so that all queries are decoded at once
    cfg.MODEL.DETR.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(80))
    return cfg


def make_model(settings: dict[str, Any]) -> PanopticDETR:
    torch.manual_seed(0)
    model = build_model(make_cfg(settings))
    assert isinstance(model, PanopticDETR)
    return model.train()


class Step:
    """One forward and backward pass."""

    def __init__(self, model: nn.Module, batch: list[dict[str, Any]]) -> None:
        self.model = model
        self.batch = batch

    def losses(self) -> dict[str, Tensor]:
        return self.model(self.batch)

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        torch.stack(list(self.losses().values())).sum().backward()


class PeerStep(Step):
    """One pass of transformers' model on the preprocessed images and targets of ours."""

    def __init__(self, model: nn.Module, ours: PanopticDETR, batch: list[dict[str, Any]]) -> None:
        super().__init__(model, batch)
        self.pixels = ours.preprocess(batch).tensor
        targets = to_targets(batch, self.pixels.device, with_masks=True)
        self.labels = []
        for target in targets:
            own = torch.arange(len(target))
            masks = TargetBatch([target]).masks.gather(torch.zeros_like(own), own)
            boxes = target.boxes_cxcywh
            label = {"class_labels": target.labels, "boxes": boxes, "masks": masks.float()}
            self.labels.append(label)

    def losses(self) -> dict[str, Tensor]:
        return {"loss": self.model(pixel_values=self.pixels, labels=self.labels).loss}


def make_step(
    arm: str, weights: Path, settings: dict[str, Any], batch: list[dict[str, Any]]
) -> Step:
    model = make_model(settings)
    model.load_state_dict(torch.load(weights, weights_only=True))
    if arm == PEER:
        return PeerStep(peer_of(model, settings), model, batch)
    if arm in ALL_QUERIES:
        model = with_head(model, ALL_QUERIES[arm])
        plain_mask_losses(model)
    return Step(model, batch)


class PlainMaskLoss(MaskLoss):
    """The mask losses of all masks at once, by plain autograd."""

    def _losses(self, logits: Tensor, targets: TargetBatch, pairs: Matching) -> Tensor:
        wanted = targets.masks.gather(pairs.image, pairs.local_target)
        large = F.interpolate(
            logits[:, None], size=wanted.shape[-2:], mode="bilinear", align_corners=False
        )
        flat = large.flatten(1), wanted.flatten(1).float()
        return torch.stack([mask_focal_loss(*flat), mask_dice_loss(*flat)])


def plain_mask_losses(model: PanopticDETR) -> None:
    """Replace the mask losses of a model by plain ones."""
    model.criterion.terms = tuple(
        PlainMaskLoss(focal_weight=term.focal_weight, dice_weight=term.dice_weight)
        if isinstance(term, MaskLoss)
        else term
        for term in model.criterion.terms
    )


@torch.no_grad()
def losses_of(step: Step) -> dict[str, Tensor]:
    return dict(step.losses())


def gradients_of(step: Step) -> dict[str, Tensor]:
    """Gradients of a step in double precision; converts the model."""
    step.model.double()
    step()
    # The head of AllQueries wraps the head of the model.
    return {
        name.replace("mask_head.head.", "mask_head."): p.grad
        for name, p in step.model.named_parameters()
        if p.grad is not None
    }


def largest_difference(
    found: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float
) -> float:
    """Largest difference relative to the largest value of its tensor; asserted to be small."""
    assert found.keys() == reference.keys()
    differences = [
        ((found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-6)).item()
        for name, tensor in reference.items()
    ]
    assert max(differences) < tolerance, max(differences)
    return max(differences)


def memory_of_child(arm: str, weights: Path, settings: dict[str, Any]) -> dict[str, int]:
    command = [sys.executable, "-m", __spec__.name, arm, str(weights), json.dumps(settings)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(arm: str, weights: str, settings: str) -> int:
    """Run one step; print the peak resident size of the process and the peak of its tensors."""
    tune_allocation()
    options = json.loads(settings)
    step = make_step(arm, Path(weights), options, make_batch(options))
    of_tensors = peak_bytes(step)
    print(json.dumps({"process_bytes": peak_resident(), "tensor_bytes": of_tensors}))
    return 0


def peak_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peer_of(model: PanopticDETR, settings: dict[str, Any]) -> nn.Module:
    """Return transformers' DetrForSegmentation with our weights and the same frozen parts."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        to_huggingface(model.state_dict(), Path(folder), cfg=make_cfg(settings), classes=None)
        peer: nn.Module = transformers.DetrForSegmentation.from_pretrained(
            folder,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            auxiliary_loss=True,
        )
    for name, parameter in peer.named_parameters():
        parameter.requires_grad_(not any(f".{part}" in name for part in FROZEN_OF_PEER))
    return peer.train()


def table(result: dict[str, Any]) -> str:
    header = ["step", "time ÷ ours", "peak of the process (GB)", "of its tensors (GB)"]
    header += ["largest difference: losses", "gradients"]
    rows = []
    for row in result["rows"]:
        numbers = [f"{row['times_as_long']:.2f}"]
        numbers += [f"{row[key] / 1e9:.2f}" for key in ("process_bytes", "tensor_bytes")]
        numbers += [
            f"{row[key]:.0e}" if key in row else ""
            for key in ("loss_difference", "gradient_difference")
        ]
        rows.append([row["arm"], *numbers])
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    sys.exit(child(*sys.argv[1:]))
