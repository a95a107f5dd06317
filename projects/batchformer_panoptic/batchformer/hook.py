"""Where the block sits in an encoder: opens the second stream, and vanishes in evaluation."""

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from .block import BatchFormerV2
from .streams import SINGLE, TWO_STREAMS, StreamState


class IdentityHook(nn.Module):
    """The hook of an encoder without BatchFormerV2: one stream, nothing done."""

    def after_layer(
        self, index: int, tokens: Tensor, streams: StreamState, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, StreamState]:
        """Return ``tokens`` and ``streams`` as they are."""
        return tokens, streams


class BatchFormerHook(nn.Module):
    """BatchFormerV2 after chosen encoder layers, in two streams (arXiv 2204.01254, section 3.3).

    The first insertion keeps the batch as the original stream and adds the block's output as the
    batchformer stream. Later insertions send the batchformer stream through their block and leave
    the original stream as it is. In evaluation mode nothing happens: same tensors, one stream.

    The blocks sit under ``blocks.<layer>``, or under ``blocks.shared`` when one serves all.

    Args:
        embed_dim: channels of a token.
        insert_layers: indices, from 0, of the encoder layers after which a block acts.
        num_heads: attention heads of a block.
        dim_feedforward: hidden width of a block's feed-forward layer. None: ``embed_dim``.
        dropout: dropout of a block.
        shared: use one block for all insertions.
        mask_padding: keep padding out of the batch attention. Published: False, padding positions
            take part.

    Raises:
        ValueError: ``insert_layers`` is empty, negative or repeats itself.
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
    ) -> None:
        super().__init__()
        layers = sorted(insert_layers)
        if not layers or layers[0] < 0 or len(set(layers)) != len(layers):
            raise ValueError(
                f"insert_layers must name distinct layers from 0 on, not {list(insert_layers)}"
            )
        self.insert_layers = tuple(layers)
        self.mask_padding = mask_padding
        self.shared = shared
        self.blocks = nn.ModuleDict(
            {
                name: BatchFormerV2(
                    embed_dim,
                    num_heads=num_heads,
                    dim_feedforward=dim_feedforward,
                    dropout=dropout,
                )
                for name in (["shared"] if shared else map(str, layers))
            }
        )

    def after_layer(
        self, index: int, tokens: Tensor, streams: StreamState, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, StreamState]:
        """Apply the block that belongs after encoder layer ``index``, if there is one.

        Args:
            index: the encoder layer that has just run.
            tokens: (B', N, C) its output, B' = B times the number of streams.
            streams: the streams that ``tokens`` carries.
            key_padding_mask: (B', N) bool, True where a token is padding, or None if none is.

        Returns:
            The tokens and the streams they carry now. Whatever is per image must be expanded by
            the caller when the streams have changed.
        """
        if not self.training or index not in self.insert_layers:
            return tokens, streams
        # Before the first insertion the one stream is both what stays and what the block reads.
        original, source = (tokens, tokens) if streams == SINGLE else streams.split(tokens)
        mask = None
        if self.mask_padding and key_padding_mask is not None:
            mask = streams.split(key_padding_mask)[0]
        if source.shape[0] == 1:
            warnings.warn(
                "BatchFormerV2 got a batch of one image: attention over a single image mixes "
                "nothing. Use at least two images per process.",
                stacklevel=2,
            )
        block = self.blocks["shared" if self.shared else str(index)]
        return TWO_STREAMS.join([original, block(source, mask)]), TWO_STREAMS
