"""Describes mismatches between a checkpoint and a model."""

import re
from collections.abc import Sequence
from typing import NamedTuple

_SHOWN = 5
_BLOCK = "batchformer"
_MASK_HEAD = "mask_head."
_PILOT = "transformer.pilot."
# Parameters whose shape depends on the number of classes; a box head may exist per layer.
_CLASS_HEADS = re.compile(
    r"box_head\.(layers\.\d+\.)?class_embed\.|semantic_head\.|vit\.model\.head\."
    r"|transformer\.pilot\.label_embed\."
)
# Parameters with one row per query: positions, and the contents that some decoders learn.
_QUERIES = ("query_embed", "query_feat")


class Mismatch(NamedTuple):
    """Differences between the keys of a checkpoint and those of a model.

    Attributes:
        missing: keys in the model only.
        unexpected: keys in the checkpoint only.
        wrong_shape: key, shape in the checkpoint, shape in the model.
    """

    missing: list[str]
    unexpected: list[str]
    wrong_shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


def describe(mismatch: Mismatch, path: str, *, training: bool) -> str:
    """Return one line with the differences and the remedy.

    Args:
        mismatch: not empty.
        path: the path of the checkpoint.
        training: whether the weights are a starting point of training.
    """
    found = []
    if mismatch.missing:
        found.append(f"{len(mismatch.missing)} keys missing ({first(mismatch.missing)})")
    if mismatch.unexpected:
        found.append(f"{len(mismatch.unexpected)} keys unknown ({first(mismatch.unexpected)})")
    if mismatch.wrong_shape:
        shapes = [f"{k} {theirs} instead of {ours}" for k, theirs, ours in mismatch.wrong_shape]
        found.append(f"{len(shapes)} shapes differ ({first(shapes)})")
    remedy = _remedy(mismatch, path, training=training)
    return f"checkpoint {path} does not fit the model: {'; '.join(found)}. {remedy}"


def _remedy(mismatch: Mismatch, path: str, *, training: bool) -> str:
    if mismatch.unexpected and all(map(is_mask_head, mismatch.unexpected)):
        return "It has a mask head, the model does not: set MODEL.MASK_ON True"
    if mismatch.missing and all(map(is_mask_head, mismatch.missing)):
        return "It has no mask head: set MODEL.MASK_ON False, or train the head first"
    if mismatch.wrong_shape and not mismatch.missing and not mismatch.unexpected:
        return _remedy_for_shapes(mismatch, path, training=training)
    remedy = "Use the config of its training, usually config.yaml in the same folder"
    if mismatch.missing and mismatch.unexpected:
        remedy += "; weights of another project need tools/convert_checkpoint.py first"
    return remedy


def _remedy_for_shapes(mismatch: Mismatch, path: str, *, training: bool) -> str:
    names = [name for name, _, _ in mismatch.wrong_shape]
    if all(map(is_class_head, names)):
        if training:
            return f"It was trained on other classes: {start_from(path)}"
        return "It was trained on other classes: use the data set of its training"
    if all(any(part in name for part in _QUERIES) for name in names):
        queries = mismatch.wrong_shape[0][1][:1]
        if all(theirs[:1] == queries for _, theirs, _ in mismatch.wrong_shape):
            return f"It has {queries[0]} queries: set MODEL.DETR.NUM_OBJECT_QUERIES {queries[0]}"
    return (
        "The sizes of the model (MODEL.DETR.NUM_CLASSES, from the data set, NUM_OBJECT_QUERIES, "
        "HIDDEN_DIM, ...; MODEL.CLASSIFIER.IMAGE_SIZE, TIMM_KWARGS) must be those of its training"
    )


def start_from(path: str) -> str:
    """Return the remedy for training on other classes."""
    return f"to start from everything except the rows of new classes, use --init-from {path}"


def first(items: Sequence[str]) -> str:
    """Join the first few names for a message."""
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")


def without(keys: Sequence[str], dropped: Sequence[str]) -> list[str]:
    """Return the keys that are not in ``dropped``, in order."""
    gone = set(dropped)
    return [k for k in keys if k not in gone]


def is_block(key: str) -> bool:
    """Whether a weight belongs to a BatchFormer block, which evaluation does not use."""
    return _BLOCK in key


def is_pilot(key: str) -> bool:
    """Whether a weight belongs to mask-piloted training, which evaluation does not use."""
    return key.startswith(_PILOT)


def is_mask_head(key: str) -> bool:
    """Whether a weight belongs to the mask head."""
    return key.startswith(_MASK_HEAD)


def is_class_head(key: str) -> bool:
    """Whether the shape of a weight depends on the number of classes."""
    return _CLASS_HEADS.match(key) is not None
