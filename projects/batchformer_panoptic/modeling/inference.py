"""Which queries matter in evaluation, and the result of one image in Detectron2's format.

Shapes: B images, Q queries, K queries of one image that are used for anything.
"""

from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .postprocessing import PanopticOptions, boxes_to_pixels, merge_panoptic, resize_masks
from .scoring import Decoded


class InferenceOptions(NamedTuple):
    """What evaluation returns.

    Attributes:
        thing_class_ids: contiguous ids of the classes that are things.
        panoptic: thresholds of the panoptic merge.
        instances: whether to return instances beside the panoptic map.
        instance_score_threshold: instances must score more than this.
        max_instances: instances of an image at the most, best first.
        pad_images: pad images of different sizes to one, instead of running them in turn.
    """

    thing_class_ids: tuple[int, ...]
    panoptic: PanopticOptions = PanopticOptions()
    instances: bool = True
    instance_score_threshold: float = 0.0
    max_instances: int = 100
    pad_images: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "InferenceOptions":
        """Read ``MODEL.PANOPTIC`` and Detectron2's ``TEST.DETECTIONS_PER_IMAGE``."""
        node = cfg.MODEL.PANOPTIC
        return cls(
            thing_class_ids=tuple(node.THING_CLASS_IDS),
            panoptic=PanopticOptions(
                score_threshold=node.SCORE_THRESHOLD_TEST,
                min_area=node.MIN_AREA_TEST,
                mask_threshold=node.MASK_THRESHOLD_TEST,
                duplicate_iou=node.DUPLICATE_IOU_TEST,
            ),
            instances=node.INSTANCES_TEST,
            instance_score_threshold=node.INSTANCE_SCORE_THRESHOLD_TEST,
            max_instances=cfg.TEST.DETECTIONS_PER_IMAGE,
            pad_images=cfg.MODEL.DETR.PAD_IN_TEST,
        )


class ChosenQueries(NamedTuple):
    """Queries by use: (B, Q) bool for a batch, (Q,) for one image.

    Attributes:
        panoptic: become segments.
        instance: become instances.
    """

    panoptic: Tensor
    instance: Tensor

    @property
    def any_use(self) -> Tensor:
        """Queries whose mask is needed."""
        return self.panoptic | self.instance

    def of_image(self, index: int) -> "ChosenQueries":
        """The rows of one image."""
        return ChosenQueries(self.panoptic[index], self.instance[index])


def select_queries(decoded: Decoded, options: InferenceOptions, has_masks: bool) -> ChosenQueries:
    """Choose the queries of a batch that are worth a mask or a box."""
    panoptic = decoded.is_object & (decoded.scores > options.panoptic.score_threshold)
    if not has_masks:
        panoptic = torch.zeros_like(panoptic)
    things = torch.tensor(options.thing_class_ids, dtype=torch.int64, device=panoptic.device)
    instance = torch.isin(decoded.labels, things)
    instance &= decoded.scores > options.instance_score_threshold
    if has_masks and not options.instances:
        instance = torch.zeros_like(instance)
    if options.max_instances < instance.shape[-1]:
        ranked = decoded.scores.masked_fill(~instance, -1.0)
        best = ranked.topk(options.max_instances, dim=-1).indices
        instance &= torch.zeros_like(instance).scatter(-1, best, True)
    return ChosenQueries(panoptic, instance)


def to_result(
    chosen: ChosenQueries,
    scores: Tensor,
    labels: Tensor,
    boxes: Tensor,
    mask_logits: Tensor | None,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    options: InferenceOptions,
) -> dict[str, Any]:
    """The result of one image.

    Args:
        chosen: its queries by use, (Q,) each.
        scores: (Q,) class probabilities.
        labels: (Q,) int64 contiguous class ids.
        boxes: (Q, 4) cxcywh in 0 to 1.
        mask_logits: (K, h, w) of the queries in ``chosen.any_use``, in order, or None.
        padded_size: (height, width) of the padded batch.
        image_size: (height, width) of the image before padding.
        output_size: (height, width) of the result.
        options: thresholds.

    Returns:
        ``instances``, and ``panoptic_seg`` when there are masks.
    """
    instance = chosen.instance
    instances = Instances(output_size)
    instances.pred_boxes = Boxes(boxes_to_pixels(boxes[instance], output_size))
    instances.scores = scores[instance]
    instances.pred_classes = labels[instance]
    result: dict[str, Any] = {"instances": instances}
    if mask_logits is None:
        return result
    masks = resize_masks(
        mask_logits, padded_size=padded_size, image_size=image_size, output_size=output_size
    )
    used = chosen.any_use
    instances.pred_masks = masks[instance[used]] > 0
    panoptic = chosen.panoptic
    result["panoptic_seg"] = merge_panoptic(
        masks[panoptic[used]],
        scores[panoptic],
        labels[panoptic],
        thing_class_ids=options.thing_class_ids,
        options=options.panoptic,
    )
    if not options.instances:
        del result["instances"]
    return result
