"""The BatchFormerV2 block: a Transformer encoder layer along the batch axis."""

from torch import Tensor, nn


class BatchFormerV2(nn.TransformerEncoderLayer):
    """Lets every token attend to the tokens at the same position of the other images.

    A post-norm Transformer encoder layer (multi-head attention, ReLU feed-forward, layer norms)
    whose sequence is the batch: N independent sequences of length B (arXiv 2204.01254, section
    3.2). It has no positional encoding, so permuting the images permutes the output. With one
    token per image (N = 1) it is the image-level BatchFormer (v1).

    Parameter names are those of ``torch.nn.TransformerEncoderLayer`` and of the public code.

    Args:
        embed_dim: channels C of a token.
        num_heads: attention heads; must divide ``embed_dim``.
        dim_feedforward: hidden width of the feed-forward layer. None: ``embed_dim``.
        dropout: probability for attention weights, feed-forward and residual branches.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_heads: int = 4,
        dim_feedforward: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        if embed_dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide embed_dim ({embed_dim})")
        super().__init__(
            d_model=embed_dim,
            nhead=num_heads,
            dim_feedforward=dim_feedforward or embed_dim,
            dropout=dropout,
            batch_first=False,  # dimension 0, here the images, is the sequence
        )

    # The base class names its arguments after sequences; here they are images and tokens.
    def forward(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Attend over the images of the batch, separately at each position.

        Args:
            tokens: (B, N, C).
            key_padding_mask: (B, N) bool, True where a token is padding and must not be attended
                to, or None as published. Positions that are padding in every image are attended
                to all the same: there is nothing else, and nobody reads them.

        Returns:
            (B, N, C), a new tensor.
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
        return super().forward(tokens, src_key_padding_mask=ignored)
