import pytest
import torch
from torch.nn import functional as F

from batchformer_panoptic.layers import conv_upsampled


def the_long_way(x, weight, size):
    return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, padding=1)


DOUBLED = [(10, 14), (9, 14), (10, 13), (9, 13)]  # of a map of 5 x 7
OTHERS = [(5, 7), (10, 7), (15, 21), (8, 14), (10, 12), (11, 14), (3, 4)]


@pytest.mark.parametrize("size", DOUBLED + OTHERS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_and_gradients_equal_those_of_the_upsampled_map(size, channels_last):
    x = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    upstream = torch.randn(3, 6, *size, dtype=torch.float64)
    results = []
    for way in (conv_upsampled, the_long_way):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = way(*leaves, size)
        assert out.shape == upstream.shape
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (2, 2)])
@pytest.mark.parametrize("odd", [0, 1])
def test_smallest_maps(shape, odd):
    x = torch.randn(2, 3, *shape)
    weight = torch.randn(5, 3, 3, 3)
    size = (2 * shape[0] - odd, 2 * shape[1] - odd)
    torch.testing.assert_close(
        conv_upsampled(x, weight, size), the_long_way(x, weight, size), rtol=1e-5, atol=1e-5
    )


def test_no_maps_give_none_and_gradients_of_zero():
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    weight = torch.randn(5, 3, 3, 3, requires_grad=True)
    out = conv_upsampled(x, weight, (7, 8))
    assert out.shape == (0, 5, 7, 8)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_doubled_map_is_never_materialised(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the large map was made")

    monkeypatch.setattr(F, "interpolate", refuse)
    for size in DOUBLED:
        assert conv_upsampled(torch.randn(1, 2, 5, 7), torch.randn(2, 2, 3, 3), size).shape[2:] == (
            size
        )
