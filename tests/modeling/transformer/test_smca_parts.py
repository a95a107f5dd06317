"""The parts of SMCA, each against a direct computation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchformer_panoptic.modeling.transformer.multi_scale import flatten_maps
from batchformer_panoptic.modeling.transformer.smca import (
    LevelAttention,
    SpatialPrior,
    gaussian_bias,
)
from batchformer_panoptic.modeling.transformer.smca_multiscale import resize_valid, to_maps


@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_gaussian_bias_equals_a_loop_over_cells(num_scales):
    centers = 4 * torch.rand(2, 3, 2, dtype=torch.float64)
    weights = torch.rand(2, 3, num_scales, dtype=torch.float64)
    bias = gaussian_bias(centers, weights, (4, 5))
    for index in range(6):
        (cx, cy), weight = centers.view(6, 2)[index], weights.view(6, -1)[index]
        for y in range(4):
            for x in range(5):
                dx, dy = (cx - x) ** 2, (cy - y) ** 2
                wanted = weight[0] * dx + weight[min(1, num_scales - 1)] * dy
                if num_scales == 3:
                    wanted += weight[2] * dx * dy
                torch.testing.assert_close(bias.view(6, 20)[index, 5 * y + x], -wanted)


def test_far_cells_stay_representable_in_half_precision():
    bias = gaussian_bias(torch.tensor([0.0, 0.0]), torch.tensor([100.0]), (1, 200))
    assert bias.half().isfinite().all()
    assert bias.argmax() == 0


def test_prior_masks_padding_of_each_level():
    prior = SpatialPrior(
        embed_dim=8, num_heads=2, strides=[16, 32], dynamic_scale="per_axis", smooth=8.0
    )
    assert prior.smooths == [16.0, 8.0]  # 8 at stride 32, inversely proportional
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, [3, 5]] = True
    fine, coarse = prior.biases(
        torch.randn(1, 3, 8), torch.rand(1, 3, 2) * 32, [(2, 2), (1, 2)], mask
    )
    assert fine.shape == (1, 2, 3, 4)
    assert torch.equal(fine.isinf(), mask[0, :4].expand_as(fine))
    assert torch.equal(coarse.isinf(), mask[0, 4:].expand_as(coarse))


def test_each_image_has_its_own_level_weights():
    prior = SpatialPrior(
        embed_dim=8, num_heads=2, strides=[16, 32], dynamic_scale="fixed", smooth=8.0
    )
    where = torch.randn(2, 3, 8)
    weights = prior.level_weights(where)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(weights[1:], prior.level_weights(where[1:]))
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)


def test_attention_over_one_level_is_that_of_torch():
    attention = LevelAttention(embed_dim=16, num_heads=4, dropout=0.0)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(attention.state_dict())
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    bias = torch.randn(2, 4, 3, 5)
    wanted = theirs(query, key, value, attn_mask=bias.flatten(0, 1), need_weights=False)[0]
    torch.testing.assert_close(attention(query, key, value, [bias], None), wanted)


def test_attention_over_levels_is_the_weighted_sum_of_theirs():
    attention = LevelAttention(embed_dim=16, num_heads=4, dropout=0.0)
    nn.init.normal_(attention.out_proj.bias)
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    biases = [torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 2)]
    weights = torch.rand(2, 3, 2).softmax(-1)
    parts = [
        attention(query, key[:, where], value[:, where], [bias], None)
        for where, bias in zip((slice(0, 5), slice(5, 7)), biases, strict=True)
    ]
    wanted = sum(weights[..., level, None] * part for level, part in enumerate(parts))
    torch.testing.assert_close(attention(query, key, value, biases, weights), wanted)


def test_maps_and_tokens_are_inverse():
    maps = [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 3)]
    for ours, wanted in zip(to_maps(flatten_maps(maps), [(4, 5), (2, 3)]), maps, strict=True):
        assert torch.equal(ours, wanted)


def test_valid_areas_are_resized_separately():
    coarse = torch.randn(3, 2, 5, 6)
    coarse_sizes, fine_sizes = [(5, 6), (3, 4), (1, 1)], [(9, 11), (6, 7), (2, 1)]

    def masks(sizes, height, width):
        mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
        for image, (rows, columns) in enumerate(sizes):
            mask[image, :rows, :columns] = False
        return mask

    fine = resize_valid(coarse, masks(coarse_sizes, 5, 6), masks(fine_sizes, 9, 11))
    for image, ((h, w), (rows, columns)) in enumerate(zip(coarse_sizes, fine_sizes, strict=True)):
        wanted = F.interpolate(
            coarse[image : image + 1, :, :h, :w],
            size=(rows, columns),
            mode="bilinear",
            align_corners=True,
        )
        torch.testing.assert_close(fine[image : image + 1, :, :rows, :columns], wanted)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="dynamic_scale is 'type3'; known: fixed, isotropic"):
        SpatialPrior(embed_dim=8, num_heads=2, strides=[32], dynamic_scale="type3", smooth=8.0)
