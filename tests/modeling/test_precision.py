"""Mixed precision: dtypes of devices, weights cast together with unchanged results, TF32."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchformer_panoptic import prepare_for_inference
from batchformer_panoptic.engine.run import argument_parser
from batchformer_panoptic.engine.setup import setup_cfg
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.layers import upsampled_conv
from batchformer_panoptic.modeling.precision import HalfWeights, amp_dtype, cast_weights, set_tf32
from helpers.tiny_classifier import tiny_classifier
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.tiny_model import MASK2FORMER, random_inputs, tiny_cfg, tiny_model, total
from helpers.trained_files import write_run

NAMES = ["detr", "conditional", "smca", "deformable", "mask2former"]
SIZES = [(64, 64), (48, 64)]
HALF = torch.bfloat16


class Casts(TorchDispatchMode):
    """Collects the shapes of tensors that are cast from float32 to half precision, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.shapes += [args[0].shape] * (out.dtype == HALF)
        return out


def overrides_of(name: str) -> dict[str, Any]:
    changes = {"MODEL__DETR__TRANSFORMER_NAME": name, "MODEL__BATCHFORMER__ENABLED": True}
    return changes | (MASK2FORMER if name == "mask2former" else {})


def step(model: nn.Module, weights: HalfWeights | None = None) -> dict[str, torch.Tensor]:
    """The losses and gradients of a step under autocast."""
    torch.manual_seed(1)
    model.zero_grad()
    with contextlib.nullcontext() if weights is None else weights.in_use():
        with torch.autocast("cpu", dtype=HALF):
            losses = model(random_inputs(SIZES))
        total(losses).backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return losses | gradients


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_weights_cast_together_is_that_of_autocast(
    name: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
):
    # The one difference: taps of a convolution, and their gradients, are summed after they are
    # rounded, not before.
    summed = upsampled_conv._doubled_weight
    monkeypatch.setattr(upsampled_conv, "_doubled_weight", lambda weight: summed(weight.to(HALF)))
    overrides = overrides_of(name)
    if checkpointed:
        parts = ["decoder"] if name == "mask2former" else ["encoder", "decoder", "mask_head"]
        overrides["MODEL__ACTIVATION_CHECKPOINTING"] = parts
    model = tiny_model(**overrides).train()
    weights = HalfWeights(model, HALF)
    expected, found = step(model), step(model, weights)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert found[key].dtype == torch.float32, key
        is_summed = key.startswith("mask_head.convs") and key.endswith("weight")
        bound = 0.01 * value.detach().abs().max().item() if is_summed else 0
        torch.testing.assert_close(found[key], value, rtol=0, atol=bound, msg=key)
    assert all(p.dtype == torch.float32 and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_is_cast_by_itself(name: str):
    model = tiny_model(**overrides_of(name)).train()
    weights = HalfWeights(model, HALF)
    with Casts() as separate:
        step(model)
    with Casts() as together:
        step(model, weights)
    # Layers that are applied together are one weight without copies.
    assert len(separate.shapes) - len(together.shapes) >= 0.8 * len(list(cast_weights(model)))


def test_the_copies_are_the_rounded_weights_and_pass_gradients_on():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[2].weight
    model[0].requires_grad_(False)
    weights = dict(model.named_parameters())
    with HalfWeights(model, HALF).in_use():
        for key, copy in model.named_parameters():
            is_norm = key[0] == "1"
            expected = weights[key] if is_norm else weights[key].to(HALF)
            assert torch.equal(copy, expected), key
            assert copy.dtype == expected.dtype, key
            assert copy.requires_grad == (key[0] != "0"), key
        shared = model[2].weight
        assert model[3].weight is shared
        shared.float().square().sum().backward()
    assert all(value is weights[key] for key, value in model.named_parameters())
    assert torch.equal(model[2].weight.grad, 2 * shared.float())
    assert model[2].bias.grad is None


def test_the_weights_return_after_an_error():
    model = nn.Linear(2, 2)
    weight = model.weight
    with pytest.raises(ZeroDivisionError), HalfWeights(model, HALF).in_use():
        raise ZeroDivisionError
    assert model.weight is weight


def test_groups_are_as_large_as_buckets_and_cover_all_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("batchformer_panoptic.modeling.precision._GROUP_NUMEL", 20)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    weights = HalfWeights(model, HALF)
    assert [len(group) for group in weights._groups] == [2, 2, 2]
    with weights.in_use():
        assert {value.dtype for value in model.parameters()} == {HALF}


def test_a_model_that_is_frozen_has_copies():
    model = nn.Linear(2, 2).requires_grad_(False)
    with HalfWeights(model, HALF).in_use():
        assert model.weight.dtype == HALF


def test_weights_of_an_image_classifier_are_cast_except_norms():
    model = tiny_classifier()
    cast = {id(weight) for *_, weight in cast_weights(model)}
    names = {name for name, weight in model.named_parameters() if id(weight) in cast}
    assert any("qkv" in name for name in names)
    assert not any("norm" in name for name in names)


@torch.no_grad()
def test_the_fast_copy_casts_no_weight():
    model = tiny_model().eval()
    fast = prepare_for_inference(model, bfloat16=True)
    shapes = {weight.shape for *_, weight in cast_weights(model)}
    with Casts() as casts:
        fast(random_inputs(SIZES[:1]))
    assert casts.shapes
    assert not shapes & set(casts.shapes)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    kept = {p.dtype for name, p in fast.named_parameters() if "norm" in name}
    assert kept == {torch.float32}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A GPU, if not in this machine, with or without bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: request.param)


