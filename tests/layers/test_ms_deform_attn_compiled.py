"""The adapter of the compiled operator of deformable attention, with a stand-in for it."""

import sys
import types

import pytest
import torch

from batchformer_panoptic.layers import deform_attn
from batchformer_panoptic.layers import ms_deform_attn as where
from batchformer_panoptic.layers.ms_deform_attn import deform_attn_compiled, deform_attn_torch
from helpers.sampling_references import LEVELS, by_grid_sample, random_inputs

each_shapes = pytest.mark.parametrize("shapes", LEVELS)


def stand_in(calls):
    """A stand-in for the compiled module, by the ``grid_sample`` formulation."""

    def run(value, shapes, locations, weights):
        return by_grid_sample(value, [tuple(s) for s in shapes.tolist()], locations, weights)

    def forward(value, shapes, starts, locations, weights, step):
        calls.append(("forward", starts.tolist(), step, value.dtype, value.is_contiguous()))
        return run(value, shapes, locations, weights)

    def backward(value, shapes, starts, locations, weights, gradient, step):
        calls.append(("backward", starts.tolist(), step, value.dtype, gradient.is_contiguous()))
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (value, locations, weights)]
            out = run(inputs[0], shapes, inputs[1], inputs[2])
        return torch.autograd.grad(out, inputs, gradient)

    return types.SimpleNamespace(ms_deform_attn_forward=forward, ms_deform_attn_backward=backward)


@each_shapes
def test_compiled_operator_gives_the_same_results_and_gradients(shapes):
    calls, results = [], []
    compiled = stand_in(calls)
    for function in (
        deform_attn_torch,
        lambda *arguments: deform_attn_compiled(compiled, *arguments),
    ):
        value, locations, weights = (x.requires_grad_() for x in random_inputs(shapes))
        out = function(value, shapes, locations, weights)
        out.transpose(0, 1).cumsum(0).sum().backward()
        results.append((out, value.grad, locations.grad, weights.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    starts = [sum(h * w for h, w in shapes[:i]) for i in range(len(shapes))]
    assert [call[1:] for call in calls] == [(starts, 2, torch.float64, True)] * 2


def test_compiled_operator_runs_in_full_precision():
    calls = []
    value, locations, weights = (x.half() for x in random_inputs([(2, 3)]))
    out = deform_attn_compiled(stand_in(calls), value, [(2, 3)], locations, weights)
    assert out.dtype == torch.float16
    assert calls[0][3] == torch.float32


@pytest.mark.parametrize(("batch", "step"), [(2, 2), (64, 64), (66, 33), (96, 48), (67, 1)])
def test_images_of_a_step_divide_the_batch(batch, step):
    """The operator needs steps that divide the batch."""
    calls = []
    inputs = [x.requires_grad_() for x in random_inputs([(2, 3)], batch=batch)]
    deform_attn_compiled(stand_in(calls), inputs[0], [(2, 3)], *inputs[1:]).sum().backward()
    assert [call[2] for call in calls] == [step] * 2


def test_compiled_operator_is_found_by_the_published_name(monkeypatch):
    find = where._compiled_op.__wrapped__
    monkeypatch.setitem(sys.modules, where._COMPILED_OP, None)
    assert find() is None
    module = types.ModuleType(where._COMPILED_OP)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert find() is module


def test_a_broken_compiled_operator_is_reported(monkeypatch, tmp_path):
    (tmp_path / f"{where._COMPILED_OP}.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="undefined symbol"):
        assert where._compiled_op.__wrapped__() is None


def test_cpu_tensors_never_reach_the_compiled_operator(monkeypatch):
    monkeypatch.setattr(where, "_compiled_op", lambda: pytest.fail("imported"))
    value, locations, weights = random_inputs([(2, 3)])
    assert deform_attn(value, [(2, 3)], locations, weights).shape == (2, 3, 6)
