"""Keys, shapes and settings of a complete DETR, derived from the weights themselves."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from torch import Tensor

from ...config import add_batchformer_panoptic_config
from ...errors import UserError, one_line
from ...modeling.transformer import build_transformer
from .core import BLOCKS, REMEDY, Shape, refuse_mismatch, wrong_shapes

_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
_STAGES = tuple(_STRIDES)
_ENCODER, _DECODER = "transformer.encoder.layers.", "transformer.decoder.layers."
_QUERIES = "transformer.query_embed.weight"
_FIRST_LINEAR = f"{_ENCODER}0.linear1.weight"
_BUFFERS = ("running_mean", "running_var")
# (blocks of each stage, whether they are bottlenecks): MODEL.RESNETS.DEPTH
_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}

SWIN_PROJECTION = "backbone.patch_embed.proj.weight"
_PATCH, _MLP_RATIO = 4, 4


class LayoutMismatch(NamedTuple):
    """Differences between a state dict and the layout of a complete model.

    Attributes:
        missing: names in the layout only.
        wrong_shape: from `wrong_shapes`.
        unexpected: names in the state dict only.
    """

    missing: list[str]
    wrong_shape: list[str]
    unexpected: list[str]


def compare_with_layout(
    model: Mapping[str, Tensor], transformer: Mapping[str, Shape] | None = None
) -> LayoutMismatch:
    """Compare a state dict in this project's names with the layout of a complete DETR.

    Args:
        model: the state dict.
        transformer: names and shapes of the transformer; None: DETR's.
    """
    # Without these sizes, nothing else can be compared.
    if absent := missing_sizes(model):
        return LayoutMismatch(absent, [], [])
    parts = _detr_transformer(model) if transformer is None else transformer.items()
    expected = dict([*resnet_layout(model), *parts, *_heads(model)])
    missing = [name for name in expected if name not in model]
    unexpected = [name for name in model if name not in expected]
    return LayoutMismatch(missing, wrong_shapes(model, expected), unexpected)


def transformer_layout(
    model: Mapping[str, Tensor], settings: Mapping[str, Any], subject: str
) -> dict[str, Shape]:
    """Names and shapes of a transformer of the registry, built without allocating weights.

    Args:
        model: weights in this project's names, without `missing_sizes`.
        settings: config keys besides the sizes that all transformers have.
        subject: the subject of the error message.

    Raises:
        UserError: no transformer has these sizes.
    """
    channels = {name: out_channels(model, name) or 1 for name in _STAGES}
    return built_transformer_layout({**transformer_settings(model), **settings}, channels, subject)


def built_transformer_layout(
    settings: Mapping[str, Any], channels: Mapping[str, int], subject: str
) -> dict[str, Shape]:
    """Names and shapes of the transformer that a config describes.

    Args:
        settings: config keys.
        channels: the channels of the backbone maps, res2 to res5.
        subject: the subject of the error message.

    Raises:
        UserError: no transformer has these sizes.
    """
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    shapes = {
        name: ShapeSpec(channels=channels[name], stride=stride) for name, stride in _STRIDES.items()
    }
    try:
        with torch.device("meta"):
            state = build_transformer(cfg, shapes).state_dict()
    except (AssertionError, ValueError) as error:
        sizes = ", ".join(f"{key} {value}" for key, value in settings.items())
        raise UserError(
            f"{subject}: no model has its sizes ({sizes}): {one_line(error)}"
        ) from error
    return {f"transformer.{name}": tuple(value.shape) for name, value in state.items()}


def settings_of(model: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config keys that follow from the shapes of a complete state dict."""
    settings: dict[str, Any] = {
        "MODEL.DETR.TRANSFORMER_NAME": "detr",
        "MODEL.DETR.SCORING": "softmax",
        **transformer_settings(model),
        **resnet_settings(model),
    }
    if has_masks(model):
        settings["MODEL.MASK_ON"] = True
        # Input of the mask head: the embedding, and one attention map per head.
        mixed = model["mask_head.convs.0.weight"].shape[0]
        settings["MODEL.DETR.NHEADS"] = mixed - settings["MODEL.DETR.HIDDEN_DIM"]
    return settings


