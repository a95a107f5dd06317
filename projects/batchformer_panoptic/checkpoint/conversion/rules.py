"""What a conversion is asked, what it answers, and how keys that do not fit are reported."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.categories import ClassTable
from ...errors import UserError


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
