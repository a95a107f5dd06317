"""The parts of an image classifier from ``MODEL.CLASSIFIER``."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from ...errors import UserError
from ..insertion import build_hook
from ..timm_models import check_pixel_statistics, create_timm_model
from .mixing import BatchMixing
from .vision_transformer import HookedVisionTransformer, is_plain_vision_transformer

_NODE = "MODEL.CLASSIFIER"
# Arguments of timm that follow from other keys of the config.
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
        UserError: timm is not installed or does not know the model, it is no plain
            VisionTransformer, its arguments do not suit it, its weights cannot be had or want other
            images, a block is to sit after a layer that does not exist, or parts that are not there
            are to be run again in the backward pass.
    """
    other_parts = [part for part in cfg.MODEL.ACTIVATION_CHECKPOINTING if part != "encoder"]
    if other_parts:
        raise UserError(
            f"MODEL.ACTIVATION_CHECKPOINTING names {other_parts[0]!r}; an image classifier has "
            "nothing but an encoder"
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
    """Build mixup and CutMix as ``MODEL.CLASSIFIER`` wants them; None: neither.

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
        reason = " ".join(str(error).split())
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UserError(
            f"timm cannot build {_NODE}.NAME {node.NAME} with {shown}: {reason}"
        ) from error
    if not is_plain_vision_transformer(model):
        raise UserError(
            f"{_NODE}.NAME {node.NAME} is a {type(model).__name__}, which is no plain "
            "VisionTransformer (distilled ones are none): take one such as deit_small_patch16_224 "
            "or vit_small_patch16_224"
        )
    if node.PRETRAINED:
        check_pixel_statistics(model, node.NAME, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    return model


def _arguments(pairs: Sequence[Any]) -> dict[str, Any]:
    """Read TIMM_KWARGS."""
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
