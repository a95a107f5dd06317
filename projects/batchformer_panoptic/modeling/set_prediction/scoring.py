"""The meaning of class logits: their number, initial bias, matching cost, loss and decoding.

Shapes: L decoder layers, B' streams * images, Q queries, K classes, T objects.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss


class Decoded(NamedTuple):
    """Classes and scores decoded from class logits.

    Attributes:
        scores: (...) in 0 to 1, probability of the best class.
        labels: (...) int64, the best class.
        is_object: (...) bool, whether the best class is more likely than "no object".
        class_scores: (..., num_classes) in 0 to 1, score of the query as a detection of each class
            (see ``best_detections``); 0 for the other classes.
        probabilities: (..., num_classes) in 0 to 1, probability of each class.
    """

    scores: Tensor
    labels: Tensor
    is_object: Tensor
    class_scores: Tensor
    probabilities: Tensor


class Scoring(ABC):
    """The meaning of class logits.

    Attributes:
        num_classes: classes K without "no object".
        num_outputs: number of class logits per query.
        initial_bias: initial bias of the class layer, or None for the default of the layer.
    """

    num_classes: int
    num_outputs: int
    initial_bias: float | None

    @abstractmethod
    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Matching cost (..., Q, T) of logits (..., Q, num_outputs) for labels (..., T)."""

    @abstractmethod
    def loss(
        self,
        logits: Tensor,
        classes: Tensor,
        num_objects: Tensor,
        class_counts: Tensor | None = None,
    ) -> Tensor:
        """Classification loss as contributions (L, B') of the images; a layer's sum is its loss.

        Args:
            logits: (L, B', Q, num_outputs).
            classes: (L, B', Q) int64, the target class of each query; ``num_classes`` for none.
            num_objects: 0-d, the normaliser of the box losses.
            class_counts: (2,) float, queries of one layer with a class and without one, in place
                of those in ``classes`` for the normaliser of a softmax.
        """

    @abstractmethod
    def decode(self, logits: Tensor) -> Decoded:
        """Best class of logits (..., Q, num_outputs)."""


class SoftmaxScoring(Scoring):
    """Softmax over the classes and "no object", the last column (DETR, equations 1 and 2)."""

    def __init__(self, num_classes: int, *, no_object_weight: float = 0.1) -> None:
        self.num_classes = num_classes
        self.num_outputs = num_classes + 1
        self.initial_bias = None
        self.no_object_weight = no_object_weight

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Minus the probability of the object's class."""
        return -_gather_classes(logits.softmax(-1), labels)

    def loss(
        self,
        logits: Tensor,
        classes: Tensor,
        num_objects: Tensor,
        class_counts: Tensor | None = None,
    ) -> Tensor:
        """Weighted cross entropy, averaged with its weights over all queries of the batch."""
        weight = F.pad(logits.new_ones(self.num_classes), (0, 1), value=self.no_object_weight)
        each = F.cross_entropy(logits.flatten(0, -2), classes.flatten(), weight, reduction="none")
        if class_counts is None:
            total_weight = weight[classes].sum(dim=(1, 2))[:, None]  # (L, 1)
        else:
            total_weight = class_counts @ weight[-2:]
        return each.view(classes.shape).sum(-1) / total_weight

    def decode(self, logits: Tensor) -> Decoded:
        """Scores of the classes; "no object" only decides ``is_object``.

        A query is a detection of its best class only (``PostProcess`` of facebookresearch/detr).
        """
        probabilities = logits.softmax(-1)
        of_classes, of_no_object = probabilities[..., :-1], probabilities[..., -1]
        scores, labels = of_classes.max(-1)
        class_scores = torch.zeros_like(of_classes)
        class_scores.scatter_(-1, labels[..., None], scores[..., None])
        return Decoded(scores, labels, scores > of_no_object, class_scores, of_classes)


class FocalScoring(Scoring):
    """One sigmoid per class, trained with the focal loss (Deformable-DETR and related models)."""

    _GAMMA = 2.0
    _PRIOR = 0.01
    _EPS = 1e-8

    def __init__(self, num_classes: int, *, alpha: float = 0.25) -> None:
        self.num_classes = num_classes
        self.num_outputs = num_classes
        self.initial_bias = -math.log((1 - self._PRIOR) / self._PRIOR)
        self.alpha = alpha

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Focal loss of a positive minus that of a negative, for the object's class."""
        p = _gather_classes(logits.sigmoid(), labels)
        positive = self.alpha * (1 - p) ** self._GAMMA * -(p + self._EPS).log()
        negative = (1 - self.alpha) * p**self._GAMMA * -(1 - p + self._EPS).log()
        return positive - negative

    def loss(
        self,
        logits: Tensor,
        classes: Tensor,
        num_objects: Tensor,
        class_counts: Tensor | None = None,
    ) -> Tensor:
        """Focal loss summed over queries and classes, divided by the number of objects."""
        one_hot = F.one_hot(classes, self.num_classes + 1)[..., :-1].to(logits.dtype)
        each = sigmoid_focal_loss(logits, one_hot, alpha=self.alpha, gamma=self._GAMMA)
        return each.sum(dim=(2, 3)) / num_objects

    def decode(self, logits: Tensor) -> Decoded:
        """Best class by its sigmoid; every query counts as an object.

        Classes are independent, so a query may be a detection of several of them
        (``PostProcess`` of fundamentalvision/Deformable-DETR, Conditional-DETR and SMCA-DETR).
        """
        class_scores = logits.sigmoid()
        scores, labels = class_scores.max(-1)
        is_object = torch.ones_like(labels, dtype=torch.bool)
        return Decoded(scores, labels, is_object, class_scores, class_scores)


def build_scoring(
    name: str, num_classes: int, *, no_object_weight: float, focal_alpha: float
) -> Scoring:
    """Build the scoring called ``name``: "softmax" or "focal"."""
    if name == "softmax":
        return SoftmaxScoring(num_classes, no_object_weight=no_object_weight)
    if name == "focal":
        return FocalScoring(num_classes, alpha=focal_alpha)
    raise ValueError(f"unknown scoring {name!r}; known: softmax, focal")


def _gather_classes(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(..., Q, K) and (..., T) -> (..., Q, T): each query's value for each object's class."""
    index = labels[..., None, :].expand(*probabilities.shape[:-1], labels.shape[-1])
    return probabilities.gather(-1, index)
