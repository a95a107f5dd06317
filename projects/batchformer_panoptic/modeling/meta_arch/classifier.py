"""The meta-architecture of image classification: vision Transformer, mixing and loss, wired.

Shapes: B images, B' = streams * B, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from ...batchformer import StreamState
from ...errors import UserError
from ..classification import (
    BatchMixing,
    HookedVisionTransformer,
    build_batch_mixing,
    build_vision_transformer,
)


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """One label for each image, with a vision Transformer.

    With a BatchFormerV2 hook it trains in two streams that share the targets; in evaluation the
    hook does nothing and the model is the plain one.

    Attributes:
        training_metrics: detached 0-d tensors of the last training step that are no losses.

    Args:
        vit: images to logits.
        mixing: mixup and CutMix in training, or None.
        label_smoothing: share of a target, below 1, that is spread evenly over all classes.
        image_size: height and width of the images.
        pixel_mean: of each channel, in the order of the input image.
        pixel_std: of each channel.
    """

    @configurable
    def __init__(
        self,
        *,
        vit: HookedVisionTransformer,
        mixing: BatchMixing | None,
        label_smoothing: float,
        image_size: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0, below 1, not {label_smoothing}")
        self.vit = vit
        self.mixing = mixing
        self.label_smoothing = label_smoothing
        self.image_size = image_size
        self.training_metrics: dict[str, Tensor] = {}
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer(
            "pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts that the config names."""
        node = cfg.MODEL.CLASSIFIER
        return {
            "vit": build_vision_transformer(cfg),
            "mixing": build_batch_mixing(cfg),
            "label_smoothing": node.LABEL_SMOOTHING,
            "image_size": node.IMAGE_SIZE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is, and where inputs are moved to."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Train or infer on a batch.

        Args:
            batched_inputs: one dict an image: ``image`` (C, H, W), 0 to 255, uint8 or float; in
                training ``label``, an integer in [0, K).

        Returns:
            In training a dict of 0-d losses whose sum is the mean over all B' entries. In
            evaluation a list of dicts with ``class_logits`` (K,) float32, in the order of the
            inputs.

        Raises:
            UserError: an image of another size, a label out of range, or images without pairs to
                be mixed.
        """
        images = self.preprocess(batched_inputs)
        if not self.training:
            return self.inference(images)
        targets = self._labels(batched_inputs)
        if self.mixing is not None:
            images, targets = self.mixing(images, targets)
        logits, streams = self.vit(images)
        return self.losses(logits, streams, targets)

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Images as one normalised batch (B, C, H, W) float32 on the device."""
        wanted = (len(self.pixel_mean), self.image_size, self.image_size)
        for inputs in batched_inputs:
            if tuple(inputs["image"].shape) != wanted:
                raise UserError(
                    f"image {inputs.get('file_name', '?')} is of shape "
                    f"{tuple(inputs['image'].shape)}, and the model takes {wanted}: see "
                    "MODEL.CLASSIFIER.IMAGE_SIZE and INPUT.FORMAT"
                )
        images = torch.stack([inputs["image"] for inputs in batched_inputs])
        return (images.to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std

    def losses(self, logits: Tensor, streams: StreamState, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of all streams against the same targets.

        Args:
            logits: (B', K).
            streams: along B'.
            targets: of the B images: (B,) int64 labels, or (B, K) float32 shares of the classes.

        Returns:
            ``loss_class``, or one for each stream; their sum is the mean over B'.
        """
        logits = logits.float()
        each = F.cross_entropy(
            logits,
            streams.expand(targets),
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        if targets.dim() == 1:  # a mixed image has no one class to be right about
            correct = streams.split(logits)[0].argmax(dim=-1) == targets
            self.training_metrics = {"top1": 100.0 * correct.float().mean()}
        return streams.sum_losses({"loss_class": each / len(logits)})

    @torch.no_grad()
    def inference(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Logits of each image of a normalised batch (B, C, H, W)."""
        logits, _ = self.vit(images)
        return [{"class_logits": one} for one in logits.float()]

    def _labels(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        for inputs in batched_inputs:
            if not 0 <= inputs["label"] < self.vit.num_classes:
                raise UserError(
                    f"image {inputs.get('file_name', '?')} has the label {inputs['label']}, and "
                    f"the model {self.vit.num_classes} classes: see MODEL.CLASSIFIER.NUM_CLASSES"
                )
        labels = torch.tensor([inputs["label"] for inputs in batched_inputs])
        return labels.to(self.device, non_blocking=True)
