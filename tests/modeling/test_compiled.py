"""Compiled regions: equal losses and gradients, no compilation for new sizes, plain copies."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from batchformer_panoptic import prepare_for_inference
from batchformer_panoptic.engine.train_loop import WeightAverage
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling import fast_inference
from batchformer_panoptic.modeling.compiled import check_compiler, compile_regions
from batchformer_panoptic.modeling.precision import HalfWeights
from helpers.tiny_classifier import labelled_images, tiny_classifier
from helpers.tiny_model import MASK2FORMER, random_inputs, tiny_model, total

# Padded and unpadded batches, square and other maps; then sizes that are new in no other way.
FIRST = [[(64, 64), (48, 64)], [(64, 56)] * 2, [(80, 96)] * 2, [(72, 64), (72, 48)]]
OTHERS = [[(96, 96), (33, 96)], [(40, 72)] * 2, [(57, 61)] * 2]

SLOW = [
    pytest.param(name, True, marks=pytest.mark.slow)
    for name in ("detr", "conditional", "smca", "smca_multiscale", "deformable", "mask2former")
]


@pytest.fixture(autouse=True)
def fresh():
    """Forget what other tests compiled, and restore the limit."""
    limit = torch._dynamo.config.cache_size_limit
    torch.compiler.reset()
    yield
    torch._dynamo.config.cache_size_limit = limit
    torch.compiler.reset()


def two_models(name: str, **overrides: Any) -> tuple[nn.Module, nn.Module]:
    strides = [1, 2, 2, 2 if name == "smca_multiscale" else 1]
    overrides |= {
        "MODEL__DETR__TRANSFORMER_NAME": name,
        "MODEL__BATCHFORMER__ENABLED": True,
        "MODEL__SMALL_RESNET__STAGE_STRIDES": strides,
    }
    overrides |= MASK2FORMER if name == "mask2former" else {}
    return tiny_model(**overrides).train(), tiny_model(**overrides).train()


def step(model: nn.Module, sizes: list[tuple[int, int]], half: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)  # for points of masks
    with HalfWeights(model, torch.bfloat16).in_use() if half else contextlib.nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses: dict[str, Any] = model(random_inputs(sizes))
        total(losses).backward()
    return losses


def assert_same_gradients(compiled: nn.Module, plain: nn.Module, tolerance: float) -> None:
    ours = dict(compiled.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().item()
            bounds = {"rtol": 0, "atol": tolerance * scale + 1e-6}
            torch.testing.assert_close(ours[name].grad, parameter.grad, **bounds, msg=name)


@pytest.mark.parametrize(("name", "masks"), [("detr", False), *SLOW])
def test_losses_are_equal_and_new_sizes_are_not_compiled(name: str, masks: bool) -> None:
    plain, compiled = two_models(name, MODEL__MASK_ON=masks)
    counter = CompileCounterWithBackend("eager")
    compile_regions(compiled, counter)
    counts = []
    for sizes in (*FIRST, *OTHERS):
        expected, found = step(plain, sizes), step(compiled, sizes)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
        counts.append(counter.frame_count)
    assert_same_gradients(compiled, plain, 1e-4)
    # SMCA's multi-scale encoder has odd and even maps to double.
    assert counts[-2] == counts[-1] <= 40
    if name != "smca_multiscale":
        assert counts[len(FIRST) - 1] >= counts[-1] - 1
    assert counts[0] >= 4 + masks  # backbone, encoder, block, decoder, mask head


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
def test_activation_checkpointing_of_compiled_layers(half: bool) -> None:
    parts = ["backbone", "encoder", "decoder", "mask_head"]
    overrides = {"MODEL__ACTIVATION_CHECKPOINTING": parts}
    overrides |= {"MODEL__SMALL_RESNET__NORM": "FrozenBN"}
    plain, compiled = two_models("conditional", **overrides)
    compile_regions(compiled, "aot_eager")
    expected, found = step(plain, FIRST[0], half), step(compiled, FIRST[0], half)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0.05 if half else 1e-4, atol=1e-5)
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        for model in (compiled, plain)
    )
    assert (ours - theirs).norm() <= (0.05 if half else 1e-5) * theirs.norm()


@pytest.mark.slow
def test_the_default_compiler_trains_equally() -> None:
    try:
        check_compiler(torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))
    one = {"MODEL__DETR__ENC_LAYERS": 1, "MODEL__DETR__DEC_LAYERS": 1, "MODEL__MASK_ON": False}
    plain, compiled = two_models("detr", **one)
    compile_regions(compiled)
    for sizes in (FIRST[0], OTHERS[0]):
        expected, found = step(plain, sizes), step(compiled, sizes)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert_same_gradients(compiled, plain, 1e-3)


def test_blocks_of_an_image_classifier_are_compiled() -> None:
    plain, compiled = (tiny_classifier(MODEL__BATCHFORMER__ENABLED=True) for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    compile_regions(compiled, counter)
    losses = [total(model.train()(labelled_images(4))) for model in (plain, compiled)]
    torch.testing.assert_close(losses[1], losses[0])
    assert counter.frame_count >= 2


def test_copies_and_weights_are_those_of_an_uncompiled_model() -> None:
    plain, compiled = two_models("detr")
    keys = list(plain.state_dict())
    compile_regions(compiled, lambda *_: pytest.fail("compiled"))
    assert list(compiled.state_dict()) == keys
    inputs = random_inputs(FIRST[0])
    expected = total(plain(inputs))
    copies = (copy.deepcopy(compiled), WeightAverage(compiled, 0.9).model)
    for one in copies:
        torch.testing.assert_close(total(one.train()(inputs)), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_the_fast_copy_compiles_the_same_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(fast_inference, "check_compiler", lambda device: None)
    monkeypatch.setattr(fast_inference, "compile_regions", lambda m: compile_regions(m, counter))
    model = tiny_model().eval()
    fast = prepare_for_inference(model, compile=True)
    counts = []
    for sizes in (*FIRST, *OTHERS):
        for ours, expected in zip(
            fast(random_inputs(sizes)), model(random_inputs(sizes)), strict=True
        ):
            torch.testing.assert_close(
                ours["instances"].scores, expected["instances"].scores, rtol=1e-4, atol=1e-5
            )
        counts.append(counter.frame_count)
    assert 4 <= counts[len(FIRST) - 1] == counts[-1]