def missing_sizes(model: Iterable[str]) -> list[str]:
    """Return the absent names from which the sizes of a transformer would be read."""
    names = set(model)
    return [name for name in (_QUERIES, _FIRST_LINEAR) if name not in names]


def transformer_settings(model: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config keys of the sizes that all transformers have; none may be missing."""
    num_queries, embed_dim = model[_QUERIES].shape
    return {
        "MODEL.DETR.NUM_OBJECT_QUERIES": num_queries,
        "MODEL.DETR.HIDDEN_DIM": embed_dim,
        "MODEL.DETR.DIM_FEEDFORWARD": model[_FIRST_LINEAR].shape[0],
        "MODEL.DETR.ENC_LAYERS": count_indices(model, _ENCODER),
        "MODEL.DETR.DEC_LAYERS": count_indices(model, _DECODER),
        "MODEL.DETR.PRE_NORM": has_pre_norm(model),
    }


def has_masks(model: Iterable[str]) -> bool:
    """Whether there is a mask head."""
    return any(name.startswith("mask_head.") for name in model)


def has_pre_norm(model: Iterable[str]) -> bool:
    """Whether layer norms come before attention: only such an encoder ends with a norm."""
    return any(name.startswith("transformer.encoder.norm.") for name in model)


def block_names(model: Iterable[str]) -> list[str]:
    """Names of the BatchFormer blocks: layer indices, or "shared"."""
    names = {name.removeprefix(BLOCKS).split(".")[0] for name in model if name.startswith(BLOCKS)}
    return sorted(names, key=lambda name: (len(name), name))


class ResNetShape(NamedTuple):
    """Sizes of a ResNet, stem to res5.

    Attributes:
        stem: output channels of the stem.
        widths: output channels of each stage.
        inner_widths: channels inside the blocks of each stage.
        depths: blocks of each stage.
        bottleneck: three convolutions per block instead of two.
    """

    stem: int
    widths: tuple[int, ...]
    inner_widths: tuple[int, ...]
    depths: tuple[int, ...]
    bottleneck: bool


def resnet_shape(model: Mapping[str, Tensor]) -> ResNetShape:
    """Sizes of a complete backbone."""
    bottleneck = "backbone.res2.0.conv3.weight" in model
    last = "conv3" if bottleneck else "conv2"
    return ResNetShape(
        stem=model["backbone.stem.conv1.weight"].shape[0],
        widths=tuple(model[f"backbone.{s}.0.{last}.weight"].shape[0] for s in _STAGES),
        inner_widths=tuple(model[f"backbone.{s}.0.conv1.weight"].shape[0] for s in _STAGES),
        depths=tuple(count_indices(model, f"backbone.{s}.") for s in _STAGES),
        bottleneck=bottleneck,
    )


def resnet_settings(model: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config keys of a complete ResNet."""
    shape = resnet_shape(model)
    settings: dict[str, Any] = {
        "MODEL.RESNETS.STEM_OUT_CHANNELS": shape.stem,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": shape.widths[0],
    }
    depth = _DEPTHS.get((shape.depths, shape.bottleneck))
    if depth is not None:
        settings["MODEL.RESNETS.DEPTH"] = depth
    if shape.bottleneck:
        width = model["backbone.res2.0.conv2.weight"].shape[1]
        settings["MODEL.RESNETS.WIDTH_PER_GROUP"] = width
        settings["MODEL.RESNETS.NUM_GROUPS"] = shape.inner_widths[0] // width
    return settings


def has_swin(model: Mapping[str, Tensor]) -> bool:
    """Whether the backbone is a Swin Transformer and not a ResNet."""
    return SWIN_PROJECTION in model


def swin_width(model: Mapping[str, Tensor]) -> int:
    """Channels of res2."""
    return model[SWIN_PROJECTION].shape[0]


def _swin_depths(model: Mapping[str, Tensor]) -> list[int]:
    return [count_indices(model, f"backbone.layers.{i}.blocks.") for i in range(len(_STAGES))]


def _swin_tables(model: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Shapes of the bias table in each stage: relative positions and heads."""
    tables = []
    for i in range(len(_STAGES)):
        name = f"backbone.layers.{i}.blocks.0.attn.relative_position_bias_table"
        missing = [] if name in model else [name]
        refuse_mismatch("the weights are not a Swin Transformer", missing=missing, remedy=REMEDY)
        positions, heads = model[name].shape
        tables.append((positions, heads))
    return tables


def swin_settings(model: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config keys of a complete Swin Transformer."""
    tables = _swin_tables(model)
    return {
        "MODEL.BACKBONE.NAME": "build_swin_backbone",
        "MODEL.SWIN.EMBED_DIM": swin_width(model),
        "MODEL.SWIN.DEPTHS": _swin_depths(model),
        "MODEL.SWIN.NUM_HEADS": [heads for _, heads in tables],
        # (2 W - 1)^2 relative positions in windows of W x W
        "MODEL.SWIN.WINDOW_SIZE": (round(tables[0][0] ** 0.5) + 1) // 2,
    }


def swin_layout(model: Mapping[str, Tensor]) -> Iterator[tuple[str, Shape | None]]:
    """Names and shapes of the Swin Transformer of published detectors."""
    first = swin_width(model)
    yield SWIN_PROJECTION, (first, 3, _PATCH, _PATCH)
    yield "backbone.patch_embed.proj.bias", (first,)
    yield from _norm("backbone.patch_embed.norm", first)
    stages = zip(_swin_depths(model), _swin_tables(model), strict=True)
    positions = _swin_tables(model)[0][0]
    for i, (depth, (_, heads)) in enumerate(stages):
        width, stage = first * 2**i, f"backbone.layers.{i}"
        for k in range(depth):
            block = f"{stage}.blocks.{k}"
            yield from _norm(f"{block}.norm1", width)
            yield from _norm(f"{block}.norm2", width)
            yield f"{block}.attn.relative_position_bias_table", (positions, heads)
            for part, n_in, n_out in (
                ("attn.qkv", width, 3 * width),
                ("attn.proj", width, width),
                ("mlp.fc1", width, _MLP_RATIO * width),
                ("mlp.fc2", _MLP_RATIO * width, width),
            ):
                yield f"{block}.{part}.weight", (n_out, n_in)
                yield f"{block}.{part}.bias", (n_out,)
        if i < len(_STAGES) - 1:
            yield from _norm(f"{stage}.downsample.norm", 4 * width)
            yield f"{stage}.downsample.reduction.weight", (2 * width, 4 * width)
        yield from _norm(f"backbone.norm{i}", width)


def count_indices(names: Collection[str], prefix: str) -> int:
    """One more than the largest index after the prefix, so that gaps are found; at least 1."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]+)\.")
    largest = max((int(found[1]) for name in names if (found := pattern.match(name))), default=0)
    return min(largest, len(names)) + 1  # bounds the loops for an absurdly large index


def block_layout(model: Mapping[str, Tensor], width: int) -> Iterator[tuple[str, Shape | None]]:
    """Names and shapes of the BatchFormer blocks."""
    for block in block_names(model):
        linear = model.get(f"{BLOCKS}{block}.linear1.weight")
        inner = width if linear is None else linear.shape[0]
        yield from _layer(f"{BLOCKS}{block}.", width, inner, ("self_attn",))


def _detr_transformer(model: Mapping[str, Tensor]) -> Iterator[tuple[str, Shape | None]]:
    """Names and shapes of DETR's transformer; None for a shape that cannot be known."""
    num_queries, width = model[_QUERIES].shape
    hidden = model[_FIRST_LINEAR].shape[0]
    yield _QUERIES, (num_queries, width)
    channels = out_channels(model, "res5")
    yield "transformer.input_proj.weight", None if channels is None else (width, channels, 1, 1)
    yield "transformer.input_proj.bias", (width,)
    for i in range(count_indices(model, _ENCODER)):
        yield from _layer(f"{_ENCODER}{i}.", width, hidden, ("self_attn",))
    if has_pre_norm(model):
        yield from _norm("transformer.encoder.norm", width)
    yield from block_layout(model, width)
    for i in range(count_indices(model, _DECODER)):
        yield from _layer(f"{_DECODER}{i}.", width, hidden, ("self_attn", "multihead_attn"))
    yield from _norm("transformer.decoder.norm", width)


def _heads(model: Mapping[str, Tensor]) -> Iterator[tuple[str, Shape | None]]:
    width = model[_QUERIES].shape[1]
    yield from _box_head(model, width)
    if has_masks(model):
        yield from _mask_head(model, width)


def _layer(prefix: str, width: int, hidden: int, attentions: tuple[str, ...]) -> Iterator[Any]:
    for attention in attentions:
        yield f"{prefix}{attention}.in_proj_weight", (3 * width, width)
        yield f"{prefix}{attention}.in_proj_bias", (3 * width,)
        yield from _linear(f"{prefix}{attention}.out_proj", width, width)
    yield from _linear(f"{prefix}linear1", width, hidden)
    yield from _linear(f"{prefix}linear2", hidden, width)
    for i in range(len(attentions) + 1):
        yield from _norm(f"{prefix}norm{i + 1}", width)


def _box_head(model: Mapping[str, Tensor], width: int) -> Iterator[Any]:
    classes = model.get("box_head.class_embed.weight")
    yield from _linear("box_head.class_embed", width, 1 if classes is None else classes.shape[0])
    for i, size in enumerate((width, width, 4)):
        yield from _linear(f"box_head.bbox_embed.layers.{i}", width, size)


def _mask_head(model: Mapping[str, Tensor], width: int) -> Iterator[Any]:
    """Names and shapes of the mask head in its published widths.

    Source: facebookresearch/detr, models/segmentation.py.
    """
    for name in ("q_linear", "k_linear"):
        yield from _linear(f"mask_head.attention.{name}", width, width)
    first = model.get("mask_head.convs.0.weight")
    mixed = width if first is None else first.shape[0]  # embedding plus one map per head
    widths = [mixed, mixed, *(width // 2**i for i in range(1, 5))]
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        yield f"mask_head.convs.{i}.weight", (n_out, n_in, 3, 3)
        yield f"mask_head.convs.{i}.bias", (n_out,)
        yield from _norm(f"mask_head.norms.{i}", n_out)
    for i, stage in enumerate(("res4", "res3", "res2")):
        n_in, n_out = out_channels(model, stage), widths[i + 2]
        weight = f"mask_head.adapters.{i}.weight"
        yield weight, None if n_in is None else (n_out, n_in, 1, 1)
        yield f"mask_head.adapters.{i}.bias", (n_out,)
    yield "mask_head.predictor.weight", (1, widths[-1], 3, 3)
    yield "mask_head.predictor.bias", (1,)


def resnet_layout(model: Mapping[str, Tensor]) -> Iterator[Any]:
    """Names and shapes of Detectron2's ResNet; None for a shape that cannot be known."""
    yield from _conv_norm(model, "backbone.stem.conv1")
    bottleneck = any(re.match(r"backbone\.res\d\.\d+\.conv3\.", name) for name in model)
    last = "conv3" if bottleneck else "conv2"
    for stage in _STAGES:
        for i in range(count_indices(model, f"backbone.{stage}.")):
            block = f"backbone.{stage}.{i}"
            for conv in ("conv1", "conv2", "conv3")[: 3 if bottleneck else 2]:
                yield from _conv_norm(model, f"{block}.{conv}")
            # A block has a projection shortcut if its input and output widths differ.
            first, final = model.get(f"{block}.conv1.weight"), model.get(f"{block}.{last}.weight")
            if first is not None and final is not None and first.shape[1] != final.shape[0]:
                yield from _conv_norm(model, f"{block}.shortcut")


def _conv_norm(model: Mapping[str, Tensor], name: str) -> Iterator[Any]:
    conv = model.get(f"{name}.weight")
    yield f"{name}.weight", None
    for part in ("weight", "bias", *_BUFFERS):
        yield f"{name}.norm.{part}", None if conv is None else (conv.shape[0],)


def out_channels(model: Mapping[str, Tensor], stage: str) -> int | None:
    """Output channels of a stage of the ResNet ("res5"); None if the weights lack it."""
    for conv in ("conv3", "conv2"):
        weight = model.get(f"backbone.{stage}.0.{conv}.weight")
        if weight is not None:
            return weight.shape[0]
    return None


def _linear(name: str, n_in: int, n_out: int) -> Iterator[Any]:
    yield f"{name}.weight", (n_out, n_in)
    yield f"{name}.bias", (n_out,)


def _norm(name: str, width: int) -> Iterator[Any]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
