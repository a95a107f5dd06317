"""From the rows of another project's class layer to the contiguous classes of a data set.

Tables of names that are read in both directions.

What a DETR of this project consists of: the keys that must be there, and the config they imply.

Sizes and flags are read off the weights themselves.

What a conversion is asked, what it answers, and how keys that do not fit are reported.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.class_table import ClassTable
from ...errors import UserError

# Tails of names: an affine layer, a norm with fixed statistics.
AFFINE = r"(?:weight|bias)"
FROZEN_NORM = r"(?:weight|bias|running_mean|running_var)"
# Where this project's models keep the blocks of BatchFormerV2.
BLOCKS = "transformer.encoder.batchformer.blocks."


class Row(NamedTuple):
    """Two prefixes that mean the same, ``#`` in them being one number.

    Attributes:
        theirs: prefix in the other project.
        ours: prefix in this project.
        tail: regular expression of the rest of a name, which is the same on both sides.
    """

    theirs: str
    ours: str
    tail: str


class NameTable:
    """Translates names in both directions; a name that no row covers has no counterpart."""

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self._to_ours = [(_pattern(row.theirs, row.tail), row.ours) for row in rows]
        self._to_theirs = [(_pattern(row.ours, row.tail), row.theirs) for row in rows]

    def to_ours(self, name: str) -> str | None:
        """This project's name, None if there is none."""
        return _translate(name, self._to_ours)

    def to_theirs(self, name: str) -> str | None:
        """The other project's name, None if there is none."""
        return _translate(name, self._to_theirs)


def _pattern(prefix: str, tail: str) -> re.Pattern[str]:
    # No leading zeros: each number has one spelling, and each name one counterpart.
    number = re.escape(prefix).replace(r"\#", "(?P<number>0|[1-9][0-9]*)")
    return re.compile(f"{number}(?P<tail>{tail})")


def _translate(name: str, patterns: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in patterns:
        if found := pattern.fullmatch(name):
            groups = found.groupdict()
            return target.replace("#", groups.get("number") or "") + groups["tail"]
    return None


Shape = tuple[int, ...]

_ENCODER, _DECODER = "transformer.encoder.layers.", "transformer.decoder.layers."
_QUERIES = "transformer.query_embed.weight"
_FIRST_LINEAR = f"{_ENCODER}0.linear1.weight"
_STAGES = ("res2", "res3", "res4", "res5")
_BUFFERS = ("running_mean", "running_var")
# Blocks in each stage, and whether they are bottlenecks -> what Detectron2 calls the depth.
_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}


class Misfit(NamedTuple):
    """What of a state dict is not as it must be.

    Attributes:
        missing: names.
        wrong_shape: "name: shape instead of shape".
        unexpected: names.
    """

    missing: list[str]
    wrong_shape: list[str]
    unexpected: list[str]


def compare_with_layout(
    model: Mapping[str, Tensor], transformer: Mapping[str, Shape] | None = None
) -> Misfit:
    """Compare a state dict in this project's names with what a complete DETR has.

    Args:
        model: the state dict.
        transformer: names and shapes of a transformer other than DETR's.
    """
    if absent := missing_sizes(model):
        return Misfit(absent, [], [])
    parts = _detr_transformer(model) if transformer is None else transformer.items()
    expected = dict([*_backbone(model), *parts, *_heads(model)])
    wrong = [
        f"{name}: {tuple(model[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if shape is not None and name in model and tuple(model[name].shape) != shape
    ]
    missing = [name for name in expected if name not in model]
    return Misfit(missing, wrong, [name for name in model if name not in expected])


def settings_of(model: Mapping[str, Tensor]) -> dict[str, Any]:
    """Config keys that follow from the shapes of a complete state dict."""
    settings: dict[str, Any] = {
        "MODEL.DETR.TRANSFORMER_NAME": "detr",
        "MODEL.DETR.SCORING": "softmax",
        **transformer_settings(model),
        **_resnet_settings(model),
    }
    if has_masks(model):
        settings["MODEL.MASK_ON"] = True
        mixed = model["mask_head.convs.0.weight"].shape[0]
        settings["MODEL.DETR.NHEADS"] = mixed - settings["MODEL.DETR.HIDDEN_DIM"]
    return settings


