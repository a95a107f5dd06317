"""What of a checkpoint does not fit a model, in words."""

import re
from collections.abc import Sequence
from typing import NamedTuple

_SHOWN = 5
_BLOCK = "batchformer"
_MASK_HEAD = "mask_head."
# Everything whose shape follows from the number of classes; some models have a box head a layer.
_CLASS_HEADS = re.compile(
    r"box_head\.(layers\.\d+\.)?class_embed\.|semantic_head\.|vit\.model\.head\."
)
_QUERIES = "query_embed"


class Misfit(NamedTuple):
    """Keys of a checkpoint and of a model that do not go together.

    Attributes:
        missing: the model has them, the checkpoint has not.
        unexpected: the other way round.
        wrong_shape: name, shape in the checkpoint, shape in the model.
    """

    missing: list[str]
    unexpected: list[str]
    wrong_shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


def describe(misfit: Misfit, path: str, *, training: bool) -> str:
    """Return one line: what does not fit, and the remedy."""
    found = []
    if misfit.missing:
        found.append(f"{len(misfit.missing)} keys missing ({first(misfit.missing)})")
    if misfit.unexpected:
        found.append(f"{len(misfit.unexpected)} keys unknown ({first(misfit.unexpected)})")
    if misfit.wrong_shape:
        shapes = [f"{k} {theirs} instead of {ours}" for k, theirs, ours in misfit.wrong_shape]
        found.append(f"{len(shapes)} shapes differ ({first(shapes)})")
    remedy = _remedy(misfit, path, training=training)
    return f"checkpoint {path} does not fit the model: {'; '.join(found)}. {remedy}"


def _remedy(misfit: Misfit, path: str, *, training: bool) -> str:
    if misfit.unexpected and all(map(is_mask_head, misfit.unexpected)):
        return "It has a mask head and the model has none: set MODEL.MASK_ON True"
    if misfit.missing and all(map(is_mask_head, misfit.missing)):
        return "It has no mask head: set MODEL.MASK_ON False, or train the head first"
    if misfit.wrong_shape and not misfit.missing and not misfit.unexpected:
        return _remedy_for_shapes(misfit, path, training=training)
    remedy = "Use the config it was trained with, usually config.yaml beside it"
    if misfit.missing and misfit.unexpected:
        remedy += "; weights of another project need tools/convert_checkpoint.py first"
    return remedy


def _remedy_for_shapes(misfit: Misfit, path: str, *, training: bool) -> str:
    names = [name for name, _, _ in misfit.wrong_shape]
    if all(map(is_class_head, names)):
        if training:
            return f"It was trained on other classes: {start_from(path)}"
        return "It was trained on other classes: use the data set it was trained on"
    if all(_QUERIES in name for name in names):
        queries = misfit.wrong_shape[0][1][:1]
        if all(theirs[:1] == queries for _, theirs, _ in misfit.wrong_shape):
            return f"It has {queries[0]} queries: set MODEL.DETR.NUM_OBJECT_QUERIES {queries[0]}"
    return (
        "Sizes of the model (MODEL.DETR.NUM_CLASSES, which the data set decides, "
        "NUM_OBJECT_QUERIES, HIDDEN_DIM, ...; MODEL.CLASSIFIER.IMAGE_SIZE, TIMM_KWARGS) must be "
        "those of its training"
    )


def start_from(path: str) -> str:
    """Return the remedy for a training on other classes."""
    return f"to start from all of it but the class head, give --init-from {path}"


def first(items: Sequence[str]) -> str:
    """Return the first few of many names, for a line."""
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")


def without(keys: Sequence[str], dropped: Sequence[str]) -> list[str]:
    """Return the keys that are not dropped, in order."""
    gone = set(dropped)
    return [k for k in keys if k not in gone]


def is_block(key: str) -> bool:
    """Whether a weight belongs to a BatchFormer block, which evaluation does without."""
    return _BLOCK in key


def is_mask_head(key: str) -> bool:
    """Whether a weight belongs to the mask head."""
    return key.startswith(_MASK_HEAD)


def is_class_head(key: str) -> bool:
    """Whether a weight's shape follows from the number of classes."""
    return _CLASS_HEADS.match(key) is not None
