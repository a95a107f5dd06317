"""Raw predictions of decoder layers, as matching and losses read them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MaskSelector = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(K,) int64 indices of layer, batch entry and query -> (K, h, w) mask logits."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of L decoder layers for B' batch entries and Q queries.

    Attributes:
        logits: (L, B', Q, num_outputs) class logits.
        boxes: (L, B', Q, 4) float32 cxcywh in 0 to 1, or None for models without boxes.
        masks: computes the mask logits of chosen queries of any layer, or None for models without
            masks. Masks are computed on demand because most queries never need one.
    """

    logits: Tensor
    boxes: Tensor | None = None
    masks: MaskSelector | None = None

    def last_masks(self, image_index: Tensor, query_index: Tensor) -> Tensor:
        """(K, h, w) mask logits of chosen queries of the last layer; indices are (K,) int64."""
        assert self.masks is not None
        return self.masks(torch.full_like(query_index, -1), image_index, query_index)