def missing_sizes(model: Iterable[str]) -> list[str]:
    """Names that are absent and without which the sizes of a transformer are unknown."""
    names = set(model)
    return [name for name in (_QUERIES, _FIRST_LINEAR) if name not in names]


def transformer_settings(model: Mapping[str, Tensor]) -> dict[str, Any]:
    """Config keys of the sizes that all transformers have, when no size is missing."""
    num_queries, embed_dim = model[_QUERIES].shape
    return {
        "MODEL.DETR.NUM_OBJECT_QUERIES": num_queries,
        "MODEL.DETR.HIDDEN_DIM": embed_dim,
        "MODEL.DETR.DIM_FEEDFORWARD": model[_FIRST_LINEAR].shape[0],
        "MODEL.DETR.ENC_LAYERS": _count(model, _ENCODER),
        "MODEL.DETR.DEC_LAYERS": _count(model, _DECODER),
        "MODEL.DETR.PRE_NORM": has_pre_norm(model),
    }


def has_masks(model: Iterable[str]) -> bool:
    """Whether there is a mask head."""
    return any(name.startswith("mask_head.") for name in model)


def has_pre_norm(model: Iterable[str]) -> bool:
    """Whether layer norms come before attention; only then the encoder ends with one."""
    return any(name.startswith("transformer.encoder.norm.") for name in model)


def block_names(model: Iterable[str]) -> list[str]:
    """Names of the BatchFormer blocks: numbers of layers, or "shared"."""
    names = {name.removeprefix(BLOCKS).split(".")[0] for name in model if name.startswith(BLOCKS)}
    return sorted(names, key=lambda name: (len(name), name))


class ResNetShape(NamedTuple):
    """Sizes of a ResNet, stem to res5.

    Attributes:
        stem: output channels of the stem.
        widths: output channels of each stage.
        inner_widths: channels inside the blocks of each stage.
        depths: blocks of each stage.
        bottleneck: three convolutions a block instead of two.
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
        depths=tuple(_count(model, f"backbone.{s}.") for s in _STAGES),
        bottleneck=bottleneck,
    )


def _resnet_settings(model: Mapping[str, Tensor]) -> dict[str, Any]:
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


def _count(names: Collection[str], prefix: str) -> int:
    """One more than the largest number that follows the prefix, so that gaps show; at least 1."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]+)\.")
    largest = max((int(found[1]) for name in names if (found := pattern.match(name))), default=0)
    return min(largest, len(names)) + 1  # a forged number must not keep us busy


def block_layout(model: Mapping[str, Tensor], width: int) -> Iterator[tuple[str, Shape | None]]:
    """Every name that the BatchFormer blocks of some weights have, with its shape."""
    for block in block_names(model):
        linear = model.get(f"{BLOCKS}{block}.linear1.weight")
        inner = width if linear is None else linear.shape[0]
        yield from _layer(f"{BLOCKS}{block}.", width, inner, ("self_attn",))


def _detr_transformer(model: Mapping[str, Tensor]) -> Iterator[tuple[str, Shape | None]]:
    """Every name DETR's transformer has, with its shape; None where any will do."""
    num_queries, width = model[_QUERIES].shape
    hidden = model[_FIRST_LINEAR].shape[0]
    yield _QUERIES, (num_queries, width)
    channels = out_channels(model, "res5")
    yield "transformer.input_proj.weight", None if channels is None else (width, channels, 1, 1)
    yield "transformer.input_proj.bias", (width,)
    for i in range(_count(model, _ENCODER)):
        yield from _layer(f"{_ENCODER}{i}.", width, hidden, ("self_attn",))
    if has_pre_norm(model):
        yield from _norm("transformer.encoder.norm", width)
    yield from block_layout(model, width)
    for i in range(_count(model, _DECODER)):
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
    """The published widths: those of facebookresearch/detr, models/segmentation.py."""
    for name in ("q_linear", "k_linear"):
        yield from _linear(f"mask_head.attention.{name}", width, width)
    first = model.get("mask_head.convs.0.weight")
    mixed = width if first is None else first.shape[0]  # embedding plus one map a head
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