@pytest.mark.parametrize(
    ("card", "device", "name", "dtype"),
    [
        (True, "cuda", "", torch.bfloat16),
        (False, "cuda", "", torch.float16),
        (False, "cpu", "", torch.bfloat16),
        (True, "cuda:1", "float16", torch.float16),
        (True, "cuda", "bfloat16", torch.bfloat16),
        (False, "cpu", "bfloat16", torch.bfloat16),
    ],
    indirect=["card"],
)
def test_the_dtype_follows_from_the_device(
    card: None, device: str, name: str, dtype: torch.dtype
) -> None:
    assert amp_dtype(tiny_cfg(MODEL__DEVICE=device, SOLVER__AMP__DTYPE=name)) == dtype


@pytest.mark.parametrize(
    ("card", "device", "name", "message"),
    [
        (False, "cuda", "bfloat16", r"this GPU does not have: use float16$"),
        (False, "cpu", "float16", r"float16 is for GPUs; on a CPU use bfloat16$"),
        (True, "cuda", "half", r"DTYPE is 'half'; known: '', 'bfloat16', 'float16'$"),
    ],
    indirect=["card"],
)
def test_a_dtype_that_the_device_lacks_is_refused(
    card: None, device: str, name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        amp_dtype(tiny_cfg(MODEL__DEVICE=device, SOLVER__AMP__DTYPE=name))


@pytest.fixture
def tf32() -> Iterator[None]:
    """Restore the flags of the process."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_one_switch_for_products_and_convolutions(tf32: None, allowed: bool) -> None:
    set_tf32(tiny_cfg(SOLVER__TF32=allowed))
    assert torch.backends.cuda.matmul.allow_tf32 == allowed
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")


def test_a_run_sets_the_switch(
    tf32: None, tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset
) -> None:
    run = write_run(tmp_path / "run", tiny_panoptic_dataset, SOLVER__TF32=False)
    torch.backends.cudnn.allow_tf32 = True
    argv = ["--config-file", str(run.config_file), "OUTPUT_DIR", str(tmp_path / "output")]
    setup_cfg(argument_parser().parse_args(argv))
    assert not torch.backends.cudnn.allow_tf32
