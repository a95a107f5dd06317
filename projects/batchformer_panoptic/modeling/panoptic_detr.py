"""The meta-architecture: backbone, transformer, heads, losses and results, connected.

Shapes: B images, B' = streams * B, L decoder layers, Q queries, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..batchformer import Losses, StreamState
from ..batchformer.exchange import gather_objects
from ..config import boxes_only_changes
from ..errors import NonFiniteError, UserError
from .backbone import checkpoint_stages, fold_frozen_norms
from .build import (
    build_criterion,
    build_mask_head,
    build_matcher,
    build_prediction_head,
    build_scoring_from_config,
    build_semantic_head,
)
from .postprocessing.results import (
    InferenceOptions,
    needed_masks,
    on_host,
    select_queries,
    to_result,
)
from .set_prediction.criterion import (
    ClassCounts,
    SetCriterion,
    count_classes,
    count_objects,
    matching_metrics,
)
from .set_prediction.mask_losses import pixel_class_loss
from .set_prediction.matcher import HungarianMatcher
from .set_prediction.predictions import MaskSelector, Predictions
from .set_prediction.scoring import Scoring
from .set_prediction.targets import (
    ImageTarget,
    TargetBatch,
    class_maps,
    pad_and_stack,
    to_device,
    to_targets,
)
from .transformer import Transformer, TransformerOutput, build_transformer
from .transformer.layers import BatchPadding, batch_padding


@dataclass(frozen=True, kw_only=True)
class ModelPredictions(Predictions):
    """Predictions together with the output of the transformer that they were made from.

    Attributes:
        transformer: the output of the transformer, of all decoder layers.
        padded_size: (height, width) in pixels that the maps cover, padding included.
        pilot: predictions of pilot queries, one "layer" for each layer and group; or None.
    """

    transformer: TransformerOutput
    padded_size: tuple[int, int]
    pilot: Predictions | None = None

    @property
    def streams(self) -> StreamState:
        """The streams along B'."""
        return self.transformer.streams


