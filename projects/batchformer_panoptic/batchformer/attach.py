"""BatchFormerV2 on a model that somebody else wrote.

How a batch of tokens lies in a tensor, stated by whoever attaches and never guessed.

Arguments of later modules that hold one entry for each image: copied for the second stream.

What can only be seen while a model runs, checked in its first training step.

The handle of a model that carries BatchFormerV2: its hooks, its targets, its outputs.

Shapes: B images; two streams of B entries each while training, the original stream first.
"""

import fnmatch
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import did_you_mean
from .batchformer import ORIGINAL, SINGLE, TWO_STREAMS, BatchFormerHook, StreamState

Layout = Literal["BNC", "NBC", "BHWC", "BCHW", "BC"]
"""B images, N (or H x W) positions, C channels; "BC" is one token for each image."""

LAYOUTS: tuple[str, ...] = get_args(Layout)


def check_layout(layout: str) -> None:
    """Raise ValueError unless ``layout`` is one of ``LAYOUTS``."""
    if layout not in LAYOUTS:
        raise ValueError(
            f"unknown layout {layout!r}: state how the tokens lie, one of {', '.join(LAYOUTS)} "
            "(B images, N or H x W positions, C channels)"
        )


def to_tokens(batch: Tensor, layout: str) -> Tensor:
    """A batch in ``layout`` -> (B, N, C).

    Raises:
        ValueError: the tensor has not as many dimensions as the layout has letters.
    """
    if batch.dim() != len(layout):
        raise ValueError(f"a tensor of shape {tuple(batch.shape)} is not {layout}")
    if layout == "NBC":
        return batch.transpose(0, 1)
    if layout == "BHWC":
        return batch.flatten(1, 2)
    if layout == "BCHW":
        return batch.flatten(2).transpose(1, 2)
    return batch[:, None] if layout == "BC" else batch


def from_tokens(tokens: Tensor, layout: str, like: Tensor) -> Tensor:
    """(B', N, C) -> ``layout``, with height, width and order in memory of ``like``.

    Undoes :func:`to_tokens`. What follows may rely on the order (``view``).
    """
    if layout == "NBC":
        batch = tokens.transpose(0, 1)
    elif layout == "BHWC":
        batch = tokens.unflatten(1, like.shape[1:3])
    elif layout == "BCHW":
        batch = tokens.transpose(1, 2).unflatten(2, like.shape[2:])
    else:
        batch = tokens[:, 0] if layout == "BC" else tokens
    return batch.contiguous() if like.is_contiguous() else batch


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


class FirstPass:
    """Watches one forward pass for modules in the wrong order and a misread batch dimension.

    Args:
        after: names of the modules that the block acts after.
        layout: how their tokens lie.
    """

    def __init__(self, after: Sequence[str], layout: str) -> None:
        self.after = tuple(after)
        self.layout = layout
        self.num_images: int | None = None
        self.seen: list[int] | None = None

    def begin(self, inputs: Iterable[Any]) -> None:
        """Note how many images the model is given, if it can be told.

        It can where an argument is a tensor (B, C, H, W), a list with one item for each image, or
        an object with such ``tensors`` (DETR's NestedTensor).
        """
        self.seen = []
        counts = (_count_images(value) for value in inputs)
        self.num_images = next((count for count in counts if count is not None), None)

    def at_insertion(self, index: int, tokens: Tensor) -> None:
        """Check one insertion.

        Raises:
            ValueError: the batch is not where the layout says, or another module should have run.
        """
        if self.seen is None:  # called in another way than model(...)
            return
        if index != len(self.seen):
            raise ValueError(self._order([*self.seen, index]))
        self.seen.append(index)
        if self.num_images is None:
            return
        expected = self.num_images * (2 if index else 1)
        if tokens.dim() != len(self.layout) or tokens.shape[self.layout.index("B")] != expected:
            raise ValueError(
                f"{self.after[index]} returned tokens of shape {tuple(tokens.shape)} for "
                f"{self.num_images} images, which is not {self.layout!r} with {expected} entries: "
                "state the layout that it is, and name a module that keeps images apart"
            )

    def end(self) -> None:
        """Check that every module has run.

        Raises:
            ValueError: one has not.
        """
        if self.seen is not None and len(self.seen) != len(self.after):
            raise ValueError(self._order(self.seen))

    def _order(self, seen: Sequence[int]) -> str:
        ran = [self.after[index] for index in seen]
        return (
            f"after names {list(self.after)}, but what ran was {ran}: name modules that run once "
            "in each forward pass, in the order they run in"
        )


def _count_images(value: Any) -> int | None:
    value = getattr(value, "tensors", value)
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() == 4 else None
    return len(value) if isinstance(value, list) and value else None


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


Context = Mapping[str, Mapping[str | int, int]]


