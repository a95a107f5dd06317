"""One-to-one assignment of queries to objects (DETR, section 3.1).

Shapes: L decoder layers, B' streams * images, Q queries, T objects of an image, T_max the most.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...layers import cxcywh_to_xyxy, generalized_box_iou
from .scoring import Scoring
from .targets import ImageTarget


class Matching(NamedTuple):
    """Matched pairs of all decoder layers, ordered by layer, then image, then query.

    Attributes:
        layer: (M,) int64, decoder layer of a pair.
        image: (M,) int64 in [0, B').
        query: (M,) int64 in [0, Q).
        local_target: (M,) int64, index of the object within its image.
        global_target: (M,) int64, index of the object within all objects of the batch.
        layer_starts: L + 1 numbers; pairs of layer l are [layer_starts[l], layer_starts[l + 1]).
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    local_target: Tensor
    global_target: Tensor
    layer_starts: tuple[int, ...]

    def of_layer(self, layer: int) -> "Matching":
        """The pairs of one decoder layer; negative numbers count from the last."""
        layer %= len(self.layer_starts) - 1
        begin, end = self.layer_starts[layer : layer + 2]
        return Matching(
            self.layer[begin:end],
            self.image[begin:end],
            self.query[begin:end],
            self.local_target[begin:end],
            self.global_target[begin:end],
            layer_starts=(0, end - begin),
        )


class NonFiniteCostError(FloatingPointError):
    """The matching cost holds NaN or infinity: training has diverged.

    Attributes:
        images: entries of the batch whose cost is not finite.
        terms: names of the cost terms that are not finite.
    """

    def __init__(self, images: list[int], terms: list[str]) -> None:
        super().__init__(
            f"matching cost is not finite: terms {', '.join(terms)}, batch entries {images}"
        )
        self.images = images
        self.terms = terms


class HungarianMatcher:
    """Minimises the weighted sum of class, L1 box and generalised IoU costs, in float32.

    Args:
        scoring: gives the class cost.
        cost_class: weight of the class cost.
        cost_bbox: weight of the L1 distance of boxes as cxcywh.
        cost_giou: weight of the negative generalised IoU.
    """

    def __init__(
        self, scoring: Scoring, *, cost_class: float, cost_bbox: float, cost_giou: float
    ) -> None:
        self.scoring = scoring
        self.weights = {"class": cost_class, "bbox": cost_bbox, "giou": cost_giou}

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes: Tensor, targets: Sequence[ImageTarget]) -> Matching:
        """Match all layers at once; a training step waits for the device here and nowhere else.

        Args:
            logits: (L, B', Q, num_outputs).
            boxes: (L, B', Q, 4) cxcywh in 0 to 1.
            targets: B' image targets.

        Returns:
            min(Q, T) pairs for each layer and image.

        Raises:
            NonFiniteCostError: a cost is NaN or infinite.
        """
        counts = [len(target) for target in targets]
        costs = self._costs(logits.float(), boxes.float(), targets)
        total = sum(self.weights[name] * cost for name, cost in costs.items())
        on_host = torch.as_tensor(total).cpu().numpy()
        real = np.arange(on_host.shape[-1]) < np.asarray(counts)[:, None]  # (B', T_max)
        bad = ~np.isfinite(on_host).all(axis=(0, 2)) & real
        if bad.any():
            terms = [name for name, cost in costs.items() if not cost.isfinite().all()]
            raise NonFiniteCostError(np.flatnonzero(bad.any(axis=1)).tolist(), terms)
        return _to_matching(_assign(on_host, counts), counts, logits.device)

    def _costs(
        self, logits: Tensor, boxes: Tensor, targets: Sequence[ImageTarget]
    ) -> dict[str, Tensor]:
        """Cost terms (L, B', Q, T_max); columns past an image's own objects mean nothing."""
        labels = torch.nn.utils.rnn.pad_sequence([t.labels for t in targets], batch_first=True)
        target_boxes = torch.nn.utils.rnn.pad_sequence(
            [t.boxes_cxcywh for t in targets], batch_first=True
        )
        return {
            "class": self.scoring.cost(logits, labels.expand(logits.shape[0], -1, -1)),
            "bbox": torch.cdist(boxes, target_boxes.expand(boxes.shape[0], -1, -1, -1), p=1),
            "giou": -generalized_box_iou(
                cxcywh_to_xyxy(boxes)[..., :, None, :],
                cxcywh_to_xyxy(target_boxes)[..., None, :, :],
            ),
        }


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
    layer, image, query, local, total = torch.from_numpy(table).to(device, non_blocking=True)
    starts = tuple(np.cumsum([0, *per_layer]).tolist())
    return Matching(layer, image, query, local, total, layer_starts=starts)
