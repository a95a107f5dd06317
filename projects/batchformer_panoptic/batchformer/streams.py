"""Which copies of the batch ("streams") a tensor carries, stated and never guessed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

ORIGINAL = "original"
BATCHFORMER = "batchformer"

T = TypeVar("T")


@dataclass(frozen=True)
class StreamState:
    """The number and order of the streams along dimension 0 of a batch.

    A batch of B images with S streams has B' = S * B entries along dimension 0, stream after
    stream: all images of the original stream first. Everything that is per image and not yet
    expanded (B entries) is brought to B' entries by :meth:`expand`.
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
            dim: which of its dimensions is the batch.
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
            ValueError: dimension 0 is no multiple of the number of streams.
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
        if self.num_streams == 1:
            return {name: value.sum() for name, value in contributions.items()}
        return {
            f"{name}/{stream}": part.sum()
            for name, value in contributions.items()
            for stream, part in zip(self.names, self.split(value), strict=True)
        }


SINGLE = StreamState()
TWO_STREAMS = StreamState((ORIGINAL, BATCHFORMER))
