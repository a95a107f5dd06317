"""Attaches BatchFormerV2 to any model, by forward hooks that exist in training mode only.

Shapes: B images; two streams of B entries each in training, the original stream first.
"""

import fnmatch
import inspect
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import did_you_mean
from .batchformer import (
    ORIGINAL,
    SINGLE,
    TWO_STREAMS,
    Attend,
    BatchFormerHook,
    StreamState,
    map_tensors,
    sequence_like,
)
from .exchange import MapSizes

Layout = Literal["BNC", "NBC", "BHWC", "BCHW", "BC"]
"""B images, N (or H x W) positions, C channels; "BC" is one token for each image."""

LAYOUTS: tuple[str, ...] = get_args(Layout)

Context = Mapping[str, Mapping[str | int, int]]
"""Module name or pattern -> argument name or position -> batch dimension of that argument."""


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
    attend: Attend = "batch",
    sync: bool = False,
    context: Context | None = None,
    name: str = "batchformer",
) -> "AttachedBatchFormer":
    """Attach BatchFormerV2 (arXiv 2204.01254) to a model, in place.

    In training mode the batch splits into two streams after the first module of ``after``: the
    unchanged tokens, and the tokens after attention over the images of the batch. All later modules
    are shared and return 2B entries, the original stream first. Evaluation mode is unchanged. The
    class of the model and its parameter names do not change; the blocks are added as ``name``.

    Attach before the optimizer, ``DistributedDataParallel`` and ``torch.compile`` are created:
    they collect the parameters and the code of the model only once.

    Args:
        model: any model.
        after: names (as in ``model.named_modules()``) of the modules after which the batch
            attention acts, in execution order. Each returns tokens, either as its only output or
            as the first item of a tuple or list.
        layout: the order of the dimensions of these tokens: "BNC" (batch first), "NBC" (sequence
            first), "BHWC" or "BCHW" (maps) or "BC" (one token for each image: BatchFormer v1).
        embed_dim: channels C of a token.
        num_heads: attention heads of a block; must divide ``embed_dim``.
        dim_feedforward: hidden width of a block's feed-forward layer. None: ``embed_dim``.
        dropout: dropout of a block.
        shared: use one block for all of ``after``.
        attend: "batch" as published; "self": a token attends to itself only, so that a batch of
            one image is enough; or "none" (see :class:`BatchFormerV2`). The weights fit all.
        sync: attend over the images of all processes (not published), so that one image in each is
            enough. Maps of "BHWC" and "BCHW" may differ in size between processes; for those of
            "BNC" and "NBC", set ``map_sizes`` of the handle before each step.
        context: per-image arguments of later modules that must be expanded to both streams, like
            padding masks and positional encodings: {module: {argument: batch dimension}}. A module
            may be a pattern like ``"layers.*"``, which skips the layers up to and including the
            first of ``after``; an argument may be a position.
        name: attribute name of the handle in the model.

    Returns:
        The handle: ``expand`` doubles targets, ``original`` and ``split`` separate the streams of
        outputs, ``plain_state_dict`` and ``detach`` return to the plain model.

    Raises:
        ValueError: a module that does not exist, a name that is taken, an unknown layout or one
            that contradicts the module, an unknown ``attend``, ``sync`` with another ``attend``
            than "batch", an argument that a module does not take, or sizes that do not fit.
        TypeError: the model is already wrapped or compiled.
    """
    _check_model(model, name)
    if layout not in LAYOUTS:
        raise ValueError(
            f"unknown layout {layout!r}: give the order of dimensions, one of {', '.join(LAYOUTS)} "
            "(B images, N or H x W positions, C channels)"
        )
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
        attend=attend,
        sync=sync,
    )
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        hook.to(parameter.device, parameter.dtype)
    handle = AttachedBatchFormer(
        model,
        name=name,
        after=after,
        layout=layout,
        hook=hook,
        context=_resolve(model, context or {}, first=after[0]),
    )
    model.add_module(name, handle)
    return handle.train(model.training)


# --- the handle ----------------------------------------------------------------------------------


