"""From predictions to the results of evaluation: which queries are used, and Detectron2's format.

Shapes: B images, Q queries, K queries of one image that are used for anything, M detections.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ...errors import UserError
from ..set_prediction.scoring import Decoded
from .masks import ImageMasks, boxes_to_pixels, mask_boxes, mask_scores, semantic_map
from .panoptic import MERGES, Merge, PanopticOptions, merge_panoptic, merge_strongest


class Detections(NamedTuple):
    """Detections of a batch (B, M) or of one image (M,), best first.

    Attributes:
        query: int64, the query whose box and mask the detection uses; may occur several times.
        labels: int64 contiguous class ids.
        scores: 0 to 1.
        valid: bool, False where there are fewer than M detections.
    """

    query: Tensor
    labels: Tensor
    scores: Tensor
    valid: Tensor

    def used_queries(self, num_queries: int) -> Tensor:
        """(B, Q) bool: queries with at least one detection."""
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
    among_all_classes: bool = False,
) -> Detections:
    """Rank all pairs of query and class, and keep the best of each image.

    For sigmoid scores this is the published top 100 over queries times classes, where one query may
    be a detection of two classes. For softmax scores all classes but a query's best score 0, which
    leaves one detection per query.

    Args:
        scores: (B, Q, K), ``Decoded.class_scores`` or ``Decoded.probabilities``.
        class_ids: classes to detect, which are the things of the data sets.
        max_detections: maximum number per image; published: 100.
        score_threshold: detections must score more than this, and more than 0.
        among_all_classes: pairs of other classes take part in the ranking and are then dropped, so
            that there may be fewer detections (``instance_inference`` of Mask2Former).
    """
    num_classes = scores.shape[-1]
    wanted = set(class_ids)
    others = torch.tensor([label not in wanted for label in range(num_classes)])
    others = others.to(scores.device, non_blocking=True)
    pairs = (scores if among_all_classes else scores.masked_fill(others, 0.0)).flatten(-2)
    best, index = pairs.topk(min(max_detections, pairs.shape[-1]), dim=-1)
    labels = index % num_classes
    return Detections(
        query=index // num_classes,
        labels=labels,
        scores=best,
        valid=(best > max(score_threshold, 0.0)) & ~others[labels],
    )


# Values of MODEL.PANOPTIC.MASK_THRESHOLD_TEST that a merge supports; 0.0 is the default.
_MASK_THRESHOLDS = {"published": (0.0,), "mask2former": (0.0, 0.5)}
_INSTANCE_SCORINGS = ("detr", "mask2former")


class InferenceOptions(NamedTuple):
    """The results that evaluation returns.

    Attributes:
        thing_class_ids: contiguous ids of the classes that are things.
        panoptic: thresholds of panoptic inference.
        merge: the rule of panoptic inference.
        instances: whether to return instances in addition to the segment map.
        instance_score_threshold: instances must score more than this.
        max_instances: maximum number of instances per image, best first.
        instance_scoring: "detr" or "mask2former", see ``MODEL.PANOPTIC`` in the config.
        semantic: whether to return the scores of all classes at each pixel.
        pad_images: pad images of different sizes to one size instead of running them in turn.
    """

    thing_class_ids: tuple[int, ...]
    panoptic: PanopticOptions = PanopticOptions()
    merge: Merge = merge_strongest
    instances: bool = True
    instance_score_threshold: float = 0.0
    max_instances: int = 100
    instance_scoring: str = "detr"
    semantic: bool = False
    pad_images: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "InferenceOptions":
        """Read ``MODEL.PANOPTIC`` and Detectron2's ``TEST.DETECTIONS_PER_IMAGE``.

        Raises:
            UserError: an unknown merge or scoring, or a threshold that the merge does not support.
        """
        node = cfg.MODEL.PANOPTIC
        if node.MERGE_TEST not in MERGES:
            raise UserError(
                f"MODEL.PANOPTIC.MERGE_TEST is {node.MERGE_TEST!r}; known: {', '.join(MERGES)}"
            )
        possible = _MASK_THRESHOLDS.get(node.MERGE_TEST, (node.MASK_THRESHOLD_TEST,))
        if node.MASK_THRESHOLD_TEST not in possible:
            raise UserError(
                f"MODEL.PANOPTIC.MASK_THRESHOLD_TEST is {node.MASK_THRESHOLD_TEST}, which "
                f"MODEL.PANOPTIC.MERGE_TEST {node.MERGE_TEST} does not support: set it to 0.0, or "
                "the merge to strongest"
            )
        if node.INSTANCE_SCORING_TEST not in _INSTANCE_SCORINGS:
            raise UserError(
                f"MODEL.PANOPTIC.INSTANCE_SCORING_TEST is {node.INSTANCE_SCORING_TEST!r}; known: "
                f"{', '.join(_INSTANCE_SCORINGS)}"
            )
        _check_ranges(node)
        return cls(
            thing_class_ids=tuple(node.THING_CLASS_IDS),
            panoptic=PanopticOptions(
                score_threshold=node.SCORE_THRESHOLD_TEST,
                min_area=node.MIN_AREA_TEST,
                mask_threshold=node.MASK_THRESHOLD_TEST,
                duplicate_iou=node.DUPLICATE_IOU_TEST,
                overlap_threshold=node.OVERLAP_THRESHOLD_TEST,
            ),
            merge=MERGES[node.MERGE_TEST],
            instances=node.INSTANCES_TEST,
            instance_score_threshold=node.INSTANCE_SCORE_THRESHOLD_TEST,
            max_instances=cfg.TEST.DETECTIONS_PER_IMAGE,
            instance_scoring=node.INSTANCE_SCORING_TEST,
            semantic=node.SEMANTIC_TEST,
            pad_images=cfg.MODEL.DETR.PAD_IN_TEST,
        )


def _check_ranges(node: CfgNode) -> None:
    for key in (
        "SCORE_THRESHOLD_TEST",
        "MASK_THRESHOLD_TEST",
        "OVERLAP_THRESHOLD_TEST",
        "DUPLICATE_IOU_TEST",
        "INSTANCE_SCORE_THRESHOLD_TEST",
    ):
        if not 0 <= node[key] <= 1:
            raise UserError(f"MODEL.PANOPTIC.{key} is {node[key]}; it must be from 0 to 1")
    if node.MIN_AREA_TEST < 0:
        raise UserError(
            f"MODEL.PANOPTIC.MIN_AREA_TEST is {node.MIN_AREA_TEST}; it counts pixels, 0 keeps all"
        )


class ChosenQueries(NamedTuple):
    """Queries grouped by use, of a batch or of one image.

    Attributes:
        panoptic: (B, Q) or (Q,) bool, True for queries that become segments.
        detections: (B, M) or (M,), the detections.
    """

    panoptic: Tensor
    detections: Detections

    @property
    def any_use(self) -> Tensor:
        """Queries whose mask is needed, in the shape of ``panoptic``."""
        return self.panoptic | self.detections.used_queries(self.panoptic.shape[-1])

    def of_image(self, index: int) -> "ChosenQueries":
        """The rows of one image."""
        return ChosenQueries(self.panoptic[index], self.detections.of_image(index))


def select_queries(decoded: Decoded, options: InferenceOptions, has_masks: bool) -> ChosenQueries:
    """Choose the queries of a batch that become segments or detections."""
    panoptic = decoded.is_object & (decoded.scores > options.panoptic.score_threshold)
    if not has_masks:
        panoptic = torch.zeros_like(panoptic)
    as_mask2former = options.instance_scoring == "mask2former"
    detections = best_detections(
        decoded.probabilities if as_mask2former else decoded.class_scores,
        options.thing_class_ids,
        max_detections=options.max_instances if options.instances or not has_masks else 0,
        score_threshold=options.instance_score_threshold,
        among_all_classes=as_mask2former,
    )
    return ChosenQueries(panoptic, detections)


def needed_masks(chosen: ChosenQueries, options: InferenceOptions) -> Tensor:
    """(B, Q) bool: queries whose mask is needed; all of them for a semantic map."""
    return torch.ones_like(chosen.panoptic) if options.semantic else chosen.any_use


def on_host(
    chosen: ChosenQueries, scores: Tensor, labels: Tensor
) -> tuple[ChosenQueries, Tensor, Tensor]:
    """Copy chosen queries, scores and labels of a batch to the host, with one wait for the device.

    Args:
        chosen: queries of the batch by use.
        scores: (B, Q) float32.
        labels: (B, Q) int64.
    """
    fields = [chosen.panoptic, *chosen.detections, scores, labels]
    # One tensor, one transfer. float32 is exact for indices of queries and classes.
    packed = torch.cat([field.to(torch.float32) for field in fields], dim=1).cpu()
    parts = packed.split([field.shape[1] for field in fields], dim=1)
    panoptic, *detections, scores, labels = (
        part.to(field.dtype) for part, field in zip(parts, fields, strict=True)
    )
    return ChosenQueries(panoptic, Detections(*detections)), scores, labels


def to_result(
    chosen: ChosenQueries,
    scores: Tensor,
    labels: Tensor,
    boxes: Tensor | None,
    mask_logits: Tensor | None,
    probabilities: Tensor | None = None,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    options: InferenceOptions,
) -> dict[str, Any]:
    """The result of one image.

    Args:
        chosen: its queries by use, on the host; see :func:`on_host`.
        scores: (Q,) class probabilities, on the host.
        labels: (Q,) int64 contiguous class ids, on the host.
        boxes: (Q, 4) cxcywh in 0 to 1, or None: boxes are then those of the masks.
        mask_logits: (K, h, w) of the queries of :func:`needed_masks`, in order, or None.
        probabilities: (Q, C) of all classes, where a semantic map is asked for.
        padded_size: (height, width) of the padded batch.
        image_size: (height, width) of the image before padding.
        output_size: (height, width) of the result.
        options: the results to return.

    Returns:
        ``panoptic_seg`` if there are masks, ``instances`` unless the options exclude them, and
        ``sem_seg`` if they include it.
    """
    result: dict[str, Any] = {}
    masks = None
    if mask_logits is not None:
        masks = ImageMasks(
            mask_logits, padded_size=padded_size, image_size=image_size, output_size=output_size
        )
    if masks is not None and options.semantic:
        assert probabilities is not None
        _check_size(
            4 * probabilities.shape[1], output_size, "set MODEL.PANOPTIC.SEMANTIC_TEST False"
        )
        result["sem_seg"] = semantic_map(masks, probabilities)
        # All masks were for this map; only some are those of segments and instances.
        used = chosen.any_use.nonzero()[:, 0]
        masks = masks[used.to(masks.logits.device, non_blocking=True)]
    if masks is None or options.instances:
        result["instances"] = _instances(chosen, boxes, masks, output_size, options)
    if masks is not None:
        panoptic = chosen.panoptic
        where = panoptic[chosen.any_use].nonzero()[:, 0]
        result["panoptic_seg"] = merge_panoptic(
            masks[where.to(masks.logits.device, non_blocking=True)],
            scores[panoptic],
            labels[panoptic],
            merge=options.merge,
            thing_class_ids=options.thing_class_ids,
            options=options.panoptic,
        )
    return result


def _instances(
    chosen: ChosenQueries,
    boxes: Tensor | None,
    masks: ImageMasks | None,
    output_size: tuple[int, int],
    options: InferenceOptions,
) -> Instances:
    """The detections of one image, with the masks of its queries and boxes, or boxes of masks."""
    found = chosen.detections
    source = boxes if masks is None else masks.logits
    assert source is not None, "a model predicts boxes or masks"
    instances = Instances(output_size)
    instances.scores = found.scores.to(source.device, non_blocking=True)
    instances.pred_classes = found.labels.to(source.device, non_blocking=True)
    if masks is not None:
        place = chosen.any_use.cumsum(0) - 1  # of a used query among the masks
        where = place[found.query].to(source.device, non_blocking=True)
        _check_size(
            len(where),
            output_size,
            "lower TEST.DETECTIONS_PER_IMAGE, or set MODEL.PANOPTIC.INSTANCES_TEST False",
        )
        instances.pred_masks = torch.empty(
            (len(where), *output_size), dtype=torch.bool, device=source.device
        )
        for rows, logits in masks.bands():
            instances.pred_masks[:, rows] = (logits > 0)[where]
        if options.instance_scoring == "mask2former":
            instances.scores = instances.scores * mask_scores(masks)[where]
    if boxes is None:
        instances.pred_boxes = Boxes(mask_boxes(instances.pred_masks))
    else:
        query = found.query.to(source.device, non_blocking=True)
        instances.pred_boxes = Boxes(boxes_to_pixels(boxes[query], output_size))
    if options.instance_scoring == "mask2former":
        instances = _best_first(instances, options.instance_score_threshold)
    return instances


# The largest map of scores or masks that is returned for an image, in bytes.
_LARGEST_RESULT = 2**32


def _check_size(bytes_per_pixel: int, output_size: tuple[int, int], remedy: str) -> None:
    """Refuse a result that would exhaust the memory."""
    height, width = output_size
    size = bytes_per_pixel * height * width
    if size > _LARGEST_RESULT:
        raise UserError(
            f"the masks or scores of an image of {width} x {height} pixels take "
            f"{size / 2**30:.1f} GiB, more than {_LARGEST_RESULT / 2**30:g}: {remedy}"
        )


def _best_first(instances: Instances, score_threshold: float) -> Instances:
    """Sort instances by score, and drop those that do not score more than the threshold and 0."""
    order = instances.scores.argsort(descending=True, stable=True)
    order = order[instances.scores[order] > max(score_threshold, 0.0)]
    ordered: Instances = instances[order]
    return ordered
