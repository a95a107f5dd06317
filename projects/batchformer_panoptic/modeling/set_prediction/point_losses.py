"""Costs and losses of masks at sampled points (Mask2Former, section 3.3; PointRend, section 3.1).

Shapes: L decoder layers, B' = streams * B batch entries, Q queries, T objects of one entry,
P points, M matched pairs of all layers.
"""

import torch
from detectron2.projects.point_rend.point_features import get_uncertain_point_coords_with_randomness
from torch import Tensor
from torch.nn import functional as F

from .mask_losses import mask_dice_loss
from .matcher import Matching
from .predictions import Predictions, QueryMasks, sample_at
from .targets import TargetBatch


class PointMaskCost:
    """Sigmoid cross entropy and Dice cost at random points, which all queries of an entry share.

    Args:
        mask_weight: weight of the cross entropy.
        dice_weight: weight of the Dice cost.
        num_points: points P, drawn anew for each layer and entry.
    """

    name = "mask"
    weight = 1.0  # the two costs are weighted here, because they share their points
    needs = frozenset({"mask embeddings"})

    def __init__(self, *, mask_weight: float, dice_weight: float, num_points: int) -> None:
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.num_points = num_points

    def __call__(self, predictions: Predictions, targets: TargetBatch) -> Tensor:
        """See :class:`CostTerm`."""
        masks = _query_masks(predictions)
        num_layers, num_entries, num_queries = predictions.logits.shape[:3]
        shape = (num_layers, num_entries, num_queries, max(targets.counts, default=0))
        cost = predictions.logits.new_zeros(shape, dtype=torch.float32)
        points = random_points((num_layers, num_entries, self.num_points), cost.device)
        image = torch.arange(num_entries, device=cost.device)
        for layer in range(num_layers):
            logits = masks.at_points(layer, points[layer]).float()  # (B', Q, P)
            for entry, count in enumerate(targets.counts):
                if count == 0:
                    continue
                objects = torch.arange(count, device=cost.device)
                wanted = targets.masks.at_points(
                    image[entry].expand(count),
                    objects,
                    points[layer, entry].expand(count, -1, -1),
                    masks.padded_size,
                )
                cost[layer, entry, :, :count] = self._cost(logits[entry], wanted)
        return cost

    def _cost(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """(Q, P) logits and (T, P) targets in 0 to 1 -> (Q, T)."""
        # Sums over thousands of points need more digits than half precision has.
        with torch.autocast(logits.device.type, enabled=False):
            positive, negative = F.softplus(-logits), F.softplus(logits)
            cross_entropy = positive @ wanted.T + negative @ (1 - wanted).T
            probabilities = logits.sigmoid()
            overlap = 2 * (probabilities @ wanted.T)
            total = probabilities.sum(-1)[:, None] + wanted.sum(-1)[None]
        dice = 1 - (overlap + 1) / (total + 1)
        return self.mask_weight * cross_entropy / logits.shape[-1] + self.dice_weight * dice


class PointMaskLoss:
    """Sigmoid cross entropy and Dice loss at uncertain points, ``loss_mask`` and ``loss_dice``.

    Most points of a mask are those of many random ones whose logits are closest to 0; the rest are
    random. All decoder layers are supervised.

    Args:
        mask_weight: factor of the cross entropy.
        dice_weight: factor of the Dice loss.
        num_points: points P of a mask.
        oversample_ratio: random points to choose uncertain ones from, as a multiple of P.
        importance_ratio: share of the points that are chosen by uncertainty.
    """

    names: tuple[str, ...] = ("loss_mask", "loss_dice")
    needs = frozenset({"mask embeddings"})

    def __init__(
        self,
        *,
        mask_weight: float,
        dice_weight: float,
        num_points: int,
        oversample_ratio: float = 3.0,
        importance_ratio: float = 0.75,
    ) -> None:
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_ratio = importance_ratio

    def __call__(
        self,
        predictions: Predictions,
        targets: TargetBatch,
        matching: Matching,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """See :class:`LossTerm`."""
        masks = _query_masks(predictions)
        num_layers, _, num_queries = predictions.logits.shape[:3]
        counts = [num_layers * min(num_queries, count) for count in targets.counts]
        maps = masks(matching.layer, matching.image, matching.query, counts).float()[:, None]
        points = self._points(maps.detach())
        logits = sample_at(maps, points)[:, 0]
        wanted = targets.masks.at_points(
            matching.image, matching.local_target, points, masks.padded_size
        )
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(-1)
        dice = mask_dice_loss(logits, wanted)
        shape = predictions.logits.shape[:2]
        return {
            "loss_mask": self.mask_weight * matching.sum_by_entry(each, shape) / num_objects,
            "loss_dice": self.dice_weight * matching.sum_by_entry(dice, shape) / num_objects,
        }

    @torch.no_grad()
    def _points(self, maps: Tensor) -> Tensor:
        """(M, P, 2) points of (M, 1, h, w) mask logits."""
        if len(maps) == 0:  # topk of the public function needs at least one mask
            return maps.new_zeros(0, self.num_points, 2)
        points: Tensor = get_uncertain_point_coords_with_randomness(
            maps,
            lambda logits: -logits.abs(),
            self.num_points,
            self.oversample_ratio,
            self.importance_ratio,
        )
        return points


def random_points(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(*shape, 2) uniform points (x, y) in 0 to 1."""
    return torch.rand(*shape, 2, device=device)


def _query_masks(predictions: Predictions) -> QueryMasks:
    if not isinstance(predictions.masks, QueryMasks):
        raise ValueError(
            "losses at points need masks that are products of queries and pixels (QueryMaskHead)"
        )
    return predictions.masks
