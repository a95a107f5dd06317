"""The trainer on a GPU: steps like those of a CPU, number formats, compilation, the exchange.

The runs on the CPU, the first device of the fixture, show that the tests are right.
"""

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from torch import Tensor

from batchformer_panoptic.engine import PanopticTrainer, load_config
from batchformer_panoptic.engine.trainer import parallel
from helpers.baseline_runs import QUICKSTART
from helpers.commands import REPO_ROOT
from helpers.stand_in import DATASET, stand_in_cfg
from helpers.tiny_model import NUM_CLASSES, NUM_THINGS, random_inputs, tiny_cfg, tiny_model, total


class QuickstartTrainer(PanopticTrainer):
    """Trains on four pictures of noise."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, *, start_iter: int = 0) -> Any:
        """The same batch without end."""
        return repeat(random_inputs([(96, 96)] * 4))


class Trained(NamedTuple):
    """Losses of the last step, gradients as they were clipped, and what the class head returned."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    dtypes: set[torch.dtype]


def quickstart_cfg(folder: Path, device: torch.device | str, *opts: Any) -> CfgNode:
    """The quickstart without dropout, whose random numbers differ between devices."""
    stand_in_cfg(folder)  # registers the data set
    own = ["MODEL.DEVICE", str(device), "OUTPUT_DIR", str(folder), "SEED", "0"]
    own += ["DATASETS.TRAIN", str((DATASET,)), "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "1"]
    own += ["MODEL.DETR.DROPOUT", "0.0", "MODEL.BATCHFORMER.DROPOUT", "0.0"]
    cfg = load_config(str(REPO_ROOT / QUICKSTART), [*own, *map(str, opts)])
    cfg.MODEL.DETR.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(NUM_THINGS))
    if "TF32" in cfg.SOLVER:
        cfg.SOLVER.TF32 = False
    return cfg


def train(cfg: CfgNode) -> Trained:
    torch.manual_seed(0)  # of the initial weights
    trainer = QuickstartTrainer(cfg)
    dtypes: set[torch.dtype] = set()
    head = trainer.model.box_head.class_embed
    head.register_forward_hook(lambda *call: dtypes.add(call[-1].dtype))
    trainer.train()
    losses = {name: v for name, (v, _) in trainer.storage.latest().items() if "loss" in name}
    named = trainer.model.named_parameters()
    gradients = {name: p.grad.float().cpu() for name, p in named if p.grad is not None}
    return Trained(losses, gradients, dtypes)


def assert_alike(ours: Trained, expected: Trained, *, losses: float, gradients: float) -> None:
    """Losses relative to themselves, each gradient relative to the norm of all."""
    assert ours.losses == pytest.approx(expected.losses, rel=losses)
    assert ours.gradients.keys() == expected.gradients.keys()
    norm = torch.cat([value.flatten() for value in expected.gradients.values()]).norm()
    assert norm > 0
    for name, value in expected.gradients.items():
        assert (ours.gradients[name] - value).norm() <= gradients * norm, name


def test_a_step_of_the_quickstart_is_that_of_a_cpu(tmp_path: Path, device: torch.device) -> None:
    expected = train(quickstart_cfg(tmp_path / "cpu", "cpu"))
    ours = train(quickstart_cfg(tmp_path / "device", device))
    assert {name for name in ours.losses if "/" not in name} >= {"total_loss", "loss_ce"}
    assert_alike(ours, expected, losses=1e-4, gradients=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_mixed_precision_is_close(dtype: torch.dtype, tmp_path: Path, device: torch.device) -> None:
    name = str(dtype).removeprefix("torch.")
    cfg = quickstart_cfg(tmp_path / "mixed", device, "SOLVER.AMP.ENABLED", True)
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("float16 is for GPUs")
    if "DTYPE" in cfg.SOLVER.AMP:
        cfg.SOLVER.AMP.DTYPE = name
    elif device.type == "cuda" and dtype == torch.bfloat16:
        pytest.skip("mixed precision on a GPU is float16")
    ours = train(cfg)
    assert ours.dtypes == {dtype}
    expected = train(quickstart_cfg(tmp_path / "full", device))
    assert expected.dtypes == {torch.float32}
    assert ours.losses["total_loss"] != expected.losses["total_loss"]
    assert ours.losses["total_loss"] == pytest.approx(expected.losses["total_loss"], rel=0.02)


@pytest.mark.slow
def test_a_compiled_step_is_that_of_python(tmp_path: Path, device: torch.device) -> None:
    cfg = quickstart_cfg(tmp_path / "compiled", device)
    if "COMPILE" not in cfg.SOLVER:
        pytest.skip("needs SOLVER.COMPILE")
    expected = train(quickstart_cfg(tmp_path / "python", device))
    cfg.SOLVER.COMPILE = True
    assert_alike(train(cfg), expected, losses=1e-4, gradients=1e-3)


@pytest.fixture
def _one_process_of_many(tmp_path: Path, device: torch.device) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    meeting = f"file://{tmp_path}/store"
    dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process_of_many")
@pytest.mark.parametrize(("compression", "rounding"), [("none", 0.0), ("bfloat16", 2**-8)])
def test_gradients_pass_through_the_exchange(
    compression: str, rounding: float, device: torch.device
) -> None:
    overrides = {"MODEL__BATCHFORMER__ENABLED": True}
    cfg = tiny_cfg(**overrides, SOLVER__GRADIENT_COMPRESSION=compression)
    inputs = random_inputs([(48, 64), (64, 56)])
    alone, wrapped = (tiny_model(**overrides).to(device).train() for _ in range(2))
    total(alone(inputs)).backward()
    exchanging = parallel(wrapped, cfg)
    for _ in range(2):  # the second step has buckets in the order of the first
        exchanging.zero_grad()
        total(exchanging(inputs)).backward()
    # Sums of a GPU may be in another order each time.
    tolerance = rounding + (1e-5 if device.type == "cuda" else 0.0)
    differences = {}
    for (name, ours), expected in zip(wrapped.named_parameters(), alone.parameters(), strict=True):
        if expected.grad is not None:
            largest = expected.grad.abs().max().clamp(min=1e-12)
            differences[name] = ((ours.grad - expected.grad).abs().max() / largest).item()
    assert max(differences.values()) <= tolerance, differences
    assert max(differences.values()) > 0 or not rounding
