"""Shared parts of all conversions: requests and results, name tables, renaming and class rows.

A converter renames the keys of a source, checks that the result is complete, selects the rows of
the class layer, and returns the weights with the config settings that they need.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.class_table import ClassTable
from ...errors import UserError

Shape = tuple[int, ...]

# Where this project's models keep the blocks of BatchFormerV2.
BLOCKS = "transformer.encoder.batchformer.blocks."
CLASS_KEYS = ("box_head.class_embed.weight", "box_head.class_embed.bias")


# Request and result.


class Request(NamedTuple):
    """Options of a conversion.

    Attributes:
        classes: classes whose rows of the class layer are kept, in contiguous order; None: all.
        allowed_leftovers: globs of source keys that may be left out.
    """

    classes: ClassTable | None = None
    allowed_leftovers: tuple[str, ...] = ()


class Converted(NamedTuple):
    """Weights in this project's names, and what the user should know about them.

    Attributes:
        model: parameters and buffers by name.
        dropped: source keys that are not part of ``model``, each with the reason.
        notes: lines for the user.
        settings: config keys and values that these weights need.
    """

    model: dict[str, Tensor]
    dropped: list[tuple[str, str]]
    notes: list[str]
    settings: dict[str, Any]


class Source(NamedTuple):
    """A published layout that can be converted.

    Attributes:
        name: argument of ``--source``.
        description: one line for the list of sources.
        convert: the converter; raises UserError with every leftover and missing key.
    """

    name: str
    description: str
    convert: Callable[[dict[str, Tensor], Request], Converted]


def pixel_settings(mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Return the config keys of RGB images that are normalised with statistics of 0 to 255."""
    return {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": list(mean), "MODEL.PIXEL_STD": list(std)}


# The public code divides by 255 and normalises with torchvision's mean and deviation.
TORCHVISION_INPUT = pixel_settings([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


# Names.

# Tails of names: an affine layer, and a norm with fixed statistics.
AFFINE = r"(?:weight|bias)"
FROZEN_NORM = r"(?:weight|bias|running_mean|running_var)"


class Row(NamedTuple):
    """A pair of equivalent prefixes, in which ``#`` stands for one number.

    Attributes:
        theirs: prefix in the other project.
        ours: prefix in this project.
        tail: regular expression of the rest of the name, which both projects share.
    """

    theirs: str
    ours: str
    tail: str


class NameTable:
    """Translates names in both directions; names that no row matches have no counterpart."""

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self._to_ours = [(_pattern(row.theirs, row.tail), row.ours) for row in rows]
        self._to_theirs = [(_pattern(row.ours, row.tail), row.theirs) for row in rows]

    def to_ours(self, name: str) -> str | None:
        """Return this project's name, or None."""
        return _translate(name, self._to_ours)

    def to_theirs(self, name: str) -> str | None:
        """Return the other project's name, or None."""
        return _translate(name, self._to_theirs)


def _pattern(prefix: str, tail: str) -> re.Pattern[str]:
    # No leading zeros, so that the translation is one to one.
    number = re.escape(prefix).replace(r"\#", "(?P<number>0|[1-9][0-9]*)")
    return re.compile(f"{number}(?P<tail>{tail})")


def _translate(name: str, patterns: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in patterns:
        if found := pattern.fullmatch(name):
            groups = found.groupdict()
            return target.replace("#", groups.get("number") or "") + groups["tail"]
    return None


# Renaming.


class Allowed(NamedTuple):
    """Source keys that a conversion may leave out.

    Attributes:
        pattern: a glob.
        reason: printed with the keys.
    """

    pattern: str
    reason: str


class Renamed(NamedTuple):
    """Result of `rename`.

    Attributes:
        model: tensors by new name.
        dropped: old keys that were left out, with the reason.
        leftovers: old keys that are neither renamed nor allowed to be left out.
        origin: old key of each new name.
    """

    model: dict[str, Tensor]
    dropped: list[tuple[str, str]]
    leftovers: list[str]
    origin: dict[str, str]

    def old_keys(self, names: Iterable[str]) -> list[str]:
        """Return the source keys of new names, for messages."""
        return [self.origin.get(name, name) for name in names]


def rename(
    state: Mapping[str, Tensor],
    new_name: Callable[[str], str | None],
    allowed: Sequence[Allowed],
    request: Request,
) -> Renamed:
    """Rename the tensors of a state dict.

    Several keys may have the same new name if their values are equal. Keys that match
    ``request.allowed_leftovers`` are left out even if they have a new name.

    Args:
        state: tensors by source key.
        new_name: returns the new name of a source key, or None.
        allowed: keys without a new name that may be left out.
        request: the options of the conversion.
    """
    by_user = [Allowed(p, f"--allow {p}") for p in request.allowed_leftovers]
    result = Renamed({}, [], [], {})
    for key, value in state.items():
        name = new_name(key)
        # The user's patterns come first, since they also match keys that have a new name.
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


NO_STATISTICS_COUNT = Allowed(
    "*.num_batches_tracked", "a frozen batch norm does not count its batches"
)


# Reports of keys that do not match.

REMEDY = (
    "check --source, or name keys that may be left out with --allow PATTERN (missing keys have "
    "this project's names)"
)


def wrong_shapes(model: Mapping[str, Tensor], expected: Mapping[str, Shape | None]) -> list[str]:
    """Return "key: shape instead of shape" for each tensor without the expected shape.

    Args:
        model: tensors by name.
        expected: shapes by name, of which those of other names and None are not compared.
    """
    return [
        f"{name}: {tuple(model[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if shape is not None and name in model and tuple(model[name].shape) != shape
    ]


def refuse_mismatch(
    what: str,
    *,
    leftovers: Iterable[str] = (),
    missing: Iterable[str] = (),
    wrong_shape: Iterable[str] = (),
    remedy: str,
) -> None:
    """Raise a UserError that lists the given keys, unless there are none.

    Args:
        what: subject of the sentence.
        leftovers: source keys without a use.
        missing: absent keys.
        wrong_shape: from `wrong_shapes`.
        remedy: how to correct it.
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


# Rows of the class layer.


def select_class_rows(
    model: dict[str, Tensor],
    classes: ClassTable | None,
    *,
    no_object: bool = True,
    by_dataset_id: bool = True,
) -> tuple[dict[str, Tensor], list[str]]:
    """Select the rows of some classes, in contiguous order, and keep "no object" as the last row.

    DETR's rows are indexed by the class ids of the data set, with gaps for unused ids: 91 rows for
    the 80 classes of COCO detection, 250 for the 133 classes of COCO panoptic. If there are too few
    rows for the ids and exactly as many as classes, the rows are in contiguous order.

    Args:
        model: complete, in this project's names; not changed.
        classes: classes to keep; None keeps every row.
        no_object: whether the last row is "no object" (softmax); otherwise all are classes
            (sigmoid).
        by_dataset_id: whether rows may be indexed by the class ids of the data set; otherwise they
            are in contiguous order.

    Returns:
        The model with the selected rows, and lines for the user.

    Raises:
        UserError: the layer has too few rows for the classes.
    """
    num_rows = model[CLASS_KEYS[0]].shape[0] - int(no_object)
    if classes is None:
        return model, [f"all {num_rows} class rows are kept: MODEL.DETR.NUM_CLASSES {num_rows}"]
    in_range = min(classes.dataset_ids) >= 0 and max(classes.dataset_ids) < num_rows
    if by_dataset_id and in_range:
        rows = list(classes.dataset_ids)
    elif num_rows == classes.num_classes:
        rows = list(range(num_rows))
    elif not by_dataset_id:
        raise UserError(
            f"the weights have {num_rows} class rows in contiguous order, and the class table has "
            f"{classes.num_classes} classes; name the classes of the training, or --classes all"
        )
    else:
        raise UserError(
            f"the weights have {num_rows} class rows, which match neither the number of classes, "
            f"{classes.num_classes}, nor their ids, {min(classes.dataset_ids)} to "
            f"{max(classes.dataset_ids)}; name the classes of the training, or --classes all"
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
        return f"{what}: each class has its own sigmoid, so the scores of the others do not change"
    return (
        f"{what}: the softmax distributes the probability of the dropped rows over the kept "
        "classes and 'no object' in proportion, so all scores of a query rise by one factor (close "
        "to 1 if the rows were unused in training) and the order of its classes does not change"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Format ascending numbers as in "0, 12, 29-30"."""
    runs = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(runs)