def _backbone(model: Mapping[str, Tensor]) -> Iterator[Any]:
    yield from _conv_norm(model, "backbone.stem.conv1")
    bottleneck = any(re.match(r"backbone\.res\d\.\d+\.conv3\.", name) for name in model)
    last = "conv3" if bottleneck else "conv2"
    for stage in _STAGES:
        for i in range(_count(model, f"backbone.{stage}.")):
            block = f"backbone.{stage}.{i}"
            for conv in ("conv1", "conv2", "conv3")[: 3 if bottleneck else 2]:
                yield from _conv_norm(model, f"{block}.{conv}")
            first, final = model.get(f"{block}.conv1.weight"), model.get(f"{block}.{last}.weight")
            if first is not None and final is not None and first.shape[1] != final.shape[0]:
                yield from _conv_norm(model, f"{block}.shortcut")


def _conv_norm(model: Mapping[str, Tensor], name: str) -> Iterator[Any]:
    conv = model.get(f"{name}.weight")
    yield f"{name}.weight", None
    for part in ("weight", "bias", *_BUFFERS):
        yield f"{name}.norm.{part}", None if conv is None else (conv.shape[0],)


def out_channels(model: Mapping[str, Tensor], stage: str) -> int | None:
    """Channels of a stage of the ResNet ("res5"); None when the weights do not tell."""
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


class Request(NamedTuple):
    """What the user asks of a conversion.

    Attributes:
        classes: the rows that the class layer is to have, in contiguous order; None keeps all.
        allowed_leftovers: glob patterns of source keys that may be left over.
    """

    classes: ClassTable | None = None
    allowed_leftovers: tuple[str, ...] = ()


class Converted(NamedTuple):
    """Weights under this project's names.

    Attributes:
        model: parameters and buffers by name.
        dropped: source keys that are not part of ``model``, each with the reason.
        notes: lines for the user.
        settings: config keys with the values that these weights need.
    """

    model: dict[str, Tensor]
    dropped: list[tuple[str, str]]
    notes: list[str]
    settings: dict[str, Any]


class Source(NamedTuple):
    """A layout that can be converted.

    Attributes:
        name: what the user calls it.
        description: one line for a list of the sources.
        convert: raises UserError with every leftover and missing key.
    """

    name: str
    description: str
    convert: Callable[[dict[str, Tensor], Request], Converted]


class Allowed(NamedTuple):
    """Source keys that a conversion may leave behind.

    Attributes:
        pattern: a glob.
        reason: printed with every such key.
    """

    pattern: str
    reason: str


class Renamed(NamedTuple):
    """State dict under new names, and what became of the rest.

    Attributes:
        model: tensors by new name.
        dropped: old key and reason.
        leftovers: old keys that are neither renamed nor allowed to be dropped.
        origin: old key of each new name.
    """

    model: dict[str, Tensor]
    dropped: list[tuple[str, str]]
    leftovers: list[str]
    origin: dict[str, str]

    def old_keys(self, names: Iterable[str]) -> list[str]:
        """What the user calls some of the new names."""
        return [self.origin.get(name, name) for name in names]


def rename(
    state: Mapping[str, Tensor],
    new_name: Callable[[str], str | None],
    allowed: Sequence[Allowed],
    request: Request,
) -> Renamed:
    """Give every tensor its new name; two keys of one name must hold the same values.

    What the user allows to be left over is left over, whether it has a new name or not.
    """
    by_user = [Allowed(p, f"--allow {p}") for p in request.allowed_leftovers]
    result = Renamed({}, [], [], {})
    for key, value in state.items():
        name = new_name(key)
        reasons = [*by_user, *(allowed if name is None else [])]
        reason = next((a.reason for a in reasons if fnmatchcase(key, a.pattern)), None)
        if reason is not None:
            result.dropped.append((key, reason))
        elif name is None:
            result.leftovers.append(key)
        elif name not in result.model:
            result.model[name] = value
            result.origin[name] = key
        elif torch.equal(result.model[name], value):
            result.dropped.append((key, f"the same tensor as {result.origin[name]}"))
        else:
            result.leftovers.append(f"{key} (differs from {result.origin[name]})")
    return result


