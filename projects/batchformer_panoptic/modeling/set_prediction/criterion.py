"""The set-prediction losses of DETR (section 3.1), as contributions of each image.

Shapes: L decoder layers, B' streams * images, Q queries, M matched pairs of all layers.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ...layers import cxcywh_to_xyxy, generalized_box_iou
from .mask_losses import mask_dice_loss, mask_focal_loss, upsampled_mask_losses
from .matcher import Matching
from .scoring import Scoring
from .targets import ImageTarget, TargetMasks, gather_mask_shares


class SetCriterion:
    """Losses of matched queries: classes, boxes and masks, for the last and the aux layers.

    Every loss comes back as (B',) contributions whose sum is the published loss times its weight,
    so that whoever knows what the entries of the batch are can tell their shares apart. The
    normaliser of boxes and masks is the number of objects of the whole batch of B' entries,
    averaged over processes and at least 1; with each image in the batch once for every stream, the
    sum is therefore the mean over the streams, not their total.

    Args:
        scoring: gives the classification loss.
        weights: of the terms "ce", "bbox", "giou", "mask", "dice".
        mask_resolution: where mask losses are taken. "target" (published): predictions are brought
            to the size of the padded targets. "prediction": targets are averaged over the cells
            of the predicted map, which costs a sixteenth of that at stride 4.
    """

    def __init__(
        self, scoring: Scoring, *, weights: dict[str, float], mask_resolution: str = "target"
    ) -> None:
        if mask_resolution not in ("target", "prediction"):
            raise ValueError(
                f"MODEL.MASK_HEAD.LOSS_RESOLUTION is {mask_resolution!r}; known: target, prediction"
            )
        self.scoring = scoring
        self.weights = weights
        self.mask_resolution = mask_resolution

    def box_losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[ImageTarget],
        matching: Matching,
        num_objects: Tensor,
        *,
        suffix: str = "",
    ) -> dict[str, Tensor]:
        """Losses of classes and boxes in every layer.

        Args:
            logits: (L, B', Q, num_outputs).
            boxes: (L, B', Q, 4) cxcywh in 0 to 1.
            targets: B' image targets.
            matching: their assignment.
            num_objects: 0-d, from :func:`count_objects`.
            suffix: added to every name.

        Returns:
            ``loss_ce``, ``loss_bbox``, ``loss_giou`` of the last layer and ``loss_ce_0`` ... of
            the layers before it, each (B',), weighted.
        """
        classes = self.matched_classes(logits, targets, matching)
        target_boxes = torch.cat([t.boxes_cxcywh for t in targets])[matching.global_target]
        matched_boxes = boxes.float()[matching.layer, matching.image, matching.query]
        giou = generalized_box_iou(cxcywh_to_xyxy(matched_boxes), cxcywh_to_xyxy(target_boxes))
        l1 = F.l1_loss(matched_boxes, target_boxes, reduction="none").sum(-1)
        terms = {
            "ce": self.scoring.loss(logits.float(), classes, num_objects),
            "bbox": _sum_by_image(l1, matching, logits.shape[:2]) / num_objects,
            "giou": _sum_by_image(1 - giou, matching, logits.shape[:2]) / num_objects,
        }
        return {
            _loss_name(name, layer, logits.shape[0]) + suffix: self.weights[name] * term[layer]
            for name, term in terms.items()
            for layer in range(logits.shape[0])
        }

    def mask_losses(
        self,
        mask_logits: Tensor,
        targets: Sequence[ImageTarget],
        matching: Matching,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of the masks of the last layer.

        Padding counts as outside of every mask, as published.

        Args:
            mask_logits: (M, h, w), the masks of the matched queries in the order of ``matching``.
            targets: B' image targets with masks.
            matching: the pairs of the last layer alone.
            num_objects: 0-d, from :func:`count_objects`.

        Returns:
            ``loss_mask`` and ``loss_dice``, each (B',), weighted.
        """
        logits = mask_logits.float()
        image, local = matching.image, matching.local_target
        if self.mask_resolution == "target":
            masks = TargetMasks(targets)
            focal, dice = upsampled_mask_losses(
                logits, masks.size, lambda part: masks.gather(image[part], local[part])
            )
        else:
            size = (logits.shape[-2], logits.shape[-1])
            shares = gather_mask_shares(targets, image, local, size).flatten(1)
            focal = mask_focal_loss(logits.flatten(1), shares)
            dice = mask_dice_loss(logits.flatten(1), shares)
        each = {"mask": focal, "dice": dice}
        return {
            f"loss_{name}": self.weights[name]
            * logits.new_zeros(len(targets)).index_add(0, matching.image, value)
            / num_objects
            for name, value in each.items()
        }

    @torch.no_grad()
    def metrics(
        self, logits: Tensor, targets: Sequence[ImageTarget], matching: Matching
    ) -> dict[str, Tensor]:
        """What is watched and not trained, of the last layer: 0-d tensors.

        ``class_error``: percentage of matched queries with another best class;
        ``cardinality_error``: mean over images of how far the number of queries that are not "no
        object" is from the number of objects.
        """
        last = matching.of_layer(-1)
        wanted = torch.cat([t.labels for t in targets])[last.global_target]
        decoded = self.scoring.decode(logits[-1])
        # A query that prefers "no object" is wrong as well.
        labels = decoded.labels.masked_fill(~decoded.is_object, -1)[last.image, last.query]
        correct = (labels == wanted).float().sum() / max(len(wanted), 1)
        counts = torch.tensor([float(len(t)) for t in targets])
        counts = counts.to(logits.device, non_blocking=True)
        cardinality = (decoded.is_object.sum(-1) - counts).abs().mean()
        return {"class_error": 100 - 100 * correct, "cardinality_error": cardinality}

    def matched_classes(
        self, logits: Tensor, targets: Sequence[ImageTarget], matching: Matching
    ) -> Tensor:
        """(L, B', Q) int64: the class each query is to predict, ``num_classes`` where unmatched."""
        classes = torch.full(
            logits.shape[:3], self.scoring.num_classes, dtype=torch.int64, device=logits.device
        )
        labels = torch.cat([t.labels for t in targets])[matching.global_target]
        classes[matching.layer, matching.image, matching.query] = labels
        return classes


def count_objects(targets: Sequence[ImageTarget], device: torch.device) -> Tensor:
    """Objects of the batch, averaged over processes, at least 1: a 0-d float tensor."""
    count = torch.tensor(float(sum(len(target) for target in targets)))
    count = count.to(device, non_blocking=True)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=1.0)


def _sum_by_image(values: Tensor, matching: Matching, shape: tuple[int, ...]) -> Tensor:
    """(M,) values of pairs -> (L, B') sums."""
    num_layers, num_images = shape
    flat = values.new_zeros(num_layers * num_images)
    flat = flat.index_add(0, matching.layer * num_images + matching.image, values)
    return flat.view(num_layers, num_images)


def _loss_name(term: str, layer: int, num_layers: int) -> str:
    return f"loss_{term}" if layer == num_layers - 1 else f"loss_{term}_{layer}"
