"""Arguments of later modules that hold one entry for each image: copied for the second stream."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .streams import StreamState


class ContextHook:
    """A forward pre-hook that copies named arguments of a module along their batch dimension.

    Tensors are repeated, in lists, tuples and dicts too; None and anything else passes. No state
    is kept, so that a layer may be run again (activation checkpointing).

    Args:
        name: of the module, for messages.
        module: what the hook will be registered on (``with_kwargs=True``).
        batch_dims: argument name, or position from 0 -> its batch dimension.
        streams: what the tokens carry by then.

    Raises:
        ValueError: the module takes no such argument.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        batch_dims: Mapping[str | int, int],
        streams: StreamState,
    ) -> None:
        positions = _positions(module)
        self.arguments: list[tuple[str | None, int | None, int]] = []
        for argument, dim in batch_dims.items():
            if isinstance(argument, int):
                self.arguments.append((None, argument, dim))
                continue
            if argument not in positions:
                known = ", ".join(positions)
                raise ValueError(f"context: {name} has no argument {argument!r}; it has: {known}")
            self.arguments.append((argument, positions[argument], dim))
        self.streams = streams

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with copies in place of what was named."""
        new_args, new_kwargs = list(args), dict(kwargs)
        for name, position, dim in self.arguments:
            if name is not None and name in new_kwargs:
                new_kwargs[name] = self._copy(new_kwargs[name], dim)
            elif position is not None and position < len(new_args):
                new_args[position] = self._copy(new_args[position], dim)
        return tuple(new_args), new_kwargs

    def _copy(self, value: Any, dim: int) -> Any:
        if isinstance(value, Tensor):
            return self.streams.expand(value, dim)
        if isinstance(value, list):
            return [self._copy(item, dim) for item in value]
        if isinstance(value, tuple):
            return tuple(self._copy(item, dim) for item in value)
        if isinstance(value, Mapping):
            return {key: self._copy(item, dim) for key, item in value.items()}
        return value


def _positions(module: nn.Module) -> dict[str, int | None]:
    """Arguments of ``forward`` -> position; None for those given by name alone."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {
        parameter.name: None if parameter.kind is inspect.Parameter.KEYWORD_ONLY else position
        for position, parameter in enumerate(parameters)
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }
