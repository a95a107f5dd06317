"""What every decoder over a memory takes and returns; those of DETR and Conditional-DETR.

Shapes: B' images times streams, N tokens, Q queries, C channels, L decoder layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...batchformer import StreamState
from ...layers import MLP, sine_encoding
from ..padding import BatchPadding
from .layers import ConditionalDecoderLayer, DecoderLayer


class MemoryGrid(NamedTuple):
    """Where the tokens of a memory lie, for decoders that reckon in cells and pixels.

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
        sizes = torch.tensor(self.padding.image_sizes, dtype=torch.float32).flip(-1)
        return self.streams.expand(sizes.to(device, non_blocking=True))


class Decoder(nn.Module):
    """Base of the decoders that attend to a whole memory."""

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
            grid: where the tokens lie.

        Returns:
            (L, B', Q, C) normalised states after each layer, and the reference points as
            (L, B', Q, 2) float32 logits (x, y), or None.
        """
        raise NotImplementedError


class DETRDecoder(Decoder):
    """Decoder layers of DETR; every layer's output is normalised and returned."""

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
        memory_keys = memory + pos
        queries = torch.zeros_like(query_pos)
        states = []
        for layer in self.layers:
            queries = layer(queries, query_pos, memory, memory_keys, key_padding_mask)
            states.append(self.norm(queries))
        return torch.stack(states), None


class ConditionalDecoder(Decoder):
    """Decoder of Conditional-DETR (Meng et al. 2021, section 3): queries know where to look.

    Each query position gives a reference point, and the spatial part of the cross-attention asks
    for the neighbourhood of that point, scaled by what the query has seen so far. All layers
    regress from the same reference points, as published.
    """

    def __init__(self, layers: Sequence[ConditionalDecoderLayer], *, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(embed_dim)
        self.query_scale = MLP(
            input_dim=embed_dim, hidden_dim=embed_dim, output_dim=embed_dim, num_layers=2
        )
        self.ref_point_head = MLP(
            input_dim=embed_dim, hidden_dim=embed_dim, output_dim=2, num_layers=2
        )

    def forward(
        self,
        query_pos: Tensor,
        memory: Tensor,
        pos: Tensor,
        key_padding_mask: Tensor | None,
        grid: MemoryGrid,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Decoder`."""
        references = self.ref_point_head(query_pos).float()
        # Rows before columns, as the position encoding of the tokens.
        where = sine_encoding(references.sigmoid().flip(-1), query_pos.shape[-1])
        valid_mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
        queries = torch.zeros_like(query_pos)
        states = []
        for index, layer in enumerate(self.layers):
            spatial = where if index == 0 else where * self.query_scale(queries)
            queries = layer(queries, query_pos, spatial, memory, pos, valid_mask)
            states.append(self.norm(queries))
        return torch.stack(states), references.expand(len(states), -1, -1, -1)
