"""The multi-layer perceptron of box heads and decoders, and linear layers of one input."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear layers with ReLU between them (DETR, section 3.2: "prediction feed-forward network").

    The layers sit under ``layers.0``, ``layers.1``, ... as in the published checkpoints.
    """

    def __init__(
        self, *, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int
    ) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_dim) -> (..., output_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def joint_linear(x: Tensor, layers: Iterable[nn.Linear]) -> tuple[Tensor, ...]:
    """The outputs of several linear layers of one input, by one matrix product.

    Args:
        x: (..., input_dim).
        layers: at least one, with biases.
    """
    layers = list(layers)
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)
