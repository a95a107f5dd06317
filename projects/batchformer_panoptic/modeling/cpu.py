"""How the process takes memory from the system.

In which order the numbers of a batch of images lie in memory.
"""

import ctypes
import os

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


# Parameters of glibc's mallopt (malloc.h), and its largest threshold that moves by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 32 * 2**20


def tune_allocation() -> None:
    """Spare large CPU tensors what the system asks for memory that is used for the first time.

    PyTorch is asked to allocate tensors above 2 MiB in huge pages where the system grants them: it
    looks once, when it makes its first CPU tensor, and so do processes that are started later.
    glibc is asked to keep what is freed, as after a backward pass, for the next step, instead of
    giving it back and asking for it again; memory that was needed once stays with the process. Only
    blocks above 32 MiB are still fresh each time, as by default.

    Whoever has set ``THP_MEM_ALLOC_ENABLE``, ``GLIBC_TUNABLES`` or one of the ``MALLOC_`` variables
    keeps that choice. Without glibc nothing happens.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
