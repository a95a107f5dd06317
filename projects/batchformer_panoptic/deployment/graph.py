"""Models as functions from tensors to tensors, to be exported.

Shapes: B images, (H, W) their padded size, Q queries, K classes, P places for segments, M places
for boxes, (h, w) the map of the mask head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modeling.panoptic_detr import ModelPredictions, PanopticDETR
from ..modeling.postprocessing.masks import boxes_to_pixels
from ..modeling.postprocessing.results import best_detections
from ..modeling.set_prediction.predictions import QueryMasks
from .merging import SegmentBatch, enlarge, keep_queries, merge_batch, pixels_of_images


class RawOutputs(NamedTuple):
    """Predictions of all queries, for models with boxes and masks; others lack one of the two.

    Attributes:
        logits: (B, Q, K or K + 1) float32.
        boxes: (B, Q, 4) float32 cxcywh in 0 to 1 over the image without padding.
        masks: (B, Q, h, w) float32 logits over the padded image.
    """

    logits: Tensor
    boxes: Tensor | None
    masks: Tensor | None


class BoxBatch(NamedTuple):
    """Detections, best first.

    Attributes:
        boxes: (B, M, 4) float32 xyxy in pixels of the output.
        labels: (B, M) int64 contiguous class ids.
        scores: (B, M) float32; 0 for places without a detection.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor


class ExportedModel(nn.Module):
    """Base of the two forms of a model.

    Args:
        model: in evaluation mode, on the device of the export.
    """

    def __init__(self, model: PanopticDETR) -> None:
        super().__init__()
        self.model = model

    def _predict(self, images: Tensor, image_sizes: Tensor) -> ModelPredictions:
        model = self.model
        inside = pixels_of_images(image_sizes, (images.shape[2], images.shape[3]))
        images = (images - model.pixel_mean) / model.pixel_std * inside[:, None]
        features = model.backbone(images)
        return model.predict(features, image_sizes, (images.shape[2], images.shape[3]))


class RawModel(ExportedModel):
    """The predictions of all queries."""

    def forward(self, images: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        """Return the fields of :class:`RawOutputs` that the model has.

        Args:
            images: (B, C, H, W) float32 values as in the file, 0 to 255, in the order of the
                channels of ``INPUT.FORMAT``, padded with any value to a common size that is a
                multiple of ``size_divisibility``.
            image_sizes: (B, 2) int64, (height, width) of each image.
        """
        found = self._predict(images, image_sizes)
        query = torch.arange(found.logits.shape[2], device=images.device)
        masks = None
        if found.masks is not None:
            masks = _masks_of(found, query.expand(found.logits.shape[1], -1)).float()
        boxes = None if found.boxes is None else found.boxes[-1].float()
        return _as_dict(RawOutputs(found.logits[-1].float(), boxes, masks))


class ResultModel(ExportedModel):
    """The panoptic result or, for a model without masks, boxes."""

    def forward(
        self, images: Tensor, image_sizes: Tensor, output_sizes: Tensor, score_threshold: Tensor
    ) -> dict[str, Tensor]:
        """Return the fields of :class:`SegmentBatch` or :class:`BoxBatch`.

        Args:
            images: see `RawModel`.
            image_sizes: see `RawModel`.
            output_sizes: (B, 2) int64, (height, width) of each result, such as that of the
                photograph before it was resized.
            score_threshold: 0-d float32, in place of that of the config.
        """
        options = self.model.inference_options
        found = self._predict(images, image_sizes)
        decoded = self.model.scoring.decode(found.logits[-1].float())
        if found.masks is None:
            boxes = self._boxes(found, decoded.class_scores, output_sizes, score_threshold)
            return _as_dict(boxes)
        used = decoded.is_object & (decoded.scores > score_threshold)
        query, kept = keep_queries(used, decoded.scores, decoded.labels, options.thing_class_ids)
        logits = enlarge(
            _masks_of(found, query).float(), found.padded_size, image_sizes, output_sizes
        )
        inside = pixels_of_images(output_sizes, (logits.shape[2], logits.shape[3]))
        segments = merge_batch(logits, inside, kept, merge=options.merge, options=options.panoptic)
        return _as_dict(segments)

    def _boxes(
        self,
        found: ModelPredictions,
        class_scores: Tensor,
        output_sizes: Tensor,
        score_threshold: Tensor,
    ) -> BoxBatch:
        options = self.model.inference_options
        detections = best_detections(
            class_scores, options.thing_class_ids, max_detections=options.max_instances
        )
        valid = detections.valid & (detections.scores > score_threshold)
        assert found.boxes is not None
        index = detections.query[..., None].expand(-1, -1, 4)
        boxes = found.boxes[-1].float().gather(1, index)
        boxes = boxes_to_pixels(boxes, (1, 1)) * output_sizes.flip(1).repeat(1, 2)[:, None]
        return BoxBatch(boxes, detections.labels, detections.scores * valid)


def _as_dict(outputs: RawOutputs | SegmentBatch | BoxBatch) -> dict[str, Tensor]:
    """A dict, which files can hold; the classes of tuples would have to be known to a reader."""
    return {name: value for name, value in outputs._asdict().items() if value is not None}


def _masks_of(found: ModelPredictions, query: Tensor) -> Tensor:
    """(B, P, h, w) mask logits of (B, P) queries."""
    if isinstance(found.masks, QueryMasks):
        embeddings = found.masks.embeddings[-1]
        index = query[..., None].expand(-1, -1, embeddings.shape[-1])
        features = found.masks.features
        masks = embeddings.gather(1, index) @ features.flatten(2)
        return masks.unflatten(2, (features.shape[2], features.shape[3]))
    image = torch.arange(query.shape[0], device=query.device)[:, None].expand_as(query)
    masks = found.last_masks(image.flatten(), query.flatten())
    return masks.unflatten(0, (query.shape[0], query.shape[1]))
