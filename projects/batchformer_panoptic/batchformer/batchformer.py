"""BatchFormerV2 (arXiv 2204.01254) in one file: the streams, the block, the hook, the encoder loop.

Shapes: B images, S streams, B' = S * B entries, N tokens of an image, C channels.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .exchange import MapSizes, num_processes, over_all_processes

# --- streams: the copies of the batch that a tensor holds ----------------------------------------

ORIGINAL = "original"
BATCHFORMER = "batchformer"

T = TypeVar("T")


@dataclass(frozen=True)
class StreamState:
    """The number and the order of the streams along dimension 0 of a batch.

    A batch of B images with S streams has B' = S * B entries along dimension 0, stream after
    stream, the original stream first. Everything that has one entry per image (B entries) is
    brought to B' entries by :meth:`expand`. The number of streams is always stated, and never
    inferred from the length of a tensor.
    """

    names: tuple[str, ...] = (ORIGINAL,)

    @property
    def num_streams(self) -> int:
        """Number of streams S."""
        return len(self.names)

    def expand(self, per_image: Tensor, dim: int = 0) -> Tensor:
        """(B, ...) -> (S * B, ...): one copy for each stream; the tensor itself when S is 1.

        Args:
            per_image: any tensor.
            dim: its batch dimension.
        """
        if self.num_streams == 1:
            return per_image
        return torch.cat([per_image] * self.num_streams, dim=dim)

    def expand_list(self, per_image: Sequence[T]) -> list[T]:
        """B items -> S * B items in the order of :meth:`expand`; the items are shared."""
        return list(per_image) * self.num_streams

    def image_of(self, entry: Tensor, num_images: int) -> Tensor:
        """Indices in [0, S * B) of an expanded batch -> indices in [0, B) of its images."""
        return entry if self.num_streams == 1 else entry % num_images

    def split(self, batch: Tensor) -> tuple[Tensor, ...]:
        """(S * B, ...) -> S views of (B, ...), in the order of ``names``.

        Raises:
            ValueError: the length of dimension 0 is not a multiple of the number of streams.
        """
        if batch.shape[0] % self.num_streams:
            raise ValueError(
                f"{batch.shape[0]} entries do not split into {self.num_streams} streams"
            )
        return batch.tensor_split(self.num_streams)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """S tensors (B, ...) -> (S * B, ...): the inverse of :meth:`split`."""
        if len(parts) != self.num_streams:
            raise ValueError(f"{len(parts)} parts for {self.num_streams} streams")
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def sum_losses(self, contributions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses as (S * B,) contributions of each entry -> 0-d sums, one for each stream.

        With one stream a loss keeps its name; with more, ``loss_x`` becomes
        ``loss_x/original``, ``loss_x/batchformer``. The sum over all values is unchanged.
        """
        by_stream = torch.stack(list(contributions.values())).unflatten(1, (self.num_streams, -1))
        sums = by_stream.sum(-1)
        if self.num_streams == 1:
            return dict(zip(contributions, sums[:, 0].unbind(), strict=True))
        names = [f"{name}/{stream}" for name in contributions for stream in self.names]
        return dict(zip(names, sums.flatten().unbind(), strict=True))


