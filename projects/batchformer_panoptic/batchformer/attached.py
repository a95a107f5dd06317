"""The handle of a model that carries BatchFormerV2: its hooks, its targets, its outputs.

Shapes: B images; two streams of B entries each while training, the original stream first.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .context import ContextHook
from .first_pass import FirstPass
from .hook import BatchFormerHook
from .layout import from_tokens, to_tokens
from .streams import ORIGINAL, SINGLE, TWO_STREAMS, StreamState


class AttachedBatchFormer(nn.Module):
    """The handle of a model that BatchFormerV2 is attached to; made by ``attach``.

    It is a submodule of the model, so its blocks are trained, moved, saved and synchronised with
    the rest. What it does to the model are hooks, and those are there in training mode alone: in
    evaluation mode the model runs exactly as if nothing had been attached.

    A copy of the model has its own handle under the same name (``copy.batchformer``); that of a
    ``DistributedDataParallel`` is ``ddp.module.batchformer``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        after: Sequence[str],
        layout: str,
        embed_dim: int,
        hook: BatchFormerHook,
        context: Mapping[str, Mapping[str | int, int]],
    ) -> None:
        super().__init__()
        self.hook = hook
        self.embed_dim = embed_dim
        self.layout = layout
        self.after = tuple(after)
        # In a tuple, since a module that is assigned becomes a submodule.
        self._model = (model,)
        self._name = name
        self._insertions = [_Insertion(self, index) for index in range(len(after))]
        self._context = {
            name: ContextHook(name, model.get_submodule(name), dims, TWO_STREAMS)
            for name, dims in context.items()
        }
        self._first_pass: FirstPass | None = FirstPass(self.after, layout)
        self._handles: list[RemovableHandle] = []
        self._watchers: list[RemovableHandle] = []

    @property
    def streams(self) -> StreamState:
        """What the outputs of the model carry in its present mode."""
        return TWO_STREAMS if self.training else SINGLE

    def train(self, mode: bool = True) -> "AttachedBatchFormer":
        """Switch to two streams, or (False) to the untouched model."""
        super().train(mode)
        self._remove_hooks()
        if mode:
            self._register_hooks()
        return self

    def forward(self, batch: Any) -> Any:
        """Return ``batch`` as it is, for a ``Sequential``, which calls all that it holds."""
        return batch

    def expand(self, targets: Any) -> Any:
        """Targets of B images -> targets of everything the model returns in its present mode.

        Args:
            targets: a tensor (B, ...), a list with one item for each image, or a dict of such
                things. In evaluation mode it is returned as it is.

        Raises:
            TypeError: something else, of which nobody can know what in it belongs to an image.
        """
        if isinstance(targets, Tensor):
            return self.streams.expand(targets)
        if isinstance(targets, list):
            return self.streams.expand_list(targets)
        if isinstance(targets, Mapping):
            return {key: self.expand(value) for key, value in targets.items()}
        raise TypeError(
            f"targets of type {type(targets).__name__} cannot be doubled: give a tensor (B, ...), "
            "a list with one item for each image, or a dict of these"
        )

    def split(self, outputs: Any) -> dict[str, Any]:
        """Outputs of the model -> outputs of each stream by name ("original", "batchformer").

        Args:
            outputs: a tensor whose first dimension is the batch, or lists, tuples and mappings of
                such tensors (mappings become dicts, tuples stay tuples); other values are given to
                every stream. In evaluation mode there is one stream, "original".

        Raises:
            ValueError: an odd number of entries along the first dimension of a tensor.
        """
        streams = self.streams
        return {name: _part(outputs, streams, index) for index, name in enumerate(streams.names)}

    def original(self, outputs: Any) -> Any:
        """Return the original stream of the outputs: those of the B images, in both modes."""
        return self.split(outputs)[ORIGINAL]

    def plain_state_dict(self) -> dict[str, Any]:
        """Return the state dict of the model as it is without the block, under the same keys."""
        (model,) = self._model
        state = model.state_dict()
        for key in [key for key in state if key.startswith(f"{self._name}.")]:
            del state[key]
        return state

    def detach(self) -> None:
        """Leave the model as it was; the weights it has learnt stay.

        Raises:
            RuntimeError: it is detached already.
        """
        (model,) = self._model
        if model._modules.get(self._name) is not self:
            raise RuntimeError("BatchFormerV2 is not attached to this model any more")
        self._remove_hooks()
        delattr(model, self._name)
        if "torch._dynamo" in sys.modules:  # compiled code does not notice that hooks are gone
            torch.compiler.reset()

    def extra_repr(self) -> str:
        """Return where it acts, for ``print(model)``."""
        return f"after={list(self.after)}, layout={self.layout!r}"

    def insert(self, index: int, tokens: Tensor) -> Tensor:
        """The block's work after the ``index``-th of the modules, in the model's layout."""
        if self._first_pass is not None and not torch.compiler.is_compiling():
            self._first_pass.at_insertion(index, tokens)
        batch = to_tokens(tokens, self.layout)
        if batch.shape[-1] != self.embed_dim:
            raise ValueError(
                f"{self.after[index]} returned {tuple(tokens.shape)}, in layout {self.layout} "
                f"{batch.shape[-1]} channels, but embed_dim is {self.embed_dim}"
            )
        joined, _ = self.hook.after_layer(index, batch, TWO_STREAMS if index else SINGLE, None)
        return from_tokens(joined.to(tokens.dtype), self.layout, tokens)

    def watch_begin(self, inputs: Sequence[Any]) -> None:
        """Before the first forward pass of the model in training mode."""
        if self._first_pass is not None and not torch.compiler.is_compiling():
            self._first_pass.begin(inputs)

    def watch_end(self) -> None:
        """After it: nothing is watched any more when all was well."""
        if self._first_pass is not None and not torch.compiler.is_compiling():
            self._first_pass.end()
            self._first_pass = None
            for handle in self._watchers:
                handle.remove()

    def _register_hooks(self) -> None:
        (model,) = self._model
        for name, insertion in zip(self.after, self._insertions, strict=True):
            module = model.get_submodule(name)
            self._handles.append(module.register_forward_hook(insertion))
        for name, hook in self._context.items():
            module = model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if self._first_pass is not None:
            begin = model.register_forward_pre_hook(_Begin(self), with_kwargs=True)
            self._watchers = [begin, model.register_forward_hook(_End(self))]

    def _remove_hooks(self) -> None:
        for handle in [*self._handles, *self._watchers]:
            handle.remove()
        self._handles, self._watchers = [], []


