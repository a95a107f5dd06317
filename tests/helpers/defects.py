"""Deliberate defects of the block, which the golden comparisons must detect."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from batchformer_panoptic.batchformer import StreamState


def attend_over_tokens(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention over the tokens of an image instead of the images of a batch."""
    return lambda self, x, mask=None: forward(self, x.transpose(0, 1)).transpose(0, 1)


def swap_streams(
    join: Callable[[StreamState, Sequence[Any]], Any],
) -> Callable[[StreamState, Sequence[Any]], Any]:
    """Streams in the opposite order."""
    return lambda self, parts: join(self, list(parts)[::-1])
