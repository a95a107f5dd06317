"""Which image comes when: a stream that can be entered at any point."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

# Tells the random numbers of permutations from those of augmentations (see loading.py).
_PERMUTATION_DOMAIN = 0


class StreamItem(NamedTuple):
    """One element of the endless stream of training images.

    Attributes:
        position: place in the stream of all processes together, from 0. It never repeats, and so
            tells the epochs of one image apart.
        image_index: which image of the data set.
    """

    position: int
    image_index: int


class StreamSampler(Sampler[StreamItem]):
    """One process's share of an endless stream of shuffled epochs.

    The stream is permutation 0, permutation 1, ... of the data set. Process r of W takes the
    positions r, r + W, r + 2 W, ... Permutation e is a function of the seed and e alone, so that
    starting in the middle costs nothing and gives what an uninterrupted run would see; so does
    going on with another number of processes and the same total batch.

    Repeated augmentation: with R repeats every image of a permutation stands R times in a row, each
    time at a position of its own and so with another augmentation, and as in DeiT's sampler an
    epoch still ends after as many draws as there are images: it shows one image in R. Several
    processes share the copies of an image out among them.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        repeats: int = 1,
    ) -> None:
        """Describe the stream.

        Args:
            size: number of images.
            seed: 0 or more, the same on all processes.
            rank: this process.
            world_size: number of processes.
            start: position of the first element for process 0; a multiple of the world size.
            repeats: draws of an image in a row, 1 or more.
        """
        if size < 1 or not 0 <= rank < world_size or start < 0 or seed < 0 or repeats < 1:
            raise ValueError(f"{size=}, {seed=}, {rank=}, {world_size=}, {start=}, {repeats=}")
        self._size = size
        self._repeats = repeats
        self._seed = seed
        self._world_size = world_size
        self._first_position = start + rank

    def __iter__(self) -> Iterator[StreamItem]:
        """Yield without end."""
        position = self._first_position
        epoch, permutation = -1, np.empty(0, dtype=np.int64)
        while True:
            position_epoch, place = divmod(position, self._size)
            if position_epoch != epoch:
                epoch, permutation = position_epoch, self._permutation(position_epoch)
            yield StreamItem(position, int(permutation[place // self._repeats]))
            position += self._world_size

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, _PERMUTATION_DOMAIN, epoch)).permutation(
            self._size
        )
