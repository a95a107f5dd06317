"""Runs of ``train_net.py`` with what the model returned: losses in training, results afterwards."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from helpers.commands import load_script
from helpers.tiny_dataset import TinyPanopticDataset

# Whose outputs are kept in evaluation: the class and box heads, and the masks before upsampling.
RAW_OUTPUTS = {
    "logits": "box_head.class_embed",
    "boxes": "box_head.bbox_embed",
    "masks": "mask_head.predictor",
}


class EnoughError(Exception):
    """The wanted number of training steps was seen."""


class Calls(NamedTuple):
    """What the model returned, call by call."""

    losses: list[dict[str, float]]
    results: list[dict[str, Any]]
    raw: dict[str, list[Tensor]]


def _is_detector(module: nn.Module) -> bool:
    name = "PanopticDETR"  # registered when the command is loaded
    return name in META_ARCH_REGISTRY and isinstance(module, META_ARCH_REGISTRY.get(name))


@contextlib.contextmanager
def _recorded(stop_after: int | None) -> Iterator[Calls]:
    calls = Calls([], [], {name: [] for name in RAW_OUTPUTS})
    inner: dict[nn.Module, str] = {}

    def before(module: nn.Module, inputs: Any) -> None:
        if not _is_detector(module):
            return
        if module.training and len(calls.losses) == stop_after:
            raise EnoughError
        inner.clear()
        inner.update({module.get_submodule(path): name for name, path in RAW_OUTPUTS.items()})

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        if _is_detector(module):
            if module.training:
                calls.losses.append({name: loss.item() for name, loss in output.items()})
            else:
                calls.results.extend(output)
        elif module in inner and not module.training:
            calls.raw[inner[module]].append(output.detach().clone())

    handles = (
        nn.modules.module.register_module_forward_pre_hook(before),
        nn.modules.module.register_module_forward_hook(after),
    )
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def recorded_run(arguments: Sequence[str], *, stop_after: int | None = None) -> Calls:
    """Run ``train_net.py`` on one thread; it must succeed or be stopped after some steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _recorded(stop_after) as calls, contextlib.suppress(EnoughError):
            assert load_script("train_net.py").main(list(arguments)) == 0
    finally:
        torch.set_num_threads(threads)
    return calls


QUICKSTART = "configs/quickstart/batchformer_conditional_detr_shapes.yaml"
QUICKSTART_STEPS = 30


def quickstart_losses(root: Path) -> list[dict[str, float]]:
    """The first losses of the quickstart on 64 of its pictures; writes to the current folder.

    The schedule is that of the whole run; a batch has 4 pictures instead of 16.
    """
    arguments = ["--output", "datasets/shapes_panoptic", "--num-train", "64", "--num-val", "8"]
    script = load_script("datasets/prepare_shapes_panoptic.py")
    assert script.main([*arguments, "--seed", "0"]) == 0
    options = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "4"]
    config = str(root / QUICKSTART)
    return recorded_run(["--config-file", config, *options], stop_after=QUICKSTART_STEPS).losses


def options_of_data(dataset: TinyPanopticDataset) -> list[str]:
    """The end of a command line that trains and evaluates on the data set."""
    names = str((dataset.name,))
    rows = str([dataset.row])
    return ["DATASETS.CUSTOM_PANOPTIC", rows, "DATASETS.TRAIN", names, "DATASETS.TEST", names]


def panoptic_quality(output_dir: Path) -> dict[str, dict[str, Any]]:
    """What the last panoptic evaluation of a run found of each class, by its name."""
    (path,) = output_dir.rglob("panoptic_results.json")
    return {row["name"]: row for row in json.loads(path.read_text())["per_class"]}
