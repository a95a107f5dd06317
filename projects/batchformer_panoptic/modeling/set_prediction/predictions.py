"""Raw predictions of decoder layers, as matching and losses read them.

Shapes: L decoder layers, B' = streams * B batch entries, Q queries, K chosen queries, P points.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# Multiply-adds of a matrix product that take as long as one bilinear sample, on a CPU: 160 to 400.
_SAMPLE_COST = 200


class MaskSelector(Protocol):
    """Computes the masks of chosen queries on demand, since most queries never need one."""

    def __call__(
        self, layer_index: Tensor | int, image_index: Tensor, query_index: Tensor, /
    ) -> Tensor:
        """(K, h, w) mask logits of chosen queries.

        Args:
            layer_index: (K,) int64 decoder layers, or one for all; -1 is the last.
            image_index: (K,) int64 batch entries.
            query_index: (K,) int64 queries.
        """


@dataclass(frozen=True)
class QueryMasks:
    """Masks that are products of query embeddings and per-pixel features; a ``MaskSelector``.

    Attributes:
        embeddings: (L, B', Q, C).
        features: (B', C, h, w).
        padded_size: (height, width) in pixels that the features cover.
    """

    embeddings: Tensor
    features: Tensor
    padded_size: tuple[int, int]

    def __call__(
        self,
        layer_index: Tensor | int,
        image_index: Tensor,
        query_index: Tensor,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """(K, h, w) mask logits of chosen queries; see :class:`MaskSelector`.

        Args:
            layer_index: (K,) int64 decoder layers, or one for all; -1 is the last.
            image_index: (K,) int64 batch entries.
            query_index: (K,) int64 queries.
            counts: chosen queries of each entry, where they are known; otherwise they are read from
                ``image_index``, which waits for the device.
        """
        chosen = self.embeddings[layer_index, image_index, query_index]
        # One product per entry, so that its features are not copied for each of its queries.
        order = image_index.argsort(stable=True)
        if counts is None:
            counts = torch.bincount(image_index, minlength=len(self.features)).tolist()
        pixels = self.features.flatten(2)
        parts = [
            embeddings @ entry
            for embeddings, entry in zip(chosen[order].split(list(counts)), pixels, strict=True)
        ]
        masks = torch.cat(parts)[order.argsort()]
        return masks.unflatten(1, self.features.shape[-2:])

    def at_points(self, layer: int, points: Tensor) -> Tensor:
        """Mask logits of all queries of one layer at points that they share.

        Bilinear sampling is linear. Either the features are sampled, and no mask is computed, or
        the masks are; results are the same up to rounding, and the cheaper order is taken.

        Args:
            layer: decoder layer.
            points: (B', P, 2) as (x, y) in 0 to 1 over the padded image.

        Returns:
            (B', Q, P).
        """
        # As `sample_at` does; products of lower precision would lose more than samples do.
        features = self.features.to(torch.promote_types(self.features.dtype, points.dtype))
        embeddings = self.embeddings[layer].to(features.dtype)
        queries, channels = embeddings.shape[-2:]
        num_points, num_pixels = points.shape[1], features[0, 0].numel()
        of_features = channels * num_points * (_SAMPLE_COST + queries)
        of_masks = queries * (channels * num_pixels + _SAMPLE_COST * num_points)
        if of_features <= of_masks:
            return embeddings @ sample_at(features, points)
        masks = embeddings @ features.flatten(2)
        return sample_at(masks.unflatten(2, features.shape[-2:]), points)


def sample_at(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of (N, C, h, w) maps at (N, P, 2) points (x, y) in 0 to 1: (N, C, P).

    They are float32 for maps of lower precision, in which a point would be rounded to a cell.
    """
    maps = maps.to(torch.promote_types(maps.dtype, points.dtype))
    grid = 2 * points[:, :, None] - 1
    return F.grid_sample(maps, grid.to(maps.dtype), align_corners=False)[..., 0]


@dataclass(frozen=True)
class Predictions:
    """Predictions of L decoder layers for B' batch entries and Q queries.

    Attributes:
        logits: (L, B', Q, num_outputs) class logits.
        boxes: (L, B', Q, 4) float32 cxcywh in 0 to 1, or None for models without boxes.
        masks: the masks of chosen queries of any layer, or None for models without masks.
    """

    logits: Tensor
    boxes: Tensor | None = None
    masks: MaskSelector | None = None

    def last_masks(self, image_index: Tensor, query_index: Tensor) -> Tensor:
        """(K, h, w) mask logits of chosen queries of the last layer; indices are (K,) int64."""
        assert self.masks is not None
        return self.masks(-1, image_index, query_index)
