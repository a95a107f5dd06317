"""The encoder of DETR, with a hook after each layer.

Shapes: B images, B' = streams * B, N tokens, C channels.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ...batchformer import BatchFormerHook, IdentityHook, StreamState
from ...batchformer.streams import SINGLE
from .layers import EncoderLayer


class DETREncoder(nn.Module):
    """Encoder layers with a hook after each; the hook may open a second stream.

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
        streams = SINGLE
        layer_pos, layer_mask = pos, key_padding_mask
        for index, layer in enumerate(self.layers):
            tokens = layer(tokens, layer_pos, layer_mask)
            tokens, now = self.batchformer.after_layer(index, tokens, streams, layer_mask)
            if now != streams:
                streams = now
                layer_pos = streams.expand(pos)
                layer_mask = None if key_padding_mask is None else streams.expand(key_padding_mask)
        return (tokens if self.norm is None else self.norm(tokens)), streams