class AttachedBatchFormer(nn.Module):
    """The handle of a model that BatchFormerV2 is attached to; created by :func:`attach`.

    The handle is a submodule of the model, so its blocks are trained, moved, saved and synchronised
    with the rest. It changes the model by forward hooks only. These are registered in training mode
    and removed in evaluation mode, where the model runs as if nothing were attached.

    A copy of the model has its own handle under the same name (``copy.batchformer``); the handle of
    a ``DistributedDataParallel`` is ``ddp.module.batchformer``.

    Attributes:
        map_sizes: with ``sync`` and the layouts "BNC" and "NBC", the (height, width) of the maps
            whose cells are the tokens of the next step, (1, 1) for a class token; needed only if
            they differ between processes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        after: Sequence[str],
        layout: str,
        hook: BatchFormerHook,
        context: Context,
    ) -> None:
        super().__init__()
        self.hook = hook
        self.layout = layout
        self.after = tuple(after)
        self.map_sizes: MapSizes | None = None
        # In a tuple, because a module that is assigned becomes a submodule.
        self._model = (model,)
        self._name = name
        self._context = {
            module: ContextExpander(module, model.get_submodule(module), batch_dims)
            for module, batch_dims in context.items()
        }
        self._first_pass = FirstPass(self.after, layout)
        self._handles: list[RemovableHandle] = []

    @property
    def streams(self) -> StreamState:
        """The streams of the model's outputs in its current mode."""
        return TWO_STREAMS if self.training else SINGLE

    def train(self, mode: bool = True) -> "AttachedBatchFormer":
        """Switch to two streams, or (False) to the plain model."""
        super().train(mode)
        self._remove_hooks()
        if mode:
            self._register_hooks()
        return self

    def forward(self, batch: Any) -> Any:
        """Return ``batch`` unchanged: a ``Sequential`` calls all of its submodules."""
        return batch

    def expand(self, targets: Any) -> Any:
        """Targets of B images -> targets of all entries that the model returns in its current mode.

        Args:
            targets: a tensor (B, ...), a list with one item for each image, or a dict of these. In
                evaluation mode they are returned unchanged.

        Raises:
            TypeError: another type, in which the entries of an image cannot be identified.
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
                such tensors (mappings become dicts, tuples stay tuples). Each stream is given all
                other values. In evaluation mode there is one stream, "original".

        Raises:
            ValueError: an odd number of entries along the first dimension of a tensor.
        """
        streams = self.streams

        def part(index: int) -> Any:
            return map_tensors(outputs, lambda x: streams.split(x)[index] if x.dim() else x)

        return {name: part(index) for index, name in enumerate(streams.names)}

    def original(self, outputs: Any) -> Any:
        """Return the original stream of the outputs: those of the B images, in both modes."""
        return self.split(outputs)[ORIGINAL]

    def plain_state_dict(self) -> dict[str, Any]:
        """Return the state dict of the model without the blocks, under unchanged keys."""
        (model,) = self._model
        state = model.state_dict()  # edited in place, because it also holds version metadata
        for key in [key for key in state if key.startswith(f"{self._name}.")]:
            del state[key]
        return state

    def detach(self) -> None:
        """Remove the handle and its hooks from the model; the trained weights of the model stay.

        Raises:
            RuntimeError: it is already detached.
        """
        (model,) = self._model
        if model._modules.get(self._name) is not self:
            raise RuntimeError("BatchFormerV2 is not attached to this model any more")
        self._remove_hooks()
        delattr(model, self._name)
        if "torch._dynamo" in sys.modules:  # compiled code does not notice removed hooks
            torch.compiler.reset()

    def extra_repr(self) -> str:
        """Return the insertions, for ``print(model)``."""
        return f"after={list(self.after)}, layout={self.layout!r}"

    def _register_hooks(self) -> None:
        (model,) = self._model
        self._first_pass.watch(model)
        for index, name in enumerate(self.after):
            # A partial of a method, not a closure: copied and pickled models have their own.
            insertion = partial(self._after_module, index)
            self._handles.append(model.get_submodule(name).register_forward_hook(insertion))
        for name, expander in self._context.items():
            module = model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(expander, with_kwargs=True))

    def _remove_hooks(self) -> None:
        self._first_pass.stop()
        while self._handles:
            self._handles.pop().remove()

    def _after_module(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        """The forward hook of the ``index``-th module of ``after``."""
        if isinstance(output, Tensor):
            return self._insert(index, output)
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            return sequence_like(output, [self._insert(index, output[0]), *output[1:]])
        raise TypeError(
            f"{self.after[index]} returns {type(output).__name__}: BatchFormerV2 needs a module "
            "that returns tokens, or a tuple or list that starts with them"
        )

    def _insert(self, index: int, tokens: Tensor) -> Tensor:
        self._first_pass.at_insertion(index, tokens)
        batch = to_tokens(tokens, self.layout)
        if batch.shape[-1] != self.hook.embed_dim:
            raise ValueError(
                f"{self.after[index]} returned {tuple(tokens.shape)}, in layout {self.layout} "
                f"{batch.shape[-1]} channels, but embed_dim is {self.hook.embed_dim}"
            )
        sizes = self.map_sizes
        if self.layout in ("BHWC", "BCHW"):
            start = self.layout.index("H")
            sizes = ((tokens.shape[start], tokens.shape[start + 1]),)
        streams = TWO_STREAMS if index else SINGLE
        joined, _ = self.hook.after_layer(index, batch, streams, None, sizes)
        return from_tokens(joined.to(tokens.dtype), self.layout, tokens)


# --- checks of the arguments of attach -----------------------------------------------------------


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
        if isinstance(module, AttachedBatchFormer):
            raise ValueError(
                f"BatchFormerV2 is attached to this model already, as {part!r}: name all modules "
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
    """Compare the layout with ``batch_first`` of torch's own layers."""
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


# --- context: per-image arguments of later modules -----------------------------------------------


class ContextExpander:
    """A forward pre-hook that expands per-image arguments of a module to both streams.

    Tensors are expanded along their batch dimension, also those in lists, tuples and dicts; None
    and all other values pass unchanged. The expander has no state, so that activation checkpointing
    may run the module twice.

    Args:
        name: name of the module, for messages.
        module: the module that the expander is registered on (``with_kwargs=True``).
        batch_dims: argument name, or position from 0 -> its batch dimension.

    Raises:
        ValueError: the module does not take such an argument.
    """

    def __init__(self, name: str, module: nn.Module, batch_dims: Mapping[str | int, int]) -> None:
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

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments, with the named ones expanded."""
        new_args, new_kwargs = list(args), dict(kwargs)
        for name, position, dim in self.arguments:
            expand = partial(TWO_STREAMS.expand, dim=dim)
            if name is not None and name in new_kwargs:
                new_kwargs[name] = map_tensors(new_kwargs[name], expand)
            elif position is not None and position < len(new_args):
                new_args[position] = map_tensors(new_args[position], expand)
        return tuple(new_args), new_kwargs


def _positions(module: nn.Module) -> dict[str, int | None]:
    """Arguments of ``forward`` -> position; None for keyword-only arguments."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {
        parameter.name: None if parameter.kind is inspect.Parameter.KEYWORD_ONLY else position
        for position, parameter in enumerate(parameters)
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }


def _resolve(model: nn.Module, context: Context, *, first: str) -> Context:
    """Replace patterns by module names, without the modules that run before the first insertion."""
    resolved: dict[str, dict[str | int, int]] = {}
    for pattern, dims in context.items():
        if any(sign in pattern for sign in "*?["):
            matches = fnmatch.filter((name for name, _ in model.named_modules()), pattern)
            # "layers.*" means the layers themselves, not their submodules.
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
    """Whether a module is, contains, or precedes in a module list, the first insertion."""
    parts, first_parts = name.split("."), first.split(".")
    for one, other in zip(parts, first_parts, strict=False):
        if one != other:
            return one.isdigit() and other.isdigit() and int(one) < int(other)
    return len(parts) <= len(first_parts)


# --- layouts -------------------------------------------------------------------------------------


def to_tokens(batch: Tensor, layout: str) -> Tensor:
    """A batch in ``layout`` -> (B, N, C).

    Raises:
        ValueError: the number of dimensions is not that of the layout.
    """
    if batch.dim() != len(layout):
        raise ValueError(f"a tensor of shape {tuple(batch.shape)} is not {layout}")
    if layout == "BC":
        return batch[:, None]
    return batch.movedim((layout.index("B"), layout.index("C")), (0, -1)).flatten(1, -2)


def from_tokens(tokens: Tensor, layout: str, like: Tensor) -> Tensor:
    """(B', N, C) -> ``layout``, with the height, width and memory format of ``like``.

    Inverse of :func:`to_tokens`. Later modules may rely on the memory format (``view``).
    """
    if layout == "BC":
        batch = tokens[:, 0]
    else:
        sizes = [size for size, dim in zip(like.shape, layout, strict=True) if dim not in "BC"]
        batch = tokens.unflatten(1, sizes)
        batch = batch.movedim((0, -1), (layout.index("B"), layout.index("C")))
    return batch.contiguous() if like.is_contiguous() else batch


# --- checks of the first forward pass ------------------------------------------------------------


class FirstPass:
    """Checks, in the first training step, what cannot be known before the model runs.

    That is the execution order of the modules ``after`` which a block acts, and the batch dimension
    of their tokens in ``layout``. Checks end with the first pass without an error; compiled code is
    not checked.
    """

    def __init__(self, after: Sequence[str], layout: str) -> None:
        self.after = tuple(after)
        self.layout = layout
        self.passed = False
        self.num_images: int | None = None
        self.seen: list[int] | None = None  # insertions of this pass; None: nothing is checked
        self._handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module) -> None:
        """Register the checks before and after a forward pass of the model."""
        if not self.passed:
            begin = model.register_forward_pre_hook(self._begin, with_kwargs=True)
            self._handles = [begin, model.register_forward_hook(self._end)]

    def stop(self) -> None:
        """Remove the checks."""
        self.seen = None
        while self._handles:
            self._handles.pop().remove()

    def at_insertion(self, index: int, tokens: Tensor) -> None:
        """Check one insertion.

        Raises:
            ValueError: the layout has another batch dimension, or another module was due.
        """
        if self.seen is None:  # also where a part of the model is called, not the model
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

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.seen = None if torch.compiler.is_compiling() else []
        counts = (_count_images(value) for value in [*args, *kwargs.values()])
        self.num_images = next((count for count in counts if count is not None), None)

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.seen is None:
            return
        if len(self.seen) != len(self.after):
            raise ValueError(self._order(self.seen))
        self.passed = True
        self.stop()

    def _order(self, seen: Sequence[int]) -> str:
        ran = [self.after[index] for index in seen]
        return (
            f"after names {list(self.after)}, but what ran was {ran}: name modules that run once "
            "in each forward pass, in the order they run in"
        )


def _count_images(value: Any) -> int | None:
    """Images in a tensor (B, C, H, W), a list of them, or an object with such ``tensors``."""
    value = getattr(value, "tensors", value)  # DETR's NestedTensor
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() == 4 else None
    return len(value) if isinstance(value, list) and value else None
