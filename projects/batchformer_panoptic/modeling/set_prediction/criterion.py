"""The losses of matched queries (DETR, section 3.1), from a list of loss terms.

Every term returns its loss as contributions of the batch entries, so that the caller can tell the
streams apart. The normaliser of boxes and masks is the number of objects of all B' entries,
averaged over processes and at least 1. As each image is in the batch once per stream, the sum over
the entries is the mean over the streams. The softmax class loss is normalised within the process,
as published, or by :class:`ClassCounts`.

Shapes: L decoder layers, B' = streams * B batch entries, Q queries, M matched pairs of all layers.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ...batchformer.exchange import num_processes
from ...layers import generalized_box_iou
from .mask_losses import focal_and_dice_losses, upsampled_mask_losses
from .matcher import Matching
from .predictions import Predictions
from .scoring import Scoring
from .targets import ImageTarget, TargetBatch


class LossTerm(Protocol):
    """One supervised quantity.

    Attributes:
        names: of the losses that the term returns.
        needs: the predictions besides classes that the term reads: ``"boxes"``, ``"masks"``, or
            ``"mask embeddings"``, which are masks as products with per-pixel features.
    """

    names: tuple[str, ...]
    needs: frozenset[str]

    def __call__(
        self,
        predictions: Predictions,
        targets: TargetBatch,
        matching: Matching,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """Compute weighted losses.

        Args:
            predictions: of L layers and B' entries.
            targets: of the same entries.
            matching: the assignment in every layer.
            num_objects: 0-d, from :func:`count_objects`.

        Returns:
            Contributions (L', B') by name. L' is L, or 1 for a term of the last layer only.
        """


class ClassLoss:
    """Classification of all queries, ``loss_ce``, as the scoring defines it."""

    names: tuple[str, ...] = ("loss_ce",)
    needs: frozenset[str] = frozenset()

    def __init__(self, scoring: Scoring, *, weight: float) -> None:
        self.scoring = scoring
        self.weight = weight

    def __call__(
        self,
        predictions: Predictions,
        targets: TargetBatch,
        matching: Matching,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """See :class:`LossTerm`."""
        logits = predictions.logits
        # (L, B', Q): the class each query should predict, ``num_classes`` where unmatched.
        classes = torch.full(
            logits.shape[:3], self.scoring.num_classes, dtype=torch.int64, device=logits.device
        )
        labels = targets.labels[matching.global_target]
        if not matching.supervise_unmatched:
            losses = self._of_pairs(logits.float(), labels, matching, num_objects)
            return {"loss_ce": self.weight * losses}
        classes[matching.layer, matching.image, matching.query] = labels
        losses = self.scoring.loss(logits.float(), classes, num_objects, matching.class_counts)
        return {"loss_ce": self.weight * losses}

    def _of_pairs(
        self, logits: Tensor, labels: Tensor, matching: Matching, num_objects: Tensor
    ) -> Tensor:
        """(L, B') losses of the M pairs only, of which every layer has as many."""
        num_layers, num_entries = logits.shape[:2]
        logits = logits[matching.layer, matching.image, matching.query]
        # Each pair takes the place of an entry with one query.
        each = self.scoring.loss(
            logits.unflatten(0, (num_layers, -1, 1)),
            labels.view(num_layers, -1, 1),
            num_objects,
            matching.class_counts,
        )
        return matching.sum_by_entry(each.flatten(), (num_layers, num_entries))


class BoxL1Loss:
    """L1 distance of matched boxes as cxcywh, ``loss_bbox``."""

    names: tuple[str, ...] = ("loss_bbox",)
    needs = frozenset({"boxes"})

    def __init__(self, *, weight: float) -> None:
        self.weight = weight

    def __call__(
        self,
        predictions: Predictions,
        targets: TargetBatch,
        matching: Matching,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """See :class:`LossTerm`."""
        boxes, target_boxes = _matched_boxes(predictions, targets, matching)
        distance = F.l1_loss(boxes, target_boxes, reduction="none").sum(-1)
        sums = matching.sum_by_entry(distance, predictions.logits.shape[:2])
        return {"loss_bbox": self.weight * (sums / num_objects)}


class BoxGIoULoss:
    """One minus the generalised IoU of matched boxes, ``loss_giou``."""

    names: tuple[str, ...] = ("loss_giou",)
    needs = frozenset({"boxes"})

    def __init__(self, *, weight: float) -> None:
        self.weight = weight

    def __call__(
        self,
        predictions: Predictions,
        targets: TargetBatch,
        matching: Matching,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """See :class:`LossTerm`."""
        boxes, target_boxes = _matched_boxes(predictions, targets, matching)
        giou = generalized_box_iou(boxes, target_boxes)
        sums = matching.sum_by_entry(1 - giou, predictions.logits.shape[:2])
        return {"loss_giou": self.weight * (sums / num_objects)}


class MaskLoss:
    """Focal and Dice loss of matched masks, ``loss_mask`` and ``loss_dice``.

    Padding counts as outside of every mask, as published.

    Args:
        focal_weight: factor of the focal loss.
        dice_weight: factor of the Dice loss.
        resolution: where the losses are taken. "target" (published): predictions are resized to
            the padded targets. "prediction": targets are averaged over the cells of the predicted
            map, which costs a sixteenth of that at stride 4.
        all_layers: supervise the masks of every decoder layer; published: of the last only.
    """

    names: tuple[str, ...] = ("loss_mask", "loss_dice")
    needs = frozenset({"masks"})

    def __init__(
        self,
        *,
        focal_weight: float,
        dice_weight: float,
        resolution: str = "target",
        all_layers: bool = False,
    ) -> None:
        if resolution not in ("target", "prediction"):
            raise ValueError(f"resolution is {resolution!r}; known: target, prediction")
        self.focal_weight = focal_weight
        self.dice_weight = dice_weight
        self.resolution = resolution
        self.all_layers = all_layers

    def __call__(
        self,
        predictions: Predictions,
        targets: TargetBatch,
        matching: Matching,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """See :class:`LossTerm`."""
        assert predictions.masks is not None, "the model predicts no masks"
        num_layers = predictions.logits.shape[0] if self.all_layers else 1
        pairs = matching if self.all_layers else matching.of_layer(-1)
        logits = predictions.masks(pairs.layer, pairs.image, pairs.query).float()
        each = self._losses(logits, targets, pairs)
        focal, dice = pairs.sum_by_entry(each, (num_layers, len(targets))) / num_objects
        return {"loss_mask": self.focal_weight * focal, "loss_dice": self.dice_weight * dice}

    def _losses(self, logits: Tensor, targets: TargetBatch, pairs: Matching) -> Tensor:
        """Focal and Dice losses (2, M) of (M, h, w) mask logits."""
        image, local = pairs.image, pairs.local_target
        if self.resolution == "target":
            return upsampled_mask_losses(
                logits,
                targets.masks.size,
                lambda part: targets.masks.gather(image[part], local[part]),
            )
        size = (logits.shape[-2], logits.shape[-1])
        shares = targets.masks.gather_shares(image, local, size).flatten(1)
        flat = logits.flatten(1)
        return focal_and_dice_losses(flat, shares)


class SetCriterion:
    """Adds up loss terms by name, for the last and the earlier decoder layers.

    Args:
        terms: the losses; no two of them may share a name.
    """

    def __init__(self, terms: Sequence[LossTerm]) -> None:
        names = [name for term in terms for name in term.names]
        repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if repeated:
            raise ValueError(f"two loss terms are called {repeated[0]!r}")
        self.terms = tuple(terms)

    def __call__(
        self,
        predictions: Predictions,
        targets: TargetBatch,
        matching: Matching,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """Losses (B',) by name: ``loss_x`` of the last layer, ``loss_x_0`` ... of those before."""
        return self._losses(self.terms, predictions, targets, matching, num_objects)

    def of_proposals(
        self,
        proposals: Predictions,
        targets: TargetBatch,
        matching: Matching,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """Losses (B',) of the encoder's proposals, ``loss_x_enc``; they have no masks."""
        terms = [term for term in self.terms if term.needs <= {"boxes"}]
        losses = self._losses(terms, proposals, targets, matching, num_objects)
        return {f"{name}_enc": value for name, value in losses.items()}

    def of_pilot(
        self,
        predictions: Predictions,
        targets: TargetBatch,
        matching: Matching,
        num_objects: Tensor,
        num_groups: int,
    ) -> dict[str, Tensor]:
        """Losses (B',) of pilot queries, ``loss_x_mp``, ``loss_x_mp_0`` ...: means over the groups.

        Args:
            predictions: of L * G layers, the groups of one layer adjacent.
            targets: of the same entries.
            matching: of the same layers.
            num_objects: 0-d, from :func:`count_objects`.
            num_groups: groups G.
        """
        inputs = (predictions, targets, matching, num_objects)
        return self._losses(self.terms, *inputs, suffix="_mp", num_groups=num_groups)

    def _losses(
        self,
        terms: Sequence[LossTerm],
        predictions: Predictions,
        targets: TargetBatch,
        matching: Matching,
        num_objects: Tensor,
        *,
        suffix: str = "",
        num_groups: int = 1,
    ) -> dict[str, Tensor]:
        num_layers = predictions.logits.shape[0] // num_groups
        losses: dict[str, Tensor] = {}
        for term in terms:
            for name, value in term(predictions, targets, matching, num_objects).items():
                if name not in term.names:
                    raise ValueError(f"{type(term).__name__} returns {name!r}, not in its names")
                name += suffix
                if num_groups > 1 and len(value) > 1:
                    value = value.unflatten(0, (-1, num_groups)).mean(1)
                first = num_layers - len(value)
                for layer, contributions in enumerate(value, first):
                    key = name if layer == num_layers - 1 else f"{name}_{layer}"
                    losses[key] = contributions
        return losses


@torch.no_grad()
def matching_metrics(
    scoring: Scoring,
    predictions: Predictions,
    targets: TargetBatch,
    matching: Matching,
    *,
    score_threshold: float = 0.0,
) -> dict[str, Tensor]:
    """0-d metrics of the last layer that are logged but not trained.

    ``class_error``: percentage of matched queries whose best class is wrong; preferring "no object"
    counts as wrong. The others are means over the entries. ``cardinality_error``: difference
    between the number of queries that are not "no object" and the number of objects.
    ``kept_queries``: queries that are not "no object" and score above ``score_threshold``.
    ``matched_objects``: objects with a query of their own.
    """
    last = matching.of_layer(-1)
    wanted = targets.labels[last.global_target]
    decoded = scoring.decode(predictions.logits[-1])
    labels = decoded.labels.masked_fill(~decoded.is_object, -1)[last.image, last.query]
    correct = (labels == wanted).sum() * (100 / max(len(wanted), 1))
    # Numbers that the host knows, with one transfer.
    known = torch.tensor([*map(float, targets.counts), len(wanted) / len(targets.counts)])
    known = known.to(wanted.device, non_blocking=True)
    counts, matched = known[:-1], known[-1]
    cardinality = (decoded.is_object.sum(-1) - counts).abs().mean()
    kept = decoded.is_object & (decoded.scores > score_threshold)
    return {
        "class_error": 100 - correct,
        "cardinality_error": cardinality,
        "kept_queries": kept.sum() / len(kept),
        "matched_objects": matched,
    }


def count_objects(targets: Sequence[ImageTarget], device: torch.device) -> Tensor:
    """Objects of the batch, averaged over processes, at least 1: a 0-d float tensor."""
    count = torch.tensor(float(sum(len(target) for target in targets)))
    return _mean_over_processes(count.to(device, non_blocking=True)).clamp(min=1.0)


class ClassCounts(NamedTuple):
    """Normalisers of class losses, averaged over processes; None: that of the process itself.

    Attributes:
        matched: (2,) float, queries of one decoder layer with an object and without one.
        piloted: (2,) float, the same of pilot queries, which all have an object.
        pixels: 0-d float, pixels that have a class.
    """

    matched: Tensor | None = None
    piloted: Tensor | None = None
    pixels: Tensor | None = None


def count_classes(
    targets: TargetBatch,
    *,
    num_queries: int,
    num_piloted: int,
    class_map: Tensor | None,
    device: torch.device,
) -> ClassCounts:
    """Count what class losses are averaged over, in all processes, which have to call together.

    Args:
        targets: of all B' entries.
        num_queries: queries Q.
        num_piloted: pilot queries of one group that stand for an object, in all entries.
        class_map: (B, H, W) int64, negative where a pixel has no class; or None.
        device: of the result.
    """
    matched = sum(min(num_queries, count) for count in targets.counts)
    numbers = [matched, len(targets) * num_queries - matched, num_piloted, 0]
    counts = torch.tensor([*numbers, 0], dtype=torch.float32).to(device, non_blocking=True)
    if class_map is not None:
        counts[-1] = (class_map >= 0).sum()
    counts = _mean_over_processes(counts)
    return ClassCounts(counts[:2], counts[2:4], counts[4])


def _mean_over_processes(count: Tensor) -> Tensor:
    if num_processes() > 1:
        dist.all_reduce(count)
        count = count / num_processes()
    return count


def _matched_boxes(
    predictions: Predictions, targets: TargetBatch, matching: Matching
) -> tuple[Tensor, Tensor]:
    """Predicted and true boxes (M, 4) of the matched pairs."""
    assert predictions.boxes is not None, "the model predicts no boxes"
    predicted = predictions.boxes.float()[matching.layer, matching.image, matching.query]
    return predicted, targets.boxes_cxcywh[matching.global_target]
