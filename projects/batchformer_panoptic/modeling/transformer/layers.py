"""Padding masks, encoder and decoder of DETR (Carion et al. 2020, appendix A.3), and their bases.

Shapes: B images, B' = streams * B, N tokens of the encoder, Q queries, C channels, L decoder
layers. Parameter names are those of facebookresearch/detr.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...batchformer import BatchFormerHook, IdentityHook, StreamState, encode

# --- padding ----------------------------------------------------------------------------------


class BatchPadding(NamedTuple):
    """The image sizes of a batch, as host numbers, and the padding masks derived from them.

    Attributes:
        image_sizes: (height, width) in pixels of each of the B images, before padding.
        padded_size: (height, width) in pixels of the batch.
    """

    image_sizes: Sequence[tuple[int, int]]
    padded_size: tuple[int, int]

    @property
    def is_padded(self) -> bool:
        """Whether any image is smaller than the padded size."""
        return any(tuple(size) != tuple(self.padded_size) for size in self.image_sizes)

    def mask_like(self, feature_map: Tensor) -> Tensor:
        """(B, h, w) bool on the device of a (B, C, h, w) map, True where a cell is padding."""
        height, width = feature_map.shape[-2:]
        return padding_mask(self.image_sizes, self.padded_size, (height, width), feature_map.device)

    def sizes_xy(self, device: torch.device) -> Tensor:
        """(B, 2) float32: width and height in pixels of each image, before padding."""
        sizes = torch.tensor(self.image_sizes, dtype=torch.float32).flip(-1)
        return sizes.to(device, non_blocking=True)


class ExportedPadding(BatchPadding):
    """The same for an exported graph, in which ``image_sizes`` is an int64 tensor (B, 2)."""

    @property
    def is_padded(self) -> bool:
        """True: the graph is made once for all sizes."""
        return True

    def mask_like(self, feature_map: Tensor) -> Tensor:
        """See `BatchPadding`."""
        rows, columns = (
            self._valid_cells(axis, feature_map.shape[2 + axis], feature_map.device)
            for axis in (0, 1)
        )
        return ~(rows[:, :, None] & columns[:, None])

    def _valid_cells(self, axis: int, num_cells: int, device: torch.device) -> Tensor:
        cells = torch.arange(num_cells, dtype=torch.float32, device=device)
        scale = torch.full((), self.padded_size[axis], dtype=torch.float32) / num_cells
        return (cells * scale).floor() < torch.as_tensor(self.image_sizes)[:, axis, None]

    def sizes_xy(self, device: torch.device) -> Tensor:
        """See `BatchPadding`."""
        return torch.as_tensor(self.image_sizes).float().flip(-1)


def batch_padding(
    image_sizes: Sequence[tuple[int, int]] | Tensor, padded_size: tuple[int, int]
) -> BatchPadding:
    """The padding of a batch; sizes are a tensor (B, 2) in a graph to be exported."""
    if isinstance(image_sizes, Tensor):
        return ExportedPadding(image_sizes, padded_size)  # type: ignore[arg-type]
    # While the model is traced the sizes are tensors.
    return BatchPadding([(int(height), int(width)) for height, width in image_sizes], padded_size)


def padding_mask(
    image_sizes: Sequence[tuple[int, int]],
    padded_size: tuple[int, int],
    map_size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Padding masks at the resolution of a feature map.

    Equal to nearest-neighbour resizing of the full-resolution padding mask, as in DETR, but without
    that mask: rows and columns are resized separately, on the host.

    Args:
        image_sizes: (height, width) in pixels of each of the B images, before padding.
        padded_size: (height, width) in pixels of the batch.
        map_size: (h, w) of the feature map.
        device: device of the mask.

    Returns:
        (B, h, w) bool, True where the cell is padding.
    """
    sizes = np.asarray(image_sizes)
    rows, columns = (
        # While the model is traced the sizes are tensors.
        _nearest_pixels(int(padded_size[axis]), int(map_size[axis])) < sizes[:, axis, None]
        for axis in (0, 1)
    )
    mask = ~(rows[:, :, None] & columns[:, None, :])
    return torch.from_numpy(mask).to(device, non_blocking=True)


def _nearest_pixels(length: int, num_cells: int) -> np.ndarray:
    """(num_cells,) the pixel that PyTorch's nearest-neighbour resizing takes for each cell."""
    scale = np.float32(length) / np.float32(num_cells)
    return np.floor(np.arange(num_cells, dtype=np.float32) * scale).clip(max=length - 1)