class _Insertion:
    """The forward hook of a module of ``after``; an object, so that copies have their own."""

    def __init__(self, owner: AttachedBatchFormer, index: int) -> None:
        self.owner = owner
        self.index = index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self.owner.insert(self.index, output)
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            tokens = self.owner.insert(self.index, output[0])
            return _sequence_like(output, [tokens, *output[1:]])
        raise TypeError(
            f"{self.owner.after[self.index]} returns {type(output).__name__}: BatchFormerV2 needs "
            "a module that returns tokens, alone or as the first item of a tuple"
        )


class _Begin:
    def __init__(self, owner: AttachedBatchFormer) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.owner.watch_begin([*args, *kwargs.values()])


class _End(_Begin):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.owner.watch_end()


def _part(outputs: Any, streams: StreamState, index: int) -> Any:
    if isinstance(outputs, Tensor):
        return streams.split(outputs)[index] if outputs.dim() else outputs
    if isinstance(outputs, list | tuple):
        return _sequence_like(outputs, [_part(item, streams, index) for item in outputs])
    if isinstance(outputs, Mapping):
        return {key: _part(value, streams, index) for key, value in outputs.items()}
    return outputs


def _sequence_like(sequence: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    """A list, tuple or named tuple of other items."""
    kind = type(sequence)
    return kind._make(items) if hasattr(kind, "_make") else kind(items)
