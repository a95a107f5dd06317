"""From class scores to the detections of an image, as the published evaluations choose them.

Shapes: B images, Q queries, K classes, M detections at the most.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Detections(NamedTuple):
    """Detections of a batch, (B, M), or of one image, (M,), best first.

    Attributes:
        query: int64, the query whose box and mask the detection has; may occur several times.
        labels: int64 contiguous class ids.
        scores: 0 to 1.
        valid: bool, False where there are fewer than M detections.
    """

    query: Tensor
    labels: Tensor
    scores: Tensor
    valid: Tensor

    def used_queries(self, num_queries: int) -> Tensor:
        """(B, Q) bool: queries that are a detection of anything."""
        used = self.valid.new_zeros(*self.query.shape[:-1], num_queries, dtype=torch.int64)
        return used.scatter_add(-1, self.query, self.valid.long()) > 0

    def of_image(self, index: int) -> "Detections":
        """The valid detections of one image of a batch."""
        valid = self.valid[index]
        return Detections(*(field[index][valid] for field in self))


def best_detections(
    scores: Tensor,
    class_ids: Sequence[int],
    *,
    max_detections: int,
    score_threshold: float = 0.0,
) -> Detections:
    """Rank all pairs of query and class and keep the best of each image.

    With the scores of the focal detectors that is their published top 100 over queries times
    classes: an unsure query is a detection of two classes. With those of DETR, where all but a
    query's best class score 0, it is one detection a query.

    Args:
        scores: (B, Q, K), ``Decoded.class_scores``.
        class_ids: classes that can be detected, the things of the data sets.
        max_detections: of an image; 100 as published.
        score_threshold: a detection scores more than this, and more than 0.
    """
    num_classes = scores.shape[-1]
    wanted = set(class_ids)
    others = torch.tensor([label not in wanted for label in range(num_classes)])
    others = others.to(scores.device, non_blocking=True)
    pairs = scores.masked_fill(others, 0.0).flatten(-2)
    best, index = pairs.topk(min(max_detections, pairs.shape[-1]), dim=-1)
    return Detections(
        query=index // num_classes,
        labels=index % num_classes,
        scores=best,
        valid=best > max(score_threshold, 0.0),
    )