class Losses(dict[str, Tensor]):
    """Weighted 0-d losses by name, whose sum is the objective, with metrics besides.

    It is a plain dict for every trainer that adds up the values.

    Attributes:
        metrics: detached 0-d tensors to log that are not part of the objective.
    """

    def __init__(self, losses: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
        super().__init__(losses)
        self.metrics = {name: value.detach() for name, value in metrics.items()}


SINGLE = StreamState()
TWO_STREAMS = StreamState((ORIGINAL, BATCHFORMER))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to a tensor, or to every tensor in lists, tuples and mappings.

    Lists, tuples and named tuples keep their type, mappings become dicts, and all other values are
    returned unchanged.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return sequence_like(value, [map_tensors(item, change) for item in value])
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def sequence_like(sequence: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    """A list, tuple or named tuple of the type of ``sequence``, with other items."""
    kind = type(sequence)
    return kind._make(items) if hasattr(kind, "_make") else kind(items)


# --- the block: attention over the images of the batch (section 3.2) -----------------------------

Attend = Literal["batch", "self", "none"]
"""Images that a token attends to: all of the batch (published), its own only, or no layer at all.

The last two are controls.
"""

ATTENDS: tuple[str, ...] = get_args(Attend)

# Enough for the mean over an image; a prime, so that they are not all in one column.
_ENTROPY_POSITIONS = 127


class BatchFormerV2(nn.TransformerEncoderLayer):
    """Lets every token attend to the tokens at the same position of the other images.

    A post-norm Transformer encoder layer (multi-head attention, ReLU feed-forward, layer norms)
    whose sequence is the batch: N independent sequences of length B (arXiv 2204.01254, section
    3.2). It has no positional encoding, so permuting the images permutes the output. With one
    token per image (N = 1) it is the image-level BatchFormer (v1).

    With ``attend="self"``, not published, a token attends to itself only: the block as it acts on a
    batch of one image, whatever the batch. Nothing passes between images; what remains is a layer
    with dropout for the second stream. It tells the effect of that layer from the effect of
    attention over the batch. With ``attend="none"`` the tokens are returned as they are, so that
    both streams are equal (but for dropout in later layers) and train as one: a check of the code
    around the block.

    Parameter names are those of ``torch.nn.TransformerEncoderLayer`` and of the public code, and
    the same for all of ``attend``.

    Args:
        embed_dim: channels C of a token.
        num_heads: attention heads; must divide ``embed_dim``.
        dim_feedforward: hidden width of the feed-forward layer. None: ``embed_dim``.
        dropout: probability for attention weights, feed-forward and residual branches.
        attend: one of ``ATTENDS``.

    Raises:
        ValueError: ``num_heads`` does not divide ``embed_dim``, or ``attend`` is unknown.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_heads: int = 4,
        dim_feedforward: int | None = None,
        dropout: float = 0.5,
        attend: Attend = "batch",
    ) -> None:
        if embed_dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide embed_dim ({embed_dim})")
        if attend not in ATTENDS:
            raise ValueError(f"unknown attend {attend!r}; known: {', '.join(ATTENDS)}")
        super().__init__(
            d_model=embed_dim,
            nhead=num_heads,
            dim_feedforward=dim_feedforward or embed_dim,
            dropout=dropout,
            batch_first=False,  # dimension 0, which is the batch here, is the sequence
        )
        self.attend = attend

    # The base class names its arguments after sequences; here they are images and tokens.
    def forward(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Attend over the images of the batch, separately at each position.

        Args:
            tokens: (B, N, C).
            key_padding_mask: (B, N) bool, True where a token is padding and must not be attended
                to, or None as published. A position that is padding in every image keeps its
                attention (a fully masked softmax is NaN); its output is not used. A token that
                attends to itself only has nothing to leave out.

        Returns:
            (B, N, C).

        Raises:
            ValueError: the tokens or the mask have another shape.
        """
        if tokens.dim() != 3:
            raise ValueError(f"tokens must be (B, N, C), not of shape {tuple(tokens.shape)}")
        ignored = None
        if key_padding_mask is not None:
            if key_padding_mask.shape != tokens.shape[:2]:
                raise ValueError(
                    f"key_padding_mask must be {tuple(tokens.shape[:2])}, "
                    f"not {tuple(key_padding_mask.shape)}"
                )
            ignored = (key_padding_mask & ~key_padding_mask.all(dim=0)).transpose(0, 1)
        if self.attend == "none":
            return tokens
        if self.attend == "self":
            x = self.norm1(tokens + self.dropout1(self._attend_to_self(tokens)))
            hidden = self.dropout(self.activation(self.linear1(x)))
            return self.norm2(x + self.dropout2(self.linear2(hidden)))
        return super().forward(tokens, src_key_padding_mask=ignored)

    @torch.no_grad()
    def attention_entropy(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Mean entropy of the attention over the images, for monitoring.

        It is computed from queries and keys again, at evenly spaced positions, so that the forward
        pass keeps its fused kernel. It draws no random numbers, and dropout does not count.

        Args:
            tokens: (B, N, C), as in :meth:`forward`; with ``attend="batch"`` only.
            key_padding_mask: (B, N) bool, as in :meth:`forward`.

        Returns:
            A 0-d float tensor in nats: 0 if every token attends to one image only, log B if it
            attends to all of them equally.
        """
        positions = min(tokens.shape[1], _ENTROPY_POSITIONS)
        chosen = torch.arange(positions, device=tokens.device) * tokens.shape[1] // positions
        attention, width = self.self_attn, self.self_attn.embed_dim
        weight, bias = attention.in_proj_weight[: 2 * width], attention.in_proj_bias[: 2 * width]
        by_head = F.linear(tokens[:, chosen], weight, bias).float()
        queries, keys = by_head.unflatten(-1, (2, attention.num_heads, -1)).unbind(2)
        logits = torch.einsum("inhc,jnhc->nhij", queries, keys) / attention.head_dim**0.5
        if key_padding_mask is not None:
            ignored = key_padding_mask & ~key_padding_mask.all(dim=0)
            logits.masked_fill_(ignored[:, chosen].T[:, None, None], -torch.inf)
        return torch.special.entr(logits.softmax(-1)).sum(-1).mean()

    def _attend_to_self(self, tokens: Tensor) -> Tensor:
        """Attention over a sequence of one token: softmax gives 1, so only values are needed."""
        attention, width = self.self_attn, self.self_attn.embed_dim
        bias = attention.in_proj_bias[-width:]
        values = F.linear(tokens, attention.in_proj_weight[-width:], bias)
        by_head = values.unflatten(-1, (attention.num_heads, -1))
        weights = F.dropout(
            by_head.new_ones(*by_head.shape[:-1], 1), attention.dropout, self.training
        )
        projected: Tensor = attention.out_proj((weights * by_head).flatten(-2))
        return projected


# --- the hook: where the block acts in an encoder (section 3.3) ----------------------------------


class IdentityHook(nn.Module):
    """The hook of an encoder without BatchFormerV2: one stream, and no change."""

    def after_layer(
        self, index: int, tokens: Tensor, streams: StreamState, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, StreamState]:
        """Return ``tokens`` and ``streams`` unchanged."""
        return tokens, streams


class BatchFormerHook(nn.Module):
    """BatchFormerV2 after chosen encoder layers, in two streams (arXiv 2204.01254, section 3.3).

    The first insertion keeps the batch as the original stream and adds the block's output as the
    batchformer stream. Later insertions send the batchformer stream through their block and leave
    the original stream unchanged. In evaluation mode the hook returns its inputs.

    With ``every`` above 1 (not published) the second stream opens at every so many training steps
    only, and other steps are those of the plain model. The total of two streams is their mean, as
    large as the loss of one, so all steps weigh the same.

    The blocks are ``blocks.<layer>``, or ``blocks.shared`` when one block serves all insertions.

    Args:
        embed_dim: channels of a token.
        insert_layers: indices, from 0, of the encoder layers after which a block acts.
        num_heads: attention heads of a block.
        dim_feedforward: hidden width of a block's feed-forward layer. None: ``embed_dim``.
        dropout: dropout of a block.
        shared: use one block for all insertions.
        mask_padding: exclude padding from the batch attention. Published: False, padded positions
            take part.
        attend: images that a token attends to, see :class:`BatchFormerV2`.
        every: the second stream opens when ``step`` is a multiple of it.
        sync: attend over the images of all processes (``torch.distributed``), not only those of
            this one. Not published. All processes have to run the hook together, in training.

    Attributes:
        step: the training step, set by the training loop; it is needed only with ``every``.
        measures_entropy: set by a training loop that logs the next forward pass.
        entropies: by layer, the last `BatchFormerV2.attention_entropy` that was measured.

    Raises:
        ValueError: ``insert_layers`` is empty, or has negative or repeated entries; ``every`` is
            below 1; ``sync`` without attention over the batch; or a value that the block refuses.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        insert_layers: Sequence[int] = (0,),
        num_heads: int = 4,
        dim_feedforward: int | None = None,
        dropout: float = 0.5,
        shared: bool = False,
        mask_padding: bool = False,
        attend: Attend = "batch",
        every: int = 1,
        sync: bool = False,
    ) -> None:
        super().__init__()
        layers = sorted(insert_layers)
        if not layers or layers[0] < 0 or len(set(layers)) != len(layers):
            raise ValueError(
                f"insert_layers must name distinct layers from 0 on, not {list(insert_layers)}"
            )
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {every}")
        if sync and attend != "batch":
            raise ValueError(f"sync has no effect with attend={attend!r}: leave it out")
        self.step, self.every = 0, every
        self.measures_entropy = False
        self.entropies: dict[int, Tensor] = {}
        self.embed_dim = embed_dim
        self.insert_layers = tuple(layers)
        self.mask_padding = mask_padding
        self.shared = shared
        self.attend = attend
        self.sync = sync
        self.blocks = nn.ModuleDict(
            {
                name: BatchFormerV2(
                    embed_dim,
                    num_heads=num_heads,
                    dim_feedforward=dim_feedforward,
                    dropout=dropout,
                    attend=attend,
                )
                for name in (["shared"] if shared else map(str, layers))
            }
        )

    def after_layer(
        self,
        index: int,
        tokens: Tensor,
        streams: StreamState,
        key_padding_mask: Tensor | None,
        map_sizes: MapSizes | None = None,
    ) -> tuple[Tensor, StreamState]:
        """Apply the block that belongs after encoder layer ``index``, if there is one.

        Args:
            index: the encoder layer that has just run.
            tokens: (B', N, C), its output.
            streams: the streams of ``tokens``.
            key_padding_mask: (B, N) bool, True where a token is padding, or None if there is no
                padding. It is per image: both streams share it.
            map_sizes: (height, width) of the maps that the tokens are the cells of; needed only
                with ``sync`` and maps whose sizes differ between processes.

        Returns:
            The tokens, and the streams that they have now. If they have changed, the caller
            expands its per-image tensors, as :func:`encode` does.
        """
        if not self.training or index not in self.insert_layers or self.step % self.every:
            return tokens, streams
        # At the first insertion, the one stream is both the original and the block's input.
        original, source = (tokens, tokens) if streams == SINGLE else streams.split(tokens)
        synced = self.sync and num_processes() > 1
        if self.attend == "batch" and source.shape[0] == 1 and not synced:
            warnings.warn(
                "BatchFormerV2 got a batch of one image: attention over a single image mixes "
                "nothing. Use at least two images per process, attention over the images of "
                "several processes (sync), or attend='self'.",
                stacklevel=2,
            )
        block = self.blocks["shared" if self.shared else str(index)]
        assert isinstance(block, BatchFormerV2)
        mask = key_padding_mask if self.mask_padding else None

        # With SYNC, a process may have no position to measure; all have to measure or none.
        measures = self.measures_entropy and self.attend == "batch"
        measures = measures and (not synced or source.shape[1] >= num_processes())

        def attend(tokens: Tensor, ignored: Tensor | None) -> Tensor:
            if measures:
                self.entropies[index] = block.attention_entropy(tokens, ignored)
            attended: Tensor = block(tokens, ignored)
            return attended

        if synced:
            attended = over_all_processes(attend, source, mask, map_sizes)
        else:
            attended = attend(source, mask)
        return TWO_STREAMS.join([original, attended]), TWO_STREAMS


# --- the encoder loop ----------------------------------------------------------------------------


def encode(
    layers: Iterable[Callable[..., Tensor]],
    hook: IdentityHook | BatchFormerHook,
    tokens: Tensor,
    *per_image: Any,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, StreamState, tuple[Any, ...]]:
    """Run encoder layers, with the hook after each of them.

    Args:
        layers: called in turn as ``layer(tokens, *per_image)``; each returns (B', N, C) tokens.
        hook: acts after each layer, and may open the second stream.
        tokens: (B, N, C).
        *per_image: further arguments of the layers, such as position encodings. Tensors (B, ...)
            in them, nested ones included, are expanded to the B' entries of the tokens; other
            values (None, sizes of maps) are passed as they are.
        key_padding_mask: (B, N) bool for the hook, True where a token is padding, or None. It is
            not passed to the layers.

    Returns:
        The encoded tokens (B', N, C), the streams along B', and ``per_image`` expanded to B'.
    """
    streams, expanded = SINGLE, per_image
    for index, layer in enumerate(layers):
        tokens = layer(tokens, *expanded)
        tokens, now = hook.after_layer(index, tokens, streams, key_padding_mask)
        if now != streams:
            streams = now
            expanded = map_tensors(per_image, streams.expand)
    return tokens, streams, expanded
