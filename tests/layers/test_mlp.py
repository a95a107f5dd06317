import torch

from batchformer_panoptic.layers import MLP


def test_relu_between_layers_and_none_after_the_last():
    mlp = MLP(input_dim=3, hidden_dim=5, output_dim=2, num_layers=3)
    torch.nn.init.constant_(mlp.layers[2].bias, -1.0)
    x = torch.randn(4, 7, 3)
    expected = x
    for index, layer in enumerate(mlp.layers):
        expected = expected @ layer.weight.T + layer.bias
        if index < 2:
            expected = expected.clamp(min=0)
    torch.testing.assert_close(mlp(x), expected)
    assert (mlp(x) < 0).any()