def attach(
    model: nn.Module,
    *,
    after: Sequence[str],
    layout: Layout,
    embed_dim: int,
    num_heads: int = 4,
    dim_feedforward: int | None = None,
    dropout: float = 0.5,
    shared: bool = False,
    context: Context | None = None,
    name: str = "batchformer",
) -> AttachedBatchFormer:
    """Attach BatchFormerV2 (arXiv 2204.01254) to a model, in place.

    In training mode the batch splits into two streams after the first module of ``after``: as it
    is, and through attention over the images of the batch. Everything later is shared and returns
    2B entries, the original stream first. In evaluation mode nothing happens. The class of the
    model and the names of its parameters do not change; the blocks are added as ``name``.

    Attach before the optimizer, ``DistributedDataParallel`` and ``torch.compile``, since these
    take the model's parameters and code as they find them.

    Args:
        model: any model.
        after: names (as in ``model.named_modules()``) of the modules after which the batch
            attention acts, in the order they run in. Each returns tokens, alone or as the first
            item of a tuple or list.
        layout: how these tokens lie: "BNC" (batch first), "NBC" (sequence first), "BHWC" or
            "BCHW" (maps) or "BC" (one token for each image, that is BatchFormer v1).
        embed_dim: channels C of a token.
        num_heads: attention heads of a block; must divide ``embed_dim``.
        dim_feedforward: hidden width of a block's feed-forward layer. None: ``embed_dim``.
        dropout: dropout of a block.
        shared: use one block for all of ``after``.
        context: what later modules are given for each image and must be given for both streams,
            like padding masks and positional encodings: {module: {argument: batch dimension}}. A
            module may be a pattern like ``"layers.*"``, which leaves out the layers up to and
            including the first of ``after``; an argument may be a position.
        name: what the handle is called in the model.

    Returns:
        The handle: ``expand`` doubles targets, ``original`` and ``split`` take outputs apart,
        ``plain_state_dict`` and ``detach`` give the model back.

    Raises:
        ValueError: a name that the model does not have or has already, an unknown layout or one
            that contradicts the module, an argument that a module does not take, sizes that do not
            fit.
        TypeError: the model is wrapped already.
    """
    _check_model(model, name)
    check_layout(layout)
    if isinstance(after, str):
        raise ValueError(f"after must be a list of module names, not the text {after!r}")
    if not after or len(set(after)) != len(after):
        raise ValueError(f"after must name at least one module, and none twice: {list(after)}")
    for module_name in after:
        _check_module(_submodule(model, module_name), module_name, layout)
    hook = BatchFormerHook(
        embed_dim,
        insert_layers=range(len(after)),
        num_heads=num_heads,
        dim_feedforward=dim_feedforward,
        dropout=dropout,
        shared=shared,
    )
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        hook.to(parameter.device, parameter.dtype)
    handle = AttachedBatchFormer(
        model,
        name=name,
        after=after,
        layout=layout,
        embed_dim=embed_dim,
        hook=hook,
        context=_resolve(model, context or {}, first=after[0]),
    )
    model.add_module(name, handle)
    return handle.train(model.training)


def _check_model(model: nn.Module, name: str) -> None:
    wrapped = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    if wrapped or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"the model is wrapped in {type(model).__name__}: attach BatchFormerV2 first, then wrap"
        )
    for part, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise TypeError(
                f"{part or 'the model'} is compiled, and compiled code does not notice new hooks: "
                "attach BatchFormerV2 first, then compile"
            )
    for other, module in model.named_modules():
        if isinstance(module, AttachedBatchFormer):
            raise ValueError(
                f"BatchFormerV2 is attached to this model already, as {other!r}: name all modules "
                "in one attach(), or detach() it first"
            )
    if hasattr(model, name):
        raise ValueError(
            f"{type(model).__name__} has an attribute {name!r} already: give another name"
        )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules())
    if not name or name not in modules:
        raise ValueError(
            f"{type(model).__name__} has no module {name!r}{did_you_mean(name, modules)}"
        )
    return modules[name]


def _check_module(module: nn.Module, name: str, layout: str) -> None:
    """Torch's own layers say whether they are batch first."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    if not isinstance(module, nn.MultiheadAttention):
        return
    expected = "BNC" if module.batch_first else "NBC"
    if layout != expected:
        raise ValueError(
            f"{name} was built with batch_first={module.batch_first}: its layout is {expected!r}, "
            f"not {layout!r}"
        )


def _resolve(model: nn.Module, context: Context, *, first: str) -> dict[str, Any]:
    """Names for patterns, without the layers that run before the streams part."""
    resolved: dict[str, Any] = {}
    for pattern, dims in context.items():
        if any(sign in pattern for sign in "*?["):
            matches = fnmatch.filter((name for name, _ in model.named_modules()), pattern)
            # "layers.*" means the layers, not what they are made of.
            names = [name for name in matches if name.count(".") == pattern.count(".")]
            names = [name for name in names if not _runs_before_the_streams(name, first)]
            if not names:
                raise ValueError(f"context: no module after {first} is called like {pattern!r}")
        else:
            _submodule(model, pattern)
            if _runs_before_the_streams(pattern, first):
                raise ValueError(
                    f"context: {pattern} runs before the streams part after {first}: name later "
                    "modules"
                )
            names = [pattern]
        for name in names:
            resolved[name] = {**resolved.get(name, {}), **dims}
    return resolved


def _runs_before_the_streams(name: str, first: str) -> bool:
    """Whether a module is, holds, or in some list stands before the first insertion."""
    parts, first_parts = name.split("."), first.split(".")
    for one, other in zip(parts, first_parts, strict=False):
        if one != other:
            return one.isdigit() and other.isdigit() and int(one) < int(other)
    return len(parts) <= len(first_parts)
