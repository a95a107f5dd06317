"""Deformable attention against its definition, at the borders, and its running time."""

import statistics
import time

import pytest
import torch

from batchformer_panoptic.layers import MSDeformAttn, deform_attn
from batchformer_panoptic.layers import ms_deform_attn as where
from batchformer_panoptic.layers.ms_deform_attn import deform_attn_torch
from helpers.sampling_references import LEVELS, by_grid_sample, plain_loops, random_inputs

each_shapes = pytest.mark.parametrize("shapes", LEVELS)


@each_shapes
def test_equals_the_definition(shapes, device):
    value, locations, weights = (x.to(device) for x in random_inputs(shapes))
    ours = deform_attn(value, shapes, locations, weights)
    expected = plain_loops(value, shapes, locations, weights)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert ours.shape == (2, 3, 6)


@each_shapes
def test_gradients_equal_those_of_grid_sample(shapes, device):
    results = []
    for function in (deform_attn_torch, by_grid_sample):
        inputs = (x.to(device).requires_grad_() for x in random_inputs(shapes))
        value, locations, weights = inputs
        out = function(value, shapes, locations, weights)
        (out * torch.arange(out.numel(), device=device).view_as(out)).sum().backward()
        results.append((out, value.grad, locations.grad, weights.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_gradients_on_cell_centres_equal_those_of_grid_sample():
    """All points start on centres of cells, where left and right derivatives differ."""
    shapes = [(4, 4), (2, 2)]
    gradients = []
    for function in (deform_attn_torch, by_grid_sample):
        value, locations, weights = random_inputs(shapes, spread=0.0)
        locations = (locations - 0.125).requires_grad_()  # centres on the finer level only
        function(value, shapes, locations, weights).square().sum().backward()
        gradients.append(locations.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@each_shapes
def test_gradcheck(shapes):
    inputs = [x.requires_grad_() for x in random_inputs(shapes, batch=1, queries=2)]
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: deform_attn(value, shapes, locations, weights), inputs
    )


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ((0.25, 0.5), 1.0),  # centre of the left cell
        ((0.75, 0.5), 2.0),
        ((0.5, 0.5), 1.5),
        ((0.0, 0.5), 0.5),  # outer edge: half of the sample is outside
        ((1.0, 0.5), 1.0),
        ((-0.25, 0.5), 0.0),  # the centre of the cell beyond
        ((0.25, 0.0), 0.5),
        ((1e9, 0.5), 0.0),
        ((0.5, -1e9), 0.0),
        ((-1e30, 1e30), 0.0),
    ],
)
def test_borders_read_zero(location, expected):
    value = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    locations = torch.tensor(location).view(1, 1, 1, 1, 1, 2)
    out = deform_attn(value, [(1, 2)], locations, torch.ones(1, 1, 1, 1, 1))
    torch.testing.assert_close(out, torch.full((1, 1, 1), expected))


def test_no_queries():
    value, locations, weights = (x.requires_grad_() for x in random_inputs([(2, 2)], queries=0))
    out = deform_attn(value, [(2, 2)], locations, weights)
    assert out.shape == (2, 0, 6)
    out.sum().backward()
    assert not value.grad.any()


def test_only_required_gradients_are_computed():
    for wanted in range(3):
        inputs = random_inputs([(2, 3)])
        inputs[wanted].requires_grad_()
        deform_attn(inputs[0], [(2, 3)], *inputs[1:]).sum().backward()
        assert inputs[wanted].grad.any()


def test_half_precision_values_are_sampled_at_full_precision_places(device):
    shapes = [(40, 60)]
    value, locations, weights = (x.to(device) for x in random_inputs(shapes, spread=0.4))
    expected = deform_attn(value, shapes, locations, weights)
    half = value.bfloat16()
    ours = deform_attn(half, shapes, locations.float(), weights.bfloat16())
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=0.05)


