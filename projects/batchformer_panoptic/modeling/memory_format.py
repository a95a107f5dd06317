"""In which order the numbers of a batch of images lie in memory."""

import torch
from torch import Tensor, nn

# Input channels that oneDNN's convolutions take at a time, at the most.
_BLOCK = 16


def convolution_format(network: nn.Module) -> torch.memory_format:
    """The order that convolutions of a network like best on a CPU.

    That is channels last, unless the network has a strided 1 x 1 convolution of few channels: for
    such, oneDNN 3.x writes beyond its buffer in the backward pass (uxlfoundation/oneDNN issue
    6035), and the process may crash.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _breaks_channels_last(module):
            return torch.contiguous_format
    return torch.channels_last


def _breaks_channels_last(conv: nn.Conv2d) -> bool:
    channels = conv.in_channels // conv.groups
    return set(conv.kernel_size) == {1} and max(conv.stride) > 1 and channels < _BLOCK


def in_format(images: Tensor, cpu_format: torch.memory_format) -> Tensor:
    """(B, C, H, W) in an order that was chosen for a CPU; elsewhere as they are."""
    # GPUs differ by dtype and generation: there it is left to TEST.FAST and to the user.
    return images.contiguous(memory_format=cpu_format) if images.device.type == "cpu" else images
