"""The meta-architecture: backbone, transformer, heads, losses and post-processing, wired.

Shapes: B images, B' = streams * B, L decoder layers, Q queries, K classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..batchformer import StreamState
from .backbone import checkpoint_stages
from .build import (
    build_box_head,
    build_criterion,
    build_mask_head,
    build_matcher,
    build_scoring_from_config,
    build_semantic_head,
)
from .padding import BatchPadding
from .postprocessing.results import InferenceOptions, on_host, select_queries, to_result
from .set_prediction.criterion import SetCriterion, count_objects
from .set_prediction.mask_losses import pixel_class_loss
from .set_prediction.matcher import HungarianMatcher, NonFiniteCostError
from .set_prediction.scoring import Scoring
from .set_prediction.targets import ImageTarget, class_maps, of_one_class, to_target
from .transformer import Transformer, TransformerOutput, build_transformer


class Predictions(NamedTuple):
    """Raw predictions of a batch.

    Attributes:
        logits: (L, B', Q, num_outputs) class logits.
        boxes: (L, B', Q, 4) cxcywh in 0 to 1, float32.
        transformer: what the transformer returned.
    """

    logits: Tensor
    boxes: Tensor
    transformer: TransformerOutput

    @property
    def streams(self) -> StreamState:
        """The streams along B'."""
        return self.transformer.streams


@META_ARCH_REGISTRY.register()
class PanopticDETR(nn.Module):
    """A DETR-style model for boxes, and for panoptic segmentation when it has a mask head.

    With a BatchFormerV2 hook in its transformer it trains in two streams; in evaluation the hook
    does nothing and the model is the plain one.

    Attributes:
        training_metrics: detached 0-d tensors of the last training step that are no losses.

    Args:
        backbone: a Detectron2 backbone.
        transformer: one of the TRANSFORMER registry.
        box_head: classes and boxes from query states.
        mask_head: masks from query states, or None for boxes alone.
        mask_features: the backbone maps the mask head mixes in, coarse to fine.
        scoring: the meaning of the class logits.
        matcher: assigns queries to objects.
        criterion: the losses.
        inference_options: what to return in evaluation.
        pixel_mean: of each channel, in the order of the input image.
        pixel_std: of each channel.
        semantic_head: classes of pixels in training, or None.
        semantic_weight: weight of each of its losses.
        deep_supervision: losses on all decoder layers instead of the last alone.
        freeze_detr: train the mask head alone.
        recompute_masks: in training, run the mask head again in the backward pass instead of
            keeping what it computed.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        transformer: Transformer,
        box_head: nn.Module,
        mask_head: nn.Module | None,
        mask_features: Sequence[str],
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
        recompute_masks: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.transformer = transformer
        self.box_head = box_head
        self.mask_head = mask_head
        self.mask_features = tuple(mask_features)
        self.semantic_head = semantic_head
        self.semantic_weight = semantic_weight
        self.scoring = scoring
        self.matcher = matcher
        self.criterion = criterion
        self.inference_options = inference_options
        self.deep_supervision = deep_supervision
        self.freeze_detr = freeze_detr
        self.recompute_masks = recompute_masks
        self.training_metrics: dict[str, Tensor] = {}
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer(
            "pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        if freeze_detr:
            self._freeze_all_but_mask_head()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts that the config names."""
        backbone = build_backbone(cfg)
        if "backbone" in cfg.MODEL.ACTIVATION_CHECKPOINTING:
            checkpoint_stages(backbone)
        shapes = backbone.output_shape()
        scoring = build_scoring_from_config(cfg)
        return {
            "backbone": backbone,
            "transformer": build_transformer(cfg, shapes),
            "box_head": build_box_head(cfg, scoring),
            "mask_head": build_mask_head(cfg, shapes) if cfg.MODEL.MASK_ON else None,
            "mask_features": cfg.MODEL.MASK_HEAD.IN_FEATURES if cfg.MODEL.MASK_ON else (),
            "scoring": scoring,
            "matcher": build_matcher(cfg, scoring),
            "criterion": build_criterion(cfg, scoring),
            "inference_options": InferenceOptions.from_config(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "semantic_head": (
                build_semantic_head(cfg, shapes) if cfg.MODEL.SEMANTIC_AUX.ENABLED else None
            ),
            "semantic_weight": cfg.MODEL.SEMANTIC_AUX.WEIGHT,
            "deep_supervision": cfg.MODEL.DETR.DEEP_SUPERVISION,
            "freeze_detr": cfg.MODEL.MASK_HEAD.FREEZE_DETR,
            "recompute_masks": "mask_head" in cfg.MODEL.ACTIVATION_CHECKPOINTING,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is, and where inputs are moved to."""
        return self.pixel_mean.device

    def train(self, mode: bool = True) -> "PanopticDETR":
        """As usual, but a frozen backbone keeps the statistics of its batch norms."""
        super().train(mode)
        if self.freeze_detr:
            self.backbone.eval()
        return self

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Train or infer on a batch in Detectron2's format.

        Args:
            batched_inputs: one dict an image: ``image`` (C, H, W); in training ``instances`` with
                ``gt_classes`` and ``gt_boxes``, and ``segment_map`` (H, W) for masks; in evaluation
                optionally ``height`` and ``width`` of the output.

        Returns:
            In training a dict of 0-d losses whose sum is the total. In evaluation a list of
            dicts with ``instances`` and, given a mask head, ``panoptic_seg``: an int32 map at
            the output size (0 is void) and its segments.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess(batched_inputs)
        features = self.backbone(images.tensor)
        predictions = self.predict(features, images.image_sizes, _spatial_size(images.tensor))
        with_masks = self.mask_head is not None
        targets = [to_target(inputs, self.device, with_masks) for inputs in batched_inputs]
        try:
            return self.losses(predictions, features, targets)
        except NonFiniteCostError as error:
            names = [_name_of(batched_inputs[i % len(batched_inputs)]) for i in error.images]
            raise FloatingPointError(
                f"matching cost is not finite (terms: {', '.join(error.terms)}) for images "
                f"{', '.join(dict.fromkeys(names))}"
            ) from error

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Move images to the device, normalise and pad them to one size."""
        images = [inputs["image"].to(self.device, non_blocking=True) for inputs in batched_inputs]
        return ImageList.from_tensors(
            [(image - self.pixel_mean) / self.pixel_std for image in images],
            self.backbone.size_divisibility,
        )

    def predict(
        self,
        features: dict[str, Tensor],
        image_sizes: Sequence[tuple[int, int]],
        padded_size: tuple[int, int],
    ) -> Predictions:
        """Classes and boxes of all queries.

        Args:
            features: backbone maps (B, C_i, H_i, W_i) by name.
            image_sizes: (height, width) of each image before padding.
            padded_size: (height, width) of the batch.
        """
        # Numbers, which they are not while the model is traced.
        sizes = [(int(height), int(width)) for height, width in image_sizes]
        padding = BatchPadding(sizes, padded_size)
        output = self.transformer(features, padding, self.box_head)
        first = 0 if self.training and self.deep_supervision else -1
        references = output.reference_points
        logits, boxes = self.box_head(
            output.hidden_states[first:],
            None if references is None else references[first:],
            None if output.box_logits is None else output.box_logits[first:],
        )
        return Predictions(logits, boxes, output)

    def predict_masks(
        self,
        predictions: Predictions,
        features: dict[str, Tensor],
        image_index: Tensor,
        query_index: Tensor,
    ) -> Tensor:
        """(K, h, w) mask logits of K chosen queries; see :class:`MaskHead`."""
        assert self.mask_head is not None
        maps = [features[name] for name in self.mask_features]
        return self.mask_head(predictions.transformer, maps, image_index, query_index)

    def losses(
        self,
        predictions: Predictions,
        features: dict[str, Tensor],
        targets: Sequence[ImageTarget],
    ) -> dict[str, Tensor]:
        """Losses of all streams against the same targets.

        Args:
            predictions: of :meth:`predict` in training mode.
            features: the backbone maps it was given.
            targets: one for each of the B images.

        Returns:
            0-d losses, weighted; with two streams, one of each name for each stream, but for
            ``loss_semantic``: the backbone runs before the streams part.
        """
        streams = predictions.streams
        pixel_losses = self._pixel_losses(features, targets)
        targets = streams.expand_list(targets)
        matching = self.matcher(predictions.logits, predictions.boxes, targets)
        num_objects = count_objects(targets, self.device)
        losses = self.criterion.box_losses(
            predictions.logits, predictions.boxes, targets, matching, num_objects
        )
        proposals = predictions.transformer.proposals
        if proposals is not None:
            logits, boxes = proposals.logits[None], proposals.boxes[None]
            objects = of_one_class(targets)
            found = self.matcher(logits, boxes, objects)
            losses.update(
                self.criterion.box_losses(logits, boxes, objects, found, num_objects, suffix="_enc")
            )
        if self.mask_head is not None:
            last = matching.of_layer(-1)
            inputs = (predictions, features, last.image, last.query)
            if self.recompute_masks:
                masks = checkpoint(self.predict_masks, *inputs, use_reentrant=False)
            else:
                masks = self.predict_masks(*inputs)
            losses.update(self.criterion.mask_losses(masks, targets, last, num_objects))
        self.training_metrics = self.criterion.metrics(predictions.logits, targets, matching)
        return {**streams.sum_losses(losses), **pixel_losses}

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
        masks = None
        if self.mask_head is not None:
            wanted = chosen.any_use.nonzero().to(self.device, non_blocking=True)
            masks = self.predict_masks(predictions, features, wanted[:, 0], wanted[:, 1])
        counts = chosen.any_use.sum(-1).tolist()
        per_image_masks = [None] * len(counts) if masks is None else masks.split(counts)
        return [
            to_result(
                chosen.of_image(i),
                scores[i],
                labels[i],
                predictions.boxes[-1, i],
                per_image_masks[i],
                padded_size=_spatial_size(images.tensor),
                image_size=images.image_sizes[i],
                output_size=_output_size(inputs, images.image_sizes[i]),
                options=self.inference_options,
            )
            for i, inputs in enumerate(batched_inputs)
        ]

    def _pixel_losses(
        self, features: dict[str, Tensor], targets: Sequence[ImageTarget]
    ) -> dict[str, Tensor]:
        if self.semantic_head is None:
            return {}
        class_map = class_maps(targets)
        losses = [pixel_class_loss(x, class_map) for x in self.semantic_head(features)]
        return {"loss_semantic": self.semantic_weight * torch.stack(losses).sum()}

    def _freeze_all_but_mask_head(self) -> None:
        if self.mask_head is None:
            raise ValueError("MODEL.MASK_HEAD.FREEZE_DETR needs a mask head: set MODEL.MASK_ON")
        self.requires_grad_(False)
        self.mask_head.requires_grad_(True)


def _spatial_size(maps: Tensor) -> tuple[int, int]:
    height, width = maps.shape[-2:]
    return height, width


def _output_size(inputs: dict[str, Any], image_size: tuple[int, int]) -> tuple[int, int]:
    return inputs.get("height", image_size[0]), inputs.get("width", image_size[1])


def _name_of(inputs: dict[str, Any]) -> str:
    return str(inputs.get("file_name", inputs.get("image_id", "?")))