def refuse_misfit(
    what: str,
    *,
    leftovers: Iterable[str] = (),
    missing: Iterable[str] = (),
    wrong_shape: Iterable[str] = (),
    remedy: str,
) -> None:
    """Raise UserError if there is anything to list.

    Args:
        what: subject of the sentence.
        leftovers: keys that nothing is done with.
        missing: keys that are needed.
        wrong_shape: "key: shape instead of shape".
        remedy: what the user can do about it.
    """
    kinds = {"left over": leftovers, "missing": missing, "of another shape": wrong_shape}
    listed = {kind: sorted(keys) for kind, keys in kinds.items()}
    if not any(listed.values()):
        return
    counts = ", ".join(
        f"{len(keys)} key{'s are' if len(keys) > 1 else ' is'} {kind}"
        for kind, keys in listed.items()
        if keys
    )
    lines = [f"  {kind}: {key}" for kind, keys in listed.items() for key in keys]
    raise UserError("\n".join([f"{what}: {counts}; {remedy}", *lines]))


CLASS_KEYS = ("box_head.class_embed.weight", "box_head.class_embed.bias")


def select_class_rows(
    model: dict[str, Tensor], classes: ClassTable | None, *, no_object: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """Keep the rows of the wanted classes, in contiguous order, and "no object" as the last one.

    DETR numbers its rows as the data set's files number the classes, with gaps where an id is not
    used (91 rows for the 80 classes of COCO's boxes, 250 for the 133 of COCO panoptic). A layer
    with exactly as many rows as there are classes, and too few for their ids, is contiguous.

    Args:
        model: complete, in this project's names; not changed.
        classes: the wanted classes; None keeps every row.
        no_object: whether the last row is "no object" (softmax), or all are classes (sigmoid).

    Returns:
        The model with its class layer replaced, and lines that say what was done.

    Raises:
        UserError: the layer has too few rows for the classes.
    """
    num_rows = model[CLASS_KEYS[0]].shape[0] - int(no_object)
    if classes is None:
        return model, [f"all {num_rows} class rows are kept: MODEL.DETR.NUM_CLASSES {num_rows}"]
    if min(classes.dataset_ids) >= 0 and max(classes.dataset_ids) < num_rows:
        rows = list(classes.dataset_ids)
    elif num_rows == classes.num_classes:
        rows = list(range(num_rows))
    else:
        raise UserError(
            f"the weights have {num_rows} class rows, which are neither the {classes.num_classes} "
            f"classes nor rows for the ids {min(classes.dataset_ids)} to "
            f"{max(classes.dataset_ids)}; name the classes they were trained on, or --classes all"
        )
    index = torch.tensor([*rows, num_rows] if no_object else rows)
    selected = {key: model[key][index] for key in CLASS_KEYS}
    return {**model, **selected}, [_describe(num_rows, rows, no_object)]


def _describe(num_rows: int, kept: Sequence[int], no_object: bool) -> str:
    dropped = sorted(set(range(num_rows)) - set(kept))
    if not dropped:
        return f"all {num_rows} class rows are kept" + (
            "" if list(kept) == sorted(kept) else ", in the order of the classes"
        )
    what = f"{len(kept)} of {num_rows} class rows are kept, dropped are {_ranges(dropped)}"
    if not no_object:
        return f"{what}: each row has a sigmoid of its own, the scores of the others stay"
    return (
        f"{what}: the softmax shares the probability of the dropped rows among the classes that "
        "stay and 'no object', in proportion; each query's scores rise by one common factor (a "
        "little, where the rows were never used in training) and the order of its classes stays"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: 0, 12, 29-30."""
    runs = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(runs)