# --- layers --------------------------------------------------------------------------------------


def attend(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Multi-head attention with fewer operations than its module, which also copies masks.

    Queries and keys are projected together where they are the same tensor.

    Args:
        attention: its parameters and its dropout are used; ``batch_first`` is not.
        query: (B', Q, C).
        key: (B', N, C).
        value: (B', N, C).
        mask: (B', Q or 1, N), bool and True where a query may attend, or float and added to the
            scores; None for everywhere.

    Returns:
        (B', Q, C).
    """
    width = attention.embed_dim
    inputs, widths = [query, key, value], [width, width, width]
    if query is key:
        inputs, widths = [query, value], [2 * width, width]
    weights, biases = attention.in_proj_weight.split(widths), attention.in_proj_bias.split(widths)
    projected = [F.linear(*of_input) for of_input in zip(inputs, weights, biases, strict=True)]
    if query is key:
        projected = [*projected[0].split(width, dim=-1), projected[1]]
    dropout = attention.dropout if attention.training else 0.0
    q, k, v = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in projected)
    attended = F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else mask[:, None], dropout_p=dropout
    )
    result: Tensor = attention.out_proj(attended.transpose(1, 2).flatten(2))
    if dropout > 0:
        # In memory the module's result has the queries first, and a dropout draws in this order.
        result = result.transpose(0, 1).contiguous().transpose(0, 1)
    return result


def padding_bias(key_padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B, N) bool, True at padding -> (B, 1, N) to add to scores, -inf there; None stays None.

    Made once for all layers; PyTorch would convert a bool mask in every layer.
    """
    if key_padding_mask is None:
        return None
    mask = key_padding_mask[:, None]
    return for_products(torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf))


def for_products(x: Tensor) -> Tensor:
    """Under autocast, cast a float32 input of several matrix products once.

    Autocast would cast it for each of them. Outside autocast the input is returned as it is.
    """
    device = x.device.type
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


class CheckpointedLayer(nn.Module):
    """Base of the layers that support activation checkpointing.

    Attributes:
        activation_checkpointing: in training, keep the inputs of the layer only, and run it a
            second time, with the same dropout, in the backward pass.
    """

    activation_checkpointing = False

    def __call__(self, *inputs: Any) -> Any:
        """Run the layer, including its forward hooks."""
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False)
        return super().__call__(*inputs)


class FeedForwardLayer(CheckpointedLayer):
    """Base of encoder and decoder layers: the feed-forward network with its residual and norm.

    Args:
        embed_dim: channels C.
        dim_feedforward: hidden width of the feed-forward network.
        dropout: the dropout probability of the hidden units and of the residual branches.
        pre_norm: normalise the input of each residual branch, and not the sum after it.
    """

    def __init__(
        self, *, embed_dim: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def _feed_forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        inner = norm(x) if self.pre_norm else x
        out = x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(inner)))))
        return out if self.pre_norm else norm(out)


class EncoderLayer(FeedForwardLayer):
    """Self-attention over the tokens of one image, then the feed-forward network."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool = False,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            pre_norm=pre_norm,
        )
        self.self_attn = nn.MultiheadAttention(
            embed_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(self, tokens: Tensor, pos: Tensor, padding_bias: Tensor | None) -> Tensor:
        """(B', N, C) tokens and positions, and :func:`padding_bias` (B', 1, N) -> (B', N, C)."""
        inner = self.norm1(tokens) if self.pre_norm else tokens
        query = inner + pos
        attended = attend(self.self_attn, query, query, inner, padding_bias)
        tokens = tokens + self.dropout(attended)
        if not self.pre_norm:
            tokens = self.norm1(tokens)
        return self._feed_forward(tokens, self.norm2)


class DecoderLayer(FeedForwardLayer):
    """Self-attention of the queries, cross-attention to the memory, feed-forward network."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool = False,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            pre_norm=pre_norm,
        )
        self.self_attn = nn.MultiheadAttention(
            embed_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.multihead_attn = nn.MultiheadAttention(
            embed_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        memory_keys: Tensor,
        padding_bias: Tensor | None,
    ) -> Tensor:
        """Update the queries.

        Args:
            queries: (B', Q, C) content of the queries.
            query_pos: (B', Q, C) learned positions, added to queries and keys of attention.
            memory: (B', N, C) values of the cross-attention.
            memory_keys: (B', N, C) its keys: memory plus position encoding.
            padding_bias: (B', 1, N) of :func:`padding_bias`, or None.

        Returns:
            (B', Q, C).
        """
        inner = self.norm1(queries) if self.pre_norm else queries
        keys = inner + query_pos
        attended = attend(self.self_attn, keys, keys, inner)
        queries = queries + self.dropout(attended)
        if not self.pre_norm:
            queries = self.norm1(queries)

        inner = self.norm2(queries) if self.pre_norm else queries
        attended = attend(self.multihead_attn, inner + query_pos, memory_keys, memory, padding_bias)
        queries = queries + self.dropout(attended)
        if not self.pre_norm:
            queries = self.norm2(queries)
        return self._feed_forward(queries, self.norm3)


# --- encoder -------------------------------------------------------------------------------------


class DETREncoder(nn.Module):
    """Encoder layers with BatchFormerV2's hook after each; the hook may open a second stream.

    Args:
        layers: the encoder layers.
        hook: an IdentityHook or a BatchFormerHook.
        norm: applied to the output, or None.
    """

    def __init__(
        self,
        layers: Sequence[EncoderLayer],
        *,
        hook: IdentityHook | BatchFormerHook,
        norm: nn.Module | None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.batchformer = hook
        self.norm = norm

    def forward(
        self, tokens: Tensor, pos: Tensor, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, StreamState]:
        """Encode (B, N, C) tokens into (B', N, C); ``pos`` (B, N, C), mask (B, N) or None."""
        tokens, streams, _ = encode(
            self.layers,
            self.batchformer,
            tokens,
            pos,
            padding_bias(key_padding_mask, tokens.dtype),
            key_padding_mask=key_padding_mask,
        )
        return (tokens if self.norm is None else self.norm(tokens)), streams


# --- decoders over a whole memory ----------------------------------------------------------------


class MemoryGrid(NamedTuple):
    """The positions of the memory's tokens, for decoders that compute in cells and pixels.

    Attributes:
        map_sizes: (height, width) in cells of each level, in the order of the tokens.
        padding: the sizes of the images.
        streams: the streams along B'.
    """

    map_sizes: Sequence[tuple[int, int]]
    padding: BatchPadding
    streams: StreamState

    def image_sizes_xy(self, device: torch.device) -> Tensor:
        """(B', 2) float32: width and height in pixels of each image, before padding."""
        return self.streams.expand(self.padding.sizes_xy(device))


class Decoder(nn.Module):
    """Base of the decoders that attend to the whole memory.

    Attributes:
        box_bias: initial box logits; None keeps the initialisation of the box head.
    """

    box_bias: tuple[float, ...] | None = None

    def forward(
        self,
        query_pos: Tensor,
        memory: Tensor,
        pos: Tensor,
        key_padding_mask: Tensor | None,
        grid: MemoryGrid,
    ) -> tuple[Tensor, Tensor | None]:
        """Decode.

        Args:
            query_pos: (B', Q, C) learned positions of the queries.
            memory: (B', N, C) output of the encoder.
            pos: (B', N, C) position encoding of its tokens.
            key_padding_mask: (B', N) bool, True at padding, or None.
            grid: the positions of the tokens in cells.

        Returns:
            (L, B', Q, C) normalised states after each layer, and the reference points as
            (L, B', Q, 2) float32 logits (x, y), or None.
        """
        raise NotImplementedError


class DETRDecoder(Decoder):
    """Decoder layers of DETR; the output of every layer is normalised and returned."""

    def __init__(self, layers: Sequence[DecoderLayer], *, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(
        self,
        query_pos: Tensor,
        memory: Tensor,
        pos: Tensor,
        key_padding_mask: Tensor | None,
        grid: MemoryGrid,
    ) -> tuple[Tensor, None]:
        """See :class:`Decoder`; there are no reference points."""
        memory, memory_keys = for_products(memory), for_products(memory + pos)
        bias = padding_bias(key_padding_mask, memory.dtype)
        queries = torch.zeros_like(query_pos)
        states = []
        for layer in self.layers:
            queries = layer(queries, query_pos, memory, memory_keys, bias)
            states.append(queries)
        return self.norm(torch.stack(states)), None
