"""Operators of a training step, and the places where the host waits for the device."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchformer_panoptic.batchformer.batchformer import TWO_STREAMS
from batchformer_panoptic.data.io import read_json
from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.solver import build_gradient_clipper, build_optimizer
from batchformer_panoptic.engine.train_loop import StreamTrainLoop
from batchformer_panoptic.modeling.transformer import TRANSFORMER_REGISTRY
from helpers.commands import REPO_ROOT, add_benchmarks_to_path
from helpers.tiny_model import MASK2FORMER, random_inputs, tiny_cfg, tiny_model

# Functions that may read a tensor's values in a training step.
READERS = {
    "HungarianMatcher.__call__": "the assignment is made on the host",
    "FiniteCheck.read": "values that were copied to the host before the backward pass",
    "MetricWindow.flush": "in iterations that are logged",
    "PilotLayout.matching": "numbers that were made on the host",
}
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Any:
    add_benchmarks_to_path(monkeypatch)
    return importlib.import_module("benchmarks.operators")


@pytest.mark.parametrize(
    "step",
    [
        "quickstart",
        pytest.param("DETR R50", marks=pytest.mark.slow),
        pytest.param("DETR R50, no dropout", marks=pytest.mark.slow),
    ],
)
def test_no_part_has_more_operators_than_documented(operators: Any, step: str) -> None:
    """After a change that needs more of them, run the benchmark again."""
    rows = read_json(REPO_ROOT / "benchmarks" / "results" / "operators.json")["rows"]
    (bounds,) = (row["operators"] for row in rows if row["step"] == step)
    config, opts, sizes, objects = operators.STEPS[step]
    cfg = load_config(str(REPO_ROOT / "configs" / config), opts)
    (counts,) = operators.count_steps(cfg, random_inputs(sizes, [objects] * len(sizes)), 1)
    assert set(counts) <= set(bounds) <= set(operators.PARTS)
    assert {part: n for part, n in counts.items() if n > bounds[part]} == {}
    assert counts["backward"] > 100


class Waits(TorchDispatchMode):
    """Records the functions of the package in which an operator makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in _INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _WAITING or by_mask:
            self.places.add(place())
        return func(*args, **(kwargs or {}))


def place() -> str:
    """The innermost function of the package that is running, with its class."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if "batchformer_panoptic" in Path(frame.f_code.co_filename).parts:
            return frame.f_code.co_qualname
        frame = frame.f_back
    return "backward"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """A mode that also notices copies to the host, which do not show on a CPU."""
    mode = Waits()

    def noticing(read: Any) -> Any:
        def noticed(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            mode.places.add(place())
            return read(self, *args, **kwargs)

        return noticed

    for name in ("cpu", "item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, noticing(getattr(Tensor, name)))
    return mode


def make_loop(model: nn.Module, cfg: Any, batch: list[dict[str, Any]]) -> StreamTrainLoop:
    loop = StreamTrainLoop(
        model,
        build_optimizer(cfg, model),
        clipper=build_gradient_clipper(cfg),
        stream_weights=dict.fromkeys(TWO_STREAMS.names, 1.0),
        seed=0,
    )
    loop.data_loader, loop.start_iter, loop.max_iter = [batch] * 2, 0, 100
    return loop


def overrides_of(name: str) -> dict[str, Any]:
    others = MASK2FORMER if name == "mask2former" else {}
    return {
        "MODEL__DETR__TRANSFORMER_NAME": name,
        "MODEL__SMALL_RESNET__STAGE_STRIDES": [1, 2, 2, 2 if name == "smca_multiscale" else 1],
        "MODEL__BATCHFORMER__ENABLED": True,
        "MODEL__SEMANTIC_AUX__ENABLED": True,
        **others,
    }


@pytest.mark.parametrize("name", sorted(name for name, _ in TRANSFORMER_REGISTRY))
def test_a_step_reads_values_in_named_places_only(name: str, waits: Waits) -> None:
    overrides = overrides_of(name)
    model = tiny_model(**overrides).train()
    batch = random_inputs([(64, 64), (48, 64)], [3, 2])
    loop = make_loop(model, tiny_cfg(**overrides), batch)
    with EventStorage(1):
        loop.iter = 1
        loop.run_step()
        waits.places.clear()
        loop.iter = 2
        with waits:
            loop.run_step()
    assert waits.places <= set(READERS)
    assert "HungarianMatcher.__call__" in waits.places


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.cpu()]
)
def test_a_function_that_reads_is_noticed(
    read: Callable[[Tensor], Any], waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().train()
    criterion = model.criterion

    def reading(predictions: Any, *inputs: Any) -> Any:
        read(predictions.logits)
        return criterion(predictions, *inputs)

    monkeypatch.setattr(model, "criterion", reading)
    inputs = random_inputs([(48, 64)])
    waits.places.clear()
    with waits:
        model(inputs)
    assert waits.places == {"HungarianMatcher.__call__", "PanopticDETR.losses"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(name for name, _ in TRANSFORMER_REGISTRY))
def test_synchronisations_of_a_forward_pass(name: str) -> None:
    """The matcher's copy and nothing else: PyTorch warns of each other one."""
    overrides = {**overrides_of(name), "MODEL__DEVICE": "cuda"}
    model = tiny_model(**overrides).train()
    batch = random_inputs([(64, 64), (48, 64)], [3, 2])
    model(batch)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing CUDA") as found:
            model(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in found if "synchronizing CUDA" in str(w.message)]) == 1
