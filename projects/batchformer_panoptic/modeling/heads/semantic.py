"""An auxiliary training head: the class of every pixel from backbone maps."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class SemanticAuxHead(nn.Module):
    """One 1x1 convolution on each of some backbone maps.

    Not part of DETR, and used in training only. A set loss reaches a randomly initialised backbone
    only through a few matched queries. Classifying every pixel as well gives it a dense signal
    from the first step.

    Args:
        in_channels: channels of the backbone maps to read, by name.
        num_classes: things and stuff together.
    """

    def __init__(self, *, in_channels: Mapping[str, int], num_classes: int) -> None:
        super().__init__()
        self.in_features = tuple(in_channels)
        self.classifiers = nn.ModuleDict(
            {name: nn.Conv2d(n, num_classes, kernel_size=1) for name, n in in_channels.items()}
        )

    def forward(self, features: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Class logits (B, num_classes, H_i, W_i) of each map."""
        return [self.classifiers[name](features[name]) for name in self.in_features]