@pytest.mark.slow
def test_no_slower_than_grid_sample():
    """Forward and backward of an encoder layer's sampling, alternating; about half the time."""
    shapes = [(32, 48), (16, 24), (8, 12), (4, 6)]
    queries = sum(height * width for height, width in shapes)
    sizes = {"batch": 1, "queries": queries, "heads": 8, "head_dim": 32, "points": 4}
    inputs = [x.float().requires_grad_() for x in random_inputs(shapes, **sizes, spread=0.45)]
    seconds = {deform_attn_torch: [], by_grid_sample: []}
    for _ in range(4):
        for function, times in seconds.items():
            start = time.perf_counter()
            function(inputs[0], shapes, *inputs[1:]).square().sum().backward()
            times.append(time.perf_counter() - start)
    ours, theirs = (statistics.median(times[1:]) for times in seconds.values())
    assert ours < theirs


# --- the module ----------------------------------------------------------------------------------


def make_module(**overrides):
    arguments = {"embed_dim": 8, "num_heads": 4, "num_levels": 2, "num_points": 3} | overrides
    torch.manual_seed(0)
    return MSDeformAttn(**arguments)


def test_starts_as_published():
    module = make_module()
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any()
    for layer in (module.attention_weights, module.value_proj, module.output_proj):
        assert not layer.bias.any()
    offsets = module.sampling_offsets.bias.view(4, 2, 3, 2)
    directions = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    for head, direction in enumerate(directions):
        for level in range(2):
            for point in range(3):
                expected = torch.tensor(direction).float() * (point + 1)
                torch.testing.assert_close(offsets[head, level, point], expected, rtol=0, atol=1e-6)
    diagonal = make_module(num_heads=8).sampling_offsets.bias.view(8, 2, 3, 2)[1, 0, 1]
    torch.testing.assert_close(diagonal, torch.tensor([2.0, 2.0]))


def test_offsets_count_cells_around_points_and_half_sizes_around_boxes(monkeypatch):
    module = make_module()
    seen = []

    def spy(value, level_shapes, locations, weights):
        seen.append((locations, weights))
        return value.new_zeros(*locations.shape[:2], 8)

    monkeypatch.setattr(where, "deform_attn", spy)
    shapes = [(2, 4), (1, 2)]
    tokens, queries = torch.randn(1, 10, 8), torch.randn(1, 1, 8)
    center = torch.tensor([0.5, 0.25])
    size = torch.tensor([0.3, 0.6])
    module(queries, center.expand(1, 1, 2, 2), tokens, shapes, None)
    module(queries, torch.cat([center, size]).expand(1, 1, 2, 4), tokens, shapes, None)
    offsets = module.sampling_offsets.bias.view(4, 2, 3, 2)
    (points, weights), (boxes, _) = seen
    for level, (height, width) in enumerate(shapes):
        expected = center + offsets[:, level] / torch.tensor([width, height])
        torch.testing.assert_close(points[0, 0, :, level], expected)
        expected = center + offsets[:, level] / 3 * size / 2
        torch.testing.assert_close(boxes[0, 0, :, level], expected)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))


def test_padding_reads_as_zero():
    module = make_module()
    torch.nn.init.normal_(module.value_proj.bias)
    shapes = [(2, 2), (1, 1)]
    tokens, reference = torch.randn(1, 5, 8), torch.full((1, 2, 2, 2), 0.5)
    mask = torch.tensor([[False, True, False, True, False]])
    changed = torch.where(mask[..., None], torch.randn(1, 5, 8), tokens)
    queries = torch.randn(1, 2, 8)
    ours = [module(queries, reference, x, shapes, mask) for x in (tokens, changed)]
    torch.testing.assert_close(*ours, rtol=0, atol=0)
    everything = module(queries, reference, tokens, shapes, torch.ones_like(mask))
    torch.testing.assert_close(everything, module.output_proj.bias.expand_as(everything))
    assert not torch.allclose(ours[0], module(queries, reference, tokens, shapes, None))


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="8 is not a multiple of num_heads 3"):
        make_module(num_heads=3)
