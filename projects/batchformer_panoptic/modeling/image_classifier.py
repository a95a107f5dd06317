"""Image classification with BatchFormerV2: a vision Transformer of timm, mixing, and the loss.

Shapes: B images, B' = streams * B, K classes.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..batchformer import BatchFormerHook, IdentityHook, Losses, StreamState, encode
from ..errors import UserError, one_line
from .backbone.timm import check_pixel_statistics, create_timm_model, import_timm
from .transformer.base import build_hook

# --- the vision Transformer ----------------------------------------------------------------------


class HookedVisionTransformer(nn.Module):
    """timm's VisionTransformer, images to class logits, with BatchFormerV2's hook after each block.

    Everything before the first insertion (class token, position embedding, blocks) is computed
    once; everything after it (blocks, norm, head) serves both streams. All tokens, including the
    class token, go through the batch attention (arXiv 2204.01254, section 3.3 and table of DeiT).

    timm's ``model.set_grad_checkpointing()`` turns on activation checkpointing of the blocks.

    Parameter names are timm's with the prefix ``model.``, and ``batchformer.`` for the hook.

    Args:
        model: a ``timm.models.VisionTransformer``; see :func:`is_plain_vision_transformer`.
        hook: acts after block ``i`` (from 0) as after an encoder layer.
    """

    def __init__(self, model: Any, hook: BatchFormerHook | IdentityHook) -> None:
        super().__init__()
        self.model = model
        self.batchformer = hook

    @property
    def num_classes(self) -> int:
        """Number of logits K."""
        return int(self.model.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, StreamState]:
        """Classify a batch.

        Args:
            images: (B, C, H, W), normalised, of the size the model was built for.

        Returns:
            Logits (B', K), and the streams along B'.
        """
        model = self.model
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        blocks: Iterable[Callable[..., Tensor]] = model.blocks
        if model.grad_checkpointing and torch.is_grad_enabled():
            blocks = [partial(checkpoint, block, use_reentrant=False) for block in model.blocks]
        tokens, streams, _ = encode(blocks, self.batchformer, tokens)
        return model.forward_head(model.norm(tokens)), streams


def is_plain_vision_transformer(model: Any) -> bool:
    """Whether a timm model has the forward pass that :class:`HookedVisionTransformer` reproduces.

    Subclasses with another forward pass (distilled DeiT with its second token and head) and similar
    models (EVA, relative positions) do not.
    """
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(model, VisionTransformer) and all(
        getattr(type(model), name) is getattr(VisionTransformer, name)
        for name in ("forward", "forward_features", "forward_head", "_pos_embed")
    )


# --- mixup and CutMix ----------------------------------------------------------------------------


class BatchMixing:
    """Mixup or CutMix of a batch, by timm's ``Mixup``, with one mixing ratio for all images.

    Image ``i`` is mixed with image ``B - 1 - i`` (mixup: arXiv 1710.09412, CutMix: 1905.04899).
    Random numbers are drawn on the host, from numpy's global generator: the device is not
    synchronised. The training loop seeds the generator from (seed, iteration, rank), so a resumed
    run mixes the same way.

    Args:
        mixup_alpha: parameter of the Beta distribution of mixup's ratio. 0: no mixup.
        cutmix_alpha: the same for CutMix. At least one of the two is above 0.
        prob: probability that a batch is mixed.
        switch_prob: probability of CutMix instead of mixup, where both are on.
        num_classes: classes K.

    Raises:
        UserError: timm is not installed.
    """

    def __init__(
        self,
        *,
        mixup_alpha: float,
        cutmix_alpha: float,
        prob: float,
        switch_prob: float,
        num_classes: int,
    ) -> None:
        import_timm()
        from timm.data import Mixup

        self._mixup = Mixup(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            prob=prob,
            switch_prob=switch_prob,
            label_smoothing=0.0,  # the loss smooths targets, mixed or not
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: (B, C, H, W) floating point; overwritten.
            labels: (B,) int64 in [0, K).

        Returns:
            The mixed images, and targets (B, K) float32 whose rows sum to 1.

        Raises:
            UserError: an odd number of images, which cannot be paired.
        """
        if len(images) % 2:
            raise UserError(
                f"mixup and CutMix mix pairs, and a process has {len(images)} images: use an even "
                "number of images for each process, or set mixup_alpha and cutmix_alpha to 0"
            )
        mixed, targets = self._mixup(images, labels)
        return mixed, targets


# --- the meta-architecture -----------------------------------------------------------------------


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """The meta-architecture of image classification: a vision Transformer, mixing and the loss.

    With a BatchFormerV2 hook it trains in two streams that share the targets; in evaluation it is
    identical to the plain model.

    Args:
        vit: images to logits.
        mixing: mixup and CutMix in training, or None.
        label_smoothing: share of a target, in [0, 1), that is spread evenly over all classes.
        image_size: height and width of the images.
        pixel_mean: the mean of each channel, in the order of the input image.
        pixel_std: the standard deviation of each channel.
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
        """Device of the model, to which inputs are moved."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Train or infer on a batch.

        Args:
            batched_inputs: one dict per image: ``image`` (C, H, W), 0 to 255, uint8 or float; in
                training ``label``, an integer in [0, K).

        Returns:
            In training a dict of 0-d losses whose sum is the mean over all B' entries. In
            evaluation a list of dicts with ``class_logits`` (K,) float32, in the order of the
            inputs.

        Raises:
            UserError: an image of another size, a label out of range, or an odd number of images
                to mix.
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
        """Stack images to one normalised batch (B, C, H, W) float32 on the device."""
        wanted = (len(self.pixel_mean), self.image_size, self.image_size)
        for inputs in batched_inputs:
            if tuple(inputs["image"].shape) != wanted:
                raise UserError(
                    f"image {inputs.get('file_name', '?')} is of shape "
                    f"{tuple(inputs['image'].shape)}, and the model takes {wanted}: resize it, or "
                    "build the model with another image_size and pixel_mean"
                )
        images = torch.stack([inputs["image"] for inputs in batched_inputs])
        return (images.to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std

    def losses(self, logits: Tensor, streams: StreamState, targets: Tensor) -> Losses:
        """Cross-entropy of all streams against the same targets.

        Args:
            logits: (B', K).
            streams: along B'.
            targets: (B,) int64 labels of the B images, or (B, K) float32 shares of the classes.

        Returns:
            ``loss_class``, or one for each stream; their sum is the mean over B'. ``metrics`` has
            the top-1 accuracy of the original stream, unless labels are mixed.
        """
        logits = logits.float()
        each = F.cross_entropy(
            logits,
            streams.expand(targets),
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        metrics: dict[str, Tensor] = {}
        if targets.dim() == 1:  # a mixed image has no single class
            correct = streams.split(logits)[0].argmax(dim=-1) == targets
            metrics["top1"] = 100.0 * correct.float().mean()
        return Losses(streams.sum_losses({"loss_class": each / len(logits)}), metrics)

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
                    f"the model has {self.vit.num_classes} classes: build it with more num_classes"
                )
        labels = torch.tensor([inputs["label"] for inputs in batched_inputs])
        return labels.to(self.device, non_blocking=True)


# --- building ------------------------------------------------------------------------------------


_NODE = "MODEL.CLASSIFIER"
# Arguments of timm that other config keys set.
_KEY_OF_ARGUMENT = {
    "num_classes": f"{_NODE}.NUM_CLASSES",
    "img_size": f"{_NODE}.IMAGE_SIZE",
    "drop_path_rate": f"{_NODE}.DROP_PATH",
    "in_chans": "the length of MODEL.PIXEL_MEAN",
    "pretrained": f"{_NODE}.PRETRAINED",
}


def build_vision_transformer(cfg: CfgNode) -> HookedVisionTransformer:
    """Build the model ``MODEL.CLASSIFIER.NAME`` of timm with the hook of ``MODEL.BATCHFORMER``.

    Raises:
        UserError: timm is not installed or does not have the model, the model is not a plain
            VisionTransformer or does not accept the arguments, its weights are not available or
            need other pixel statistics, a block would follow a layer that does not exist, or
            activation checkpointing names a part that the model does not have.
    """
    other_parts = [part for part in cfg.MODEL.ACTIVATION_CHECKPOINTING if part != "encoder"]
    if other_parts:
        raise UserError(
            f"MODEL.ACTIVATION_CHECKPOINTING names {other_parts[0]!r}; an image classifier has "
            "an encoder only"
        )
    model = _create(cfg)
    model.set_grad_checkpointing("encoder" in cfg.MODEL.ACTIVATION_CHECKPOINTING)
    num_layers = len(model.blocks)
    hook = build_hook(
        cfg,
        embed_dim=model.embed_dim,
        num_layers=num_layers,
        layers_are=f"{_NODE}.NAME {cfg.MODEL.CLASSIFIER.NAME} has {num_layers} of them",
    )
    return HookedVisionTransformer(model, hook)


def build_batch_mixing(cfg: CfgNode) -> BatchMixing | None:
    """Build the mixup and CutMix of ``MODEL.CLASSIFIER``; None if both are off.

    Raises:
        UserError: a number out of its range, or timm is not installed.
    """
    node = cfg.MODEL.CLASSIFIER
    for key in ("MIXUP_ALPHA", "CUTMIX_ALPHA"):
        if node[key] < 0:
            raise UserError(f"{_NODE}.{key} must be 0 (off) or above, not {node[key]}")
    for key in ("MIXUP_PROB", "SWITCH_PROB"):
        if not 0 <= node[key] <= 1:
            raise UserError(f"{_NODE}.{key} must be from 0 to 1, not {node[key]}")
    if node.MIXUP_ALPHA == node.CUTMIX_ALPHA == 0:
        return None
    return BatchMixing(
        mixup_alpha=node.MIXUP_ALPHA,
        cutmix_alpha=node.CUTMIX_ALPHA,
        prob=node.MIXUP_PROB,
        switch_prob=node.SWITCH_PROB,
        num_classes=node.NUM_CLASSES,
    )


def _create(cfg: CfgNode) -> Any:
    node = cfg.MODEL.CLASSIFIER
    if node.NUM_CLASSES < 1:
        raise UserError(
            f"{_NODE}.NUM_CLASSES is {node.NUM_CLASSES}; set it, or call "
            "batchformer_panoptic.data.setup_datasets(cfg) to derive it from the data sets"
        )
    if node.PRETRAINED and cfg.INPUT.FORMAT != "RGB":
        raise UserError(
            f"timm's weights of {node.NAME} read RGB: set INPUT.FORMAT RGB, not {cfg.INPUT.FORMAT}"
        )
    arguments = {
        **_arguments(node.TIMM_KWARGS),
        "num_classes": node.NUM_CLASSES,
        "img_size": node.IMAGE_SIZE,
        "drop_path_rate": node.DROP_PATH,
        "in_chans": len(cfg.MODEL.PIXEL_MEAN),
    }
    try:
        model = create_timm_model(node.NAME, node=_NODE, pretrained=node.PRETRAINED, **arguments)
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError, AttributeError, RuntimeError) as error:
        reason = one_line(error)
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UserError(
            f"timm cannot build {_NODE}.NAME {node.NAME} with {shown}: {reason}"
        ) from error
    if not is_plain_vision_transformer(model):
        raise UserError(
            f"{_NODE}.NAME {node.NAME} is a {type(model).__name__}, not a plain "
            "VisionTransformer (distilled models are not): use one such as deit_small_patch16_224 "
            "or vit_small_patch16_224"
        )
    if node.PRETRAINED:
        check_pixel_statistics(model, node.NAME, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    return model


def _arguments(pairs: Sequence[Any]) -> dict[str, Any]:
    """Convert the pairs of TIMM_KWARGS to keyword arguments."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UserError(
                f"{_NODE}.TIMM_KWARGS: {pair!r} is not a pair of a name and a value, such as "
                '["embed_dim", 64]'
            )
        name, value = pair
        if name in _KEY_OF_ARGUMENT:
            raise UserError(f"{_NODE}.TIMM_KWARGS names {name}: that is {_KEY_OF_ARGUMENT[name]}")
        if name in arguments:
            raise UserError(f"{_NODE}.TIMM_KWARGS names {name} twice")
        arguments[name] = value
    return arguments
