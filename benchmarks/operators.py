"""Operators of a training step with two streams, by part: each is a kernel launch on a GPU.

Views and allocations are not counted, nor is the loading of data. A CPU has no fused attention with
dropout and no fused dropout; the second DETR has none, so that its count is close to a GPU's.
"""

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode

from batchformer_panoptic.batchformer.batchformer import TWO_STREAMS
from batchformer_panoptic.data.io import read_json
from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.solver import build_gradient_clipper, build_optimizer
from batchformer_panoptic.engine.train_loop import StreamTrainLoop
from batchformer_panoptic.modeling.heads import MaskHead
from batchformer_panoptic.modeling.set_prediction.criterion import SetCriterion
from batchformer_panoptic.modeling.set_prediction.matcher import HungarianMatcher
from helpers.tiny_model import random_inputs

from . import ROOT

CONFIGS = ROOT / "configs"
DETR = "coco/panoptic/batchformer_detr_R50_joint_300ep.yaml"
# Config, options, sizes of the images, objects in each.
STEPS: dict[str, tuple[str, list[str], list[tuple[int, int]], int]] = {
    "quickstart": ("quickstart/batchformer_conditional_detr_shapes.yaml", [], [(96, 96)] * 16, 4),
    "DETR R50": (DETR, [], [(256, 320), (240, 320)], 12),
    "DETR R50, no dropout": (
        DETR,
        ["MODEL.DETR.DROPOUT", "0.0", "MODEL.BATCHFORMER.DROPOUT", "0.0"],
        [(256, 320), (240, 320)],
        12,
    ),
}
PARTS = (
    "backbone",
    "encoder",
    "decoder",
    "heads",
    "matching",
    "losses",
    "backward",
    "clipping",
    "optimizer",
    "logging",
    "rest",
)
_NOT_COUNTED = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "is_same_size",
    "_unsafe_view",
    "_record_function_enter_new",
    "_record_function_exit",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rounds=3)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--before", help="JSON file of an earlier version, to show side by side")


def run(args: argparse.Namespace) -> dict[str, Any]:
    before = read_json(args.before)["rows"] if args.before else []
    earlier = {row["step"]: row["operators"] for row in before}
    rows = []
    for name in args.steps:
        config, opts, sizes, objects = STEPS[name]
        cfg = load_config(str(CONFIGS / config), opts)
        inputs = random_inputs(sizes, [objects] * len(sizes))
        counts = [dict(count) for count in count_steps(cfg, inputs, args.rounds)]
        assert all(count == counts[0] for count in counts), "steps differ"
        rows.append({"step": name, "operators": counts[0], "before": earlier.get(name)})
    return {"rounds": args.rounds, "rows": rows}


def count_steps(cfg: CfgNode, inputs: list[dict[str, Any]], steps: int) -> Iterator["Counter[str]"]:
    """Operators of each part, in training steps after a first one."""
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.DETR.NUM_CLASSES, cfg.MODEL.PANOPTIC.THING_CLASS_IDS = 133, list(range(80))
    torch.manual_seed(0)
    model = build_model(cfg).train()
    loop = StreamTrainLoop(
        model,
        build_optimizer(cfg, model),
        clipper=build_gradient_clipper(cfg),
        stream_weights=dict.fromkeys(TWO_STREAMS.names, 1.0),
        seed=0,
    )
    loop.data_loader = [inputs] * (steps + 1)
    loop.start_iter, loop.max_iter = 0, 2 * steps + 4
    counter = OperatorCounter()
    parts = {
        model.backbone: "backbone",
        model.transformer: "encoder",  # and what leads to it
        model.transformer.decoder: "decoder",
        model.box_head: "heads",
        model.semantic_head: "heads",
    }
    methods = [
        (HungarianMatcher, "__call__", "matching"),
        (SetCriterion, "__call__", "losses"),
        (MaskHead, "decode", "heads"),
        (loop, "_clip", "clipping"),
        (loop.optimizer, "step", "optimizer"),
        (loop, "_log", "logging"),
    ]
    methods += [(module, "forward", part) for module, part in parts.items() if module is not None]
    with contextlib.ExitStack() as stack, EventStorage(1):
        for owner, method, part in methods:
            stack.enter_context(counter.attributing(owner, method, part))
        loop.iter = 1  # not logged
        loop.run_step()
        for _ in range(steps):
            loop.iter += 1
            counter.counts.clear()
            with counter:
                loop.run_step()
            yield Counter(counter.counts)


class OperatorCounter(TorchDispatchMode):
    """Counts operators by the part that is running.

    Attributes:
        counts: operators by part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._part = "rest"

    @contextlib.contextmanager
    def attributing(self, owner: Any, method: str, part: str) -> Iterator[None]:
        """Count what a method calls under the name of a part."""
        original = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            outer, self._part = self._part, part
            try:
                return original(*args, **kwargs)
            finally:
                self._part = outer

        with mock.patch.object(owner, method, counted):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        if not func.is_view and func.overloadpacket.__name__ not in _NOT_COUNTED:
            is_backward = torch._C._current_autograd_node() is not None
            self.counts["backward" if is_backward else self._part] += 1
        return func(*args, **(kwargs or {}))


def how_taken(result: dict[str, Any]) -> str:
    return f"the same in {result['rounds']} steps."


def table(result: dict[str, Any]) -> str:
    columns = {
        row["step"]: [row["before"], row["operators"]] if row["before"] else [row["operators"]]
        for row in result["rows"]
    }
    header = ["part"]
    for step, counts in columns.items():
        header += [f"{step}, before", "now"] if len(counts) > 1 else [step]
    found = [count for counts in columns.values() for count in counts]
    rows = [[part, *(count.get(part, 0) for count in found)] for part in PARTS]
    rows.append(["all", *(sum(count.values()) for count in found)])
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
