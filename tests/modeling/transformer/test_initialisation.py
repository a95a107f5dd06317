"""Fresh parameters as the public code initialises them, where ours once differed."""

import math

import pytest
import torch
from torch import nn

from helpers.tiny_model import tiny_model


def test_output_projections_of_conditional_attention_start_without_bias():
    transformer = tiny_model(MODEL__DETR__TRANSFORMER_NAME="conditional").transformer
    biases = [p for n, p in transformer.decoder.named_parameters() if "attn.out_proj.bias" in n]
    assert len(biases) == 2 * len(transformer.decoder.layers)
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("name", ["detr", "smca", "smca_multiscale", "deformable"])
def test_output_projections_of_all_attention_start_without_bias(name):
    strides = [1, 2, 2, 2 if name == "smca_multiscale" else 1]
    model = tiny_model(
        MODEL__DETR__TRANSFORMER_NAME=name, MODEL__SMALL_RESNET__STAGE_STRIDES=strides
    )
    attention = ("attn.out_proj.bias", "attn.output_proj.bias")
    biases = [p for n, p in model.transformer.named_parameters() if n.endswith(attention)]
    assert biases
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("channels", [32, 64])
def test_depthwise_convolutions_of_multi_scale_smca_start_as_published(channels):
    """Xavier over weights (C, 1, 5, 5), which counts 25 inputs and the outputs of all channels."""
    transformer = tiny_model(
        MODEL__DETR__TRANSFORMER_NAME="smca_multiscale",
        MODEL__SMALL_RESNET__STAGE_STRIDES=[1, 2, 2, 2],
        MODEL__DETR__HIDDEN_DIM=channels,
        MODEL__MASK_ON=False,
    ).transformer
    bound = math.sqrt(6 / (25 + 25 * channels))
    depthwise = [m for m in transformer.encoder.modules() if isinstance(m, nn.Conv2d)]
    depthwise = [conv for conv in depthwise if conv.groups > 1]
    num_levels = len(transformer.in_features) + 1
    assert len(depthwise) == len(transformer.encoder.layers) * (3 * num_levels - 2)
    for conv in depthwise:
        assert conv.weight.shape == (channels, 1, 5, 5)
        assert conv.weight.abs().max() <= bound
        assert conv.weight.abs().max() > 0.98 * bound
    values = torch.cat([conv.weight.flatten() for conv in depthwise])
    torch.testing.assert_close(values.std().item(), bound / math.sqrt(3), rtol=0.02, atol=0)
