"""BatchFormerV2 on a model that somebody else wrote."""

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .attached import AttachedBatchFormer
from .hook import BatchFormerHook
from .layout import Layout, check_layout

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
        close = difflib.get_close_matches(name, modules, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"{type(model).__name__} has no module {name!r}{hint}")
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
