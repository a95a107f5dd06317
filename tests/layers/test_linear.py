import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchformer_panoptic.layers import TokenLinear, linear


@pytest.fixture
def convolutions(monkeypatch):
    """How many convolutions are run, each of them however small."""
    calls = []
    convolve = F.conv2d
    monkeypatch.setattr(linear, "_WORTH_A_CONVOLUTION", 1)
    monkeypatch.setattr(F, "conv2d", lambda *args: calls.append(1) or convolve(*args))
    return calls


@pytest.mark.parametrize("shape", [(2, 7, 24), (3, 2, 5, 24), (1, 1, 24), (0, 5, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_are_those_of_a_linear_layer(shape, bias, transposed, convolutions):
    ours = TokenLinear(24, 40, bias=bias)
    plain = nn.Linear(24, 40, bias=bias)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    if transposed:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    upstream = torch.randn(*shape[:-1], 40)
    results = []
    for layer in (ours, plain):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        results.append([out, *torch.autograd.grad(out, [leaf, *layer.parameters()], upstream)])
    assert len(convolutions) == (1 if x.numel() else 0)
    assert results[0][0].shape == upstream.shape
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_nothing_is_copied_on_the_way_in_or_out(convolutions):
    layer = TokenLinear(32, 48)
    out = layer(torch.randn(2, 16, 32))
    assert convolutions == [1]
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_take_the_usual_way(dtype, convolutions):
    layer = TokenLinear(24, 40).to(dtype)
    x = torch.randn(2, 7, 24, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not convolutions


def test_rows_autocast_and_small_inputs_take_the_usual_way(convolutions, monkeypatch):
    layer = TokenLinear(24, 40)
    assert torch.equal(layer(torch.ones(7, 24)), F.linear(torch.ones(7, 24), *layer.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(2, 7, 24)).dtype == torch.bfloat16
    monkeypatch.setattr(linear, "_WORTH_A_CONVOLUTION", 2 * 7 * 24 * 40 + 1)
    layer(torch.ones(2, 7, 24))
    assert not convolutions
    layer(torch.ones(2, 8, 24))
    assert convolutions == [1]


def test_it_has_the_parameters_and_the_start_of_a_linear_layer():
    torch.manual_seed(0)
    ours = TokenLinear(24, 40)
    torch.manual_seed(0)
    plain = nn.Linear(24, 40)
    assert list(ours.state_dict()) == list(plain.state_dict())
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)
