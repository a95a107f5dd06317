"""One-to-one assignment of queries to objects (DETR, section 3.1), from a list of cost terms.

Shapes: L decoder layers, B' = streams * B batch entries, Q queries, T_max: the largest number of
objects in an entry.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...errors import NonFiniteError
from ...layers import generalized_box_iou
from .predictions import Predictions
from .scoring import Scoring
from .targets import TargetBatch


class Matching(NamedTuple):
    """Matched pairs of all decoder layers, ordered by layer, then batch entry, then query.

    Attributes:
        row: (M,) int64, decoder layer and batch entry in one, l * B' + b; for pairs of one layer b.
        layer: (M,) int64, decoder layer of a pair.
        image: (M,) int64 in [0, B'), batch entry.
        query: (M,) int64 in [0, Q).
        local_target: (M,) int64, index of the object within its entry.
        global_target: (M,) int64, index of the object within all objects of the batch.
        layer_starts: L + 1 numbers; pairs of layer l are [layer_starts[l], layer_starts[l + 1]).
        supervise_unmatched: whether queries without an object are trained to predict none;
            otherwise they are padding, which losses leave out.
        class_counts: (2,) float, queries of one layer with an object and without one, averaged over
            processes, that a softmax class loss is normalised by; None: by those of the process.
    """

    row: Tensor
    layer: Tensor
    image: Tensor
    query: Tensor
    local_target: Tensor
    global_target: Tensor
    layer_starts: tuple[int, ...]
    supervise_unmatched: bool = True
    class_counts: Tensor | None = None

    def of_layer(self, layer: int) -> "Matching":
        """The pairs of one decoder layer; negative numbers count from the last.

        ``layer`` keeps its numbers, so that masks of all layers can be indexed with them.
        """
        layer %= len(self.layer_starts) - 1
        begin, end = self.layer_starts[layer : layer + 2]
        return self._replace(
            row=self.image[begin:end],
            layer=self.layer[begin:end],
            image=self.image[begin:end],
            query=self.query[begin:end],
            local_target=self.local_target[begin:end],
            global_target=self.global_target[begin:end],
            layer_starts=(0, end - begin),
        )

    def sum_by_entry(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """(..., M) values of the pairs -> (..., L, B') sums; ``shape`` is (L, B')."""
        flat = values.new_zeros(*values.shape[:-1], math.prod(shape))
        return flat.index_add(-1, self.row, values).unflatten(-1, tuple(shape))


class CostTerm(Protocol):
    """One term of the matching cost.

    Attributes:
        name: of the term, for messages.
        weight: factor of the term in the total cost.
        needs: the predictions besides classes that the term reads: ``"boxes"``, ``"masks"``, or
            ``"mask embeddings"``, which are masks as products with per-pixel features.
    """

    name: str
    weight: float
    needs: frozenset[str]

    def __call__(self, predictions: Predictions, targets: TargetBatch) -> Tensor:
        """Cost (L, B', Q, T_max) float32; values past an entry's own objects are ignored."""


class ClassCost:
    """Cost of the object's class, as the scoring defines it."""

    name = "class"
    needs: frozenset[str] = frozenset()

    def __init__(self, scoring: Scoring, *, weight: float) -> None:
        self.scoring = scoring
        self.weight = weight

    def __call__(self, predictions: Predictions, targets: TargetBatch) -> Tensor:
        """See :class:`CostTerm`."""
        labels = targets.padded_labels.expand(predictions.logits.shape[0], -1, -1)
        return self.scoring.cost(predictions.logits.float(), labels)


class BoxL1Cost:
    """L1 distance of boxes as cxcywh."""

    name = "bbox"
    needs = frozenset({"boxes"})

    def __init__(self, *, weight: float) -> None:
        self.weight = weight

    def __call__(self, predictions: Predictions, targets: TargetBatch) -> Tensor:
        """See :class:`CostTerm`."""
        boxes = _boxes_of(predictions)
        return torch.cdist(boxes, targets.padded_boxes_cxcywh.expand(len(boxes), -1, -1, -1), p=1)


class BoxGIoUCost:
    """Negative generalised IoU of boxes."""

    name = "giou"
    needs = frozenset({"boxes"})

    def __init__(self, *, weight: float) -> None:
        self.weight = weight

    def __call__(self, predictions: Predictions, targets: TargetBatch) -> Tensor:
        """See :class:`CostTerm`."""
        return -generalized_box_iou(
            _boxes_of(predictions)[..., :, None, :],
            targets.padded_boxes_cxcywh[..., None, :, :],
        )


class HungarianMatcher:
    """Finds the assignment with the least weighted sum of costs, in float32.

    Args:
        costs: the terms of the cost, at least one.
    """

    def __init__(self, costs: Sequence[CostTerm]) -> None:
        self.costs = tuple(costs)

    def of_proposals(self, proposals: Predictions, targets: TargetBatch) -> Matching:
        """Match the encoder's proposals, which have classes and boxes, with the costs of these."""
        costs = [term for term in self.costs if term.needs <= {"boxes"}]
        return HungarianMatcher(costs)(proposals, targets)

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: TargetBatch) -> Matching:
        """Match all layers at once.

        The assignment is made on the host, so the step waits for the device here.

        Args:
            predictions: of L layers.
            targets: of the same B' entries.

        Returns:
            min(Q, T) pairs for each layer and entry with T objects.

        Raises:
            NonFiniteError: a cost is NaN or infinite.
        """
        terms = {term.name: term(predictions, targets) for term in self.costs}
        first, *others = self.costs
        total = first.weight * terms[first.name]
        for term in others:
            total = torch.add(total, terms[term.name], alpha=term.weight)
        cost = total.cpu().numpy()
        counts = targets.counts
        real = np.arange(cost.shape[-1]) < np.asarray(counts)[:, None]  # (B', T_max)
        bad = ~np.isfinite(cost).all(axis=(0, 2)) & real
        if bad.any():
            entries = np.flatnonzero(bad.any(axis=1)).tolist()
            names = [
                name
                for name, value in terms.items()
                if any(not value[:, i, :, : counts[i]].isfinite().all() for i in entries)
            ]
            raise NonFiniteError(
                f"the matching cost is not finite (terms: {', '.join(names) or 'their sum'})",
                entries,
            )
        return _to_matching(_assign(cost, counts), counts, predictions.logits.device)


def fixed_matching(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    counts: list[int],
    num_layers: int,
    device: torch.device,
) -> Matching:
    """A given assignment, the same in all layers, in which queries without a pair are padding.

    Args:
        pairs: for each entry, queries and numbers of their objects.
        counts: objects of each entry.
        num_layers: layers L.
        device: of the result.
    """
    one = _to_matching([list(pairs)], counts, device)
    number = len(one.query)
    layer = torch.arange(num_layers, device=device).repeat_interleave(number)
    image = one.image.repeat(num_layers)
    return Matching(
        row=layer * len(counts) + image,
        layer=layer,
        image=image,
        query=one.query.repeat(num_layers),
        local_target=one.local_target.repeat(num_layers),
        global_target=one.global_target.repeat(num_layers),
        layer_starts=tuple(layer * number for layer in range(num_layers + 1)),
        supervise_unmatched=False,
    )


def _boxes_of(predictions: Predictions) -> Tensor:
    assert predictions.boxes is not None, "the model predicts no boxes"
    return predictions.boxes.float()


def _assign(cost: np.ndarray, counts: list[int]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Queries and local targets for each layer and image of a (L, B', Q, T_max) cost."""
    return [
        [
            linear_sum_assignment(image_cost[:, :count])
            for image_cost, count in zip(layer_cost, counts, strict=True)
        ]
        for layer_cost in cost
    ]


def _to_matching(
    pairs: list[list[tuple[np.ndarray, np.ndarray]]], counts: list[int], device: torch.device
) -> Matching:
    first_target = np.cumsum([0, *counts])
    rows = [
        np.stack(
            [
                np.full(len(queries), layer * len(counts) + image),
                np.full(len(queries), layer),
                np.full(len(queries), image),
                queries,
                local,
                local + first_target[image],
            ]
        )
        for layer, images in enumerate(pairs)
        for image, (queries, local) in enumerate(images)
    ]
    table = np.concatenate(rows, axis=1)
    per_layer = [sum(len(queries) for queries, _ in images) for images in pairs]
    starts = tuple(np.cumsum([0, *per_layer]).tolist())
    row, layer, image, query, local, total = torch.from_numpy(table).to(device, non_blocking=True)
    return Matching(row, layer, image, query, local, total, layer_starts=starts)
