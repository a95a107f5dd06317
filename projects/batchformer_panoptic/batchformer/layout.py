"""How a batch of tokens lies in a tensor, stated by whoever attaches and never guessed."""

from typing import Literal, get_args

from torch import Tensor

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