@META_ARCH_REGISTRY.register()
class PanopticDETR(nn.Module):
    """A DETR-style model for boxes, and for panoptic segmentation when it has a mask head.

    With a BatchFormerV2 hook in its transformer it trains in two streams; in evaluation the hook
    does nothing and the model is the plain one.

    Args:
        backbone: a Detectron2 backbone.
        transformer: from ``TRANSFORMER_REGISTRY``.
        box_head: classes and boxes from query states; called as :class:`BoxHead`.
        mask_head: masks of chosen queries, or None for a model without masks.
        scoring: the meaning of the class logits.
        matcher: assigns queries to objects.
        criterion: the losses.
        inference_options: the results to return in evaluation.
        pixel_mean: mean of each channel, in the order of the input image.
        pixel_std: standard deviation of each channel.
        semantic_head: classes of pixels in training, or None.
        semantic_weight: weight of each of its losses.
        deep_supervision: losses on all decoder layers instead of the last only.
        freeze_detr: train the mask head only.
        checkpoint_masks: activation checkpointing of the mask head in training.
        sync_padding: pad the images of all processes to one size in training.
        sync_class_loss: normalise the class losses of a softmax, those of the semantic head
            included, over all processes instead of within each.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        transformer: Transformer,
        box_head: nn.Module,
        mask_head: nn.Module | None,
        scoring: Scoring,
        matcher: HungarianMatcher,
        criterion: SetCriterion,
        inference_options: InferenceOptions,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        semantic_head: nn.Module | None = None,
        semantic_weight: float = 1.0,
        deep_supervision: bool = True,
        freeze_detr: bool = False,
        checkpoint_masks: bool = False,
        sync_padding: bool = False,
        sync_class_loss: bool = False,
    ) -> None:
        super().__init__()
        if freeze_detr and mask_head is None:
            raise ValueError("freeze_detr trains the mask head only, and there is no mask head")
        self.backbone = backbone
        self.size_divisibility = math.lcm(
            *(max(getattr(part, "size_divisibility", 0), 1) for part in (backbone, transformer))
        )
        self.transformer = transformer
        self.box_head = box_head
        self.mask_head = mask_head
        self.semantic_head = semantic_head
        self.semantic_weight = semantic_weight
        self.scoring = scoring
        self.matcher = matcher
        self.criterion = criterion
        self.inference_options = inference_options
        self.deep_supervision = deep_supervision
        self.freeze_detr = freeze_detr
        self.checkpoint_masks = checkpoint_masks
        self.sync_padding = sync_padding
        self.sync_class_loss = sync_class_loss
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer(
            "pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        if freeze_detr:
            self.freeze_all_but_mask_head()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts that the config names."""
        backbone = build_backbone(cfg)
        fold_frozen_norms(backbone)
        if "backbone" in cfg.MODEL.ACTIVATION_CHECKPOINTING:
            checkpoint_stages(backbone)
        shapes = backbone.output_shape()
        scoring = build_scoring_from_config(cfg)
        transformer = build_transformer(cfg, shapes)
        if not cfg.MODEL.MASK_ON:
            _check_boxes_only(cfg, transformer)
        box_head = build_prediction_head(cfg, scoring, transformer)
        mask_head = build_mask_head(cfg, shapes, transformer) if cfg.MODEL.MASK_ON else None
        predicted = {
            "boxes": transformer.predicts_boxes,
            "masks": mask_head is not None,
            "mask embeddings": getattr(mask_head, "embeds_masks", False),
        }
        available = frozenset(name for name, is_there in predicted.items() if is_there)
        return {
            "backbone": backbone,
            "transformer": transformer,
            "box_head": box_head,
            "mask_head": mask_head,
            "scoring": scoring,
            "matcher": build_matcher(cfg, scoring, available),
            "criterion": build_criterion(cfg, scoring, available),
            "inference_options": InferenceOptions.from_config(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "semantic_head": (
                build_semantic_head(cfg, shapes) if cfg.MODEL.SEMANTIC_AUX.ENABLED else None
            ),
            "semantic_weight": cfg.MODEL.SEMANTIC_AUX.WEIGHT,
            "deep_supervision": cfg.MODEL.DETR.DEEP_SUPERVISION,
            "freeze_detr": cfg.MODEL.MASK_HEAD.FREEZE_DETR,
            "checkpoint_masks": "mask_head" in cfg.MODEL.ACTIVATION_CHECKPOINTING,
            "sync_padding": cfg.MODEL.BATCHFORMER.ENABLED and cfg.MODEL.BATCHFORMER.SYNC,
            "sync_class_loss": cfg.MODEL.DETR.SYNC_CLASS_LOSS,
        }

    @property
    def device(self) -> torch.device:
        """The device of the model, to which inputs are moved."""
        return self.pixel_mean.device

    def train(self, mode: bool = True) -> "PanopticDETR":
        """Switch to training or evaluation; a frozen backbone keeps its batch norm statistics."""
        super().train(mode)
        if self.freeze_detr:
            self.backbone.eval()
        return self

    def freeze_all_but_mask_head(self) -> None:
        """Exclude everything but the mask head from training, as in DETR's second stage."""
        assert self.mask_head is not None
        self.requires_grad_(False)
        self.mask_head.requires_grad_(True)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Train or infer on a batch in Detectron2's format.

        Args:
            batched_inputs: one dict per image: ``image`` (C, H, W); in training ``instances`` with
                ``gt_classes`` and ``gt_boxes``, and ``segment_map`` (H, W) for masks; in evaluation
                optionally ``height`` and ``width`` of the output.

        Returns:
            In training :class:`Losses`, a dict of 0-d losses whose sum is the objective. In
            evaluation a list of dicts with ``instances`` and, given a mask head, ``panoptic_seg``:
            an int32 map at the output size (0 is void) and its segments. With
            ``MODEL.PANOPTIC.SEMANTIC_TEST`` also ``sem_seg``: (K, H, W) float32 class scores.

        Raises:
            NonFiniteError: the matching cost in training, or a class score in evaluation, is not
                finite; the message names the images.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess(batched_inputs)
        if self.sync_padding:
            images = _pad_to_largest(images)
        padded_size = _spatial_size(images.tensor)
        targets = to_targets(
            batched_inputs,
            self.device,
            padded_size=padded_size,
            with_boxes=self.transformer.predicts_boxes,
            with_masks=self.mask_head is not None,
        )
        features = self.backbone(images.tensor)
        predictions = self.predict(features, images.image_sizes, padded_size, targets)
        try:
            return self.losses(predictions, features, targets)
        except NonFiniteError as error:
            if not error.entries:
                raise
            images_of = (batched_inputs[i % len(batched_inputs)] for i in error.entries)
            names = ", ".join(dict.fromkeys(_name_of(inputs) for inputs in images_of))
            raise NonFiniteError(f"{error} for images {names}", error.entries) from error

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Pad images to one size, move them to the device in one copy, and normalise them.

        Padding is zero after the normalisation.
        """
        images = [inputs["image"] for inputs in batched_inputs]
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        divisor = self.size_divisibility
        height, width = (
            -(-max(lengths) // divisor) * divisor for lengths in zip(*sizes, strict=True)
        )
        pixels = to_device(pad_and_stack(images, (height, width)), self.device)
        pixels = (pixels - self.pixel_mean) / self.pixel_std
        padding = BatchPadding(sizes, (height, width))
        if padding.is_padded:
            pixels = pixels.masked_fill(padding.mask_like(pixels)[:, None], 0.0)
        return ImageList(pixels, sizes)

    def predict(
        self,
        features: dict[str, Tensor],
        image_sizes: Sequence[tuple[int, int]] | Tensor,
        padded_size: tuple[int, int],
        targets: Sequence[ImageTarget] | None = None,
    ) -> ModelPredictions:
        """Predict classes and boxes of all queries; masks are computed on demand.

        Predictions are those of all decoder layers in training with deep supervision, otherwise
        those of the last layer.

        Args:
            features: backbone maps (B, C_i, H_i, W_i) by name.
            image_sizes: (height, width) of each image before padding; a tensor (B, 2) int64 in a
                graph to be exported.
            padded_size: (height, width) of the batch.
            targets: of the B images, for transformers that use them in training.
        """
        given = [targets] if self.training and self.transformer.uses_targets and targets else []
        padding = batch_padding(image_sizes, padded_size)
        output: TransformerOutput = self.transformer(features, padding, self.box_head, *given)
        first = 0 if self.training and self.deep_supervision else -1
        layers = output.from_layer(first)
        predictions = self._heads(layers, features)
        of_pilot = None
        if layers.pilot is not None:
            states, embeddings, layout = layers.pilot
            layers = layers._replace(hidden_states=states, mask_embeddings=embeddings)
            of_pilot = layout.by_group(Predictions(*self._heads(layers, features)))
        return ModelPredictions(
            *predictions, transformer=output, padded_size=padded_size, pilot=of_pilot
        )

    def _heads(
        self, layers: TransformerOutput, features: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None, MaskSelector | None]:
        """Class logits, boxes and masks of all queries of some layers."""
        logits, boxes = self.box_head(
            layers.hidden_states, layers.reference_points, layers.box_logits
        )
        masks: MaskSelector | None = None
        if self.mask_head is not None:
            masks = self.mask_head(layers, features)
            if self.checkpoint_masks and self.training:
                masks = partial(checkpoint, masks, use_reentrant=False)
        return logits, boxes, masks

    def losses(
        self,
        predictions: ModelPredictions,
        features: dict[str, Tensor],
        targets: Sequence[ImageTarget],
    ) -> Losses:
        """Losses of all streams against the same targets.

        Args:
            predictions: of :meth:`predict` in training mode.
            features: the backbone maps it was given.
            targets: one for each of the B images.

        Returns:
            0-d losses, weighted; with two streams, one of each name for each stream, except
            ``loss_semantic``, since the backbone runs before the streams part.
        """
        streams = predictions.streams
        size = predictions.padded_size
        batch = TargetBatch(streams.expand_list(targets), size)
        pilot = predictions.transformer.pilot
        # Before the matcher, which may raise: all processes must take part in these sums.
        num_objects = count_objects(batch.targets, self.device)
        counts = ClassCounts()
        if self.sync_class_loss:
            counts = count_classes(
                batch,
                num_queries=predictions.logits.shape[2],
                num_piloted=0 if pilot is None else streams.num_streams * pilot.layout.num_objects,
                class_map=None if self.semantic_head is None else class_maps(targets, size),
                device=self.device,
            )
        matching = self.matcher(predictions, batch)._replace(class_counts=counts.matched)
        losses = self.criterion(predictions, batch, matching, num_objects)
        found = predictions.transformer.proposals
        if found is not None:
            proposals = Predictions(found.logits[None], found.boxes[None])
            objects = batch.of_one_class()
            assigned = self.matcher.of_proposals(proposals, objects)
            losses |= self.criterion.of_proposals(proposals, objects, assigned, num_objects)
        if predictions.pilot is not None and pilot is not None:
            pairs = pilot.layout.matching(predictions.pilot, batch)
            pairs = pairs._replace(class_counts=counts.piloted)
            losses |= self.criterion.of_pilot(
                predictions.pilot, batch, pairs, num_objects, pilot.layout.num_groups
            )
        metrics = matching_metrics(
            self.scoring,
            predictions,
            batch,
            matching,
            score_threshold=self.inference_options.panoptic.score_threshold,
        )
        pixel_losses = self._pixel_losses(features, targets, size, counts.pixels)
        return Losses({**streams.sum_losses(losses), **pixel_losses}, metrics)

    @torch.no_grad()
    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results of each image, in the order of the inputs."""
        groups: dict[Any, list[int]] = {}
        for index, inputs in enumerate(batched_inputs):
            key = () if self.inference_options.pad_images else tuple(inputs["image"].shape)
            groups.setdefault(key, []).append(index)
        results: list[dict[str, Any]] = [{}] * len(batched_inputs)
        for indices in groups.values():
            group = [batched_inputs[index] for index in indices]
            for index, result in zip(indices, self._infer_batch(group), strict=True):
                results[index] = result
        return results

    def _infer_batch(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        images = self.preprocess(batched_inputs)
        features = self.backbone(images.tensor)
        predictions = self.predict(features, images.image_sizes, _spatial_size(images.tensor))
        decoded = self.scoring.decode(predictions.logits[-1].float())
        chosen, scores, labels = on_host(
            select_queries(decoded, self.inference_options, self.mask_head is not None),
            decoded.scores,
            decoded.labels,
        )
        _refuse_non_finite(scores, batched_inputs)
        masks = None
        needed = needed_masks(chosen, self.inference_options)
        if predictions.masks is not None:
            wanted = needed.nonzero().to(self.device, non_blocking=True)
            masks = predictions.last_masks(wanted[:, 0], wanted[:, 1])
        counts = needed.sum(-1).tolist()
        per_image_masks = [None] * len(counts) if masks is None else masks.split(counts)
        return [
            to_result(
                chosen.of_image(i),
                scores[i],
                labels[i],
                None if predictions.boxes is None else predictions.boxes[-1, i],
                per_image_masks[i],
                decoded.probabilities[i],
                padded_size=_spatial_size(images.tensor),
                image_size=images.image_sizes[i],
                output_size=_output_size(inputs, images.image_sizes[i]),
                options=self.inference_options,
            )
            for i, inputs in enumerate(batched_inputs)
        ]

    def _pixel_losses(
        self,
        features: dict[str, Tensor],
        targets: Sequence[ImageTarget],
        padded_size: tuple[int, int],
        num_pixels: Tensor | None,
    ) -> dict[str, Tensor]:
        if self.semantic_head is None:
            return {}
        class_map = class_maps(targets, padded_size)
        loss = pixel_class_loss(self.semantic_head(features), class_map, num_pixels)
        return {"loss_semantic": self.semantic_weight * loss}


def _refuse_non_finite(scores: Tensor, batched_inputs: Sequence[dict[str, Any]]) -> None:
    """Raise `NonFiniteError` unless the scores (B, Q), which are on the host, are numbers."""
    entries = [i for i, of_image in enumerate(scores) if not of_image.isfinite().all()]
    if entries:
        names = ", ".join(_name_of(batched_inputs[i]) for i in entries)
        raise NonFiniteError(
            f"the class scores of {names} are not finite: the weights are damaged, or too large "
            "for the precision of the evaluation (TEST.FAST)",
            entries,
        )


def _check_boxes_only(cfg: CfgNode, transformer: Transformer) -> None:
    """Refuse everything that contradicts ``MODEL.MASK_ON False``, in one error."""
    if not transformer.predicts_boxes:
        raise UserError(
            f"MODEL.DETR.TRANSFORMER_NAME {cfg.MODEL.DETR.TRANSFORMER_NAME} predicts no boxes: set "
            "MODEL.MASK_ON True, or choose another transformer"
        )
    if changes := boxes_only_changes(cfg):
        raise UserError(
            f"MODEL.MASK_ON is False, but other settings need masks: set {' '.join(changes)}, or "
            "MODEL.MASK_ON True"
        )


def _pad_to_largest(images: ImageList) -> ImageList:
    """Pad to the largest padded size of all processes, as in a batch of all their images."""
    height, width = _spatial_size(images.tensor)
    heights, widths = zip(*gather_objects((height, width)), strict=True)
    padding = (0, max(widths) - width, 0, max(heights) - height)
    return ImageList(F.pad(images.tensor, padding), images.image_sizes)


def _spatial_size(maps: Tensor) -> tuple[int, int]:
    height, width = maps.shape[-2:]
    return height, width


def _output_size(inputs: dict[str, Any], image_size: tuple[int, int]) -> tuple[int, int]:
    return inputs.get("height", image_size[0]), inputs.get("width", image_size[1])


def _name_of(inputs: dict[str, Any]) -> str:
    return str(inputs.get("file_name", inputs.get("image_id", "?")))
