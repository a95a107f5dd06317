"""Between the mapper and the trainer: seeding of each image, and errors of worker processes."""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetFromList
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .samplers import StreamItem

Mapper = Callable[[dict[str, Any]], dict[str, Any]]

# Tells the seeds of augmentations from those of permutations (see StreamSampler).
_AUGMENTATION_DOMAIN = 1


class Failure(NamedTuple):
    """Stands in a batch for an image that could not be mapped."""

    message: str


class IsolatedMapper:
    """A mapper whose random numbers and errors stay with the image they belong to.

    Random numbers follow from two integers, not from what was drawn before, and the generators
    of the process are afterwards as they were. Where the mapper raises `UserError`, a `Failure` is
    returned: PyTorch turns an exception of a worker process into a page of traceback text, a value
    passes as it is, and `CheckedLoader` raises it again in the main process.
    """

    def __init__(self, mapper: Mapper) -> None:
        self._mapper = mapper

    def __call__(
        self, dataset_dict: dict[str, Any], seed: int = 0, position: int = 0
    ) -> dict[str, Any] | Failure:
        """Map, or say why not."""
        try:
            with seeded(seed, position):
                return self._mapper(dataset_dict)
        except UserError as error:
            return Failure(str(error))


class StreamDataset(Dataset[dict[str, Any] | Failure]):
    """Maps the elements of a `StreamSampler`, each with random numbers of its own.

    They follow from the seed and the position in the stream, not from the worker that happens to
    map the element.
    """

    def __init__(self, dataset_dicts: list[dict[str, Any]], mapper: Mapper, seed: int) -> None:
        """Keep the dicts in serialised form, which worker processes share without copying."""
        self._dataset_dicts = DatasetFromList(dataset_dicts, copy=False)
        self._mapper = IsolatedMapper(mapper)
        self._seed = seed

    def __len__(self) -> int:
        """Number of images."""
        return len(self._dataset_dicts)

    def __getitem__(self, item: StreamItem) -> dict[str, Any] | Failure:
        """Map one element of the stream."""
        return self._mapper(self._dataset_dicts[item.image_index], self._seed, item.position)


class CheckedLoader:
    """Iterates a DataLoader whose mapper reports failures, and raises them as `UserError`."""

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self.loader = loader

    def __len__(self) -> int:
        """Number of batches; TypeError for an endless loader."""
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yield batches: lists of mapped dicts."""
        for batch in self.loader:
            for sample in batch:
                if isinstance(sample, Failure):
                    raise UserError(sample.message)
            yield batch


@contextlib.contextmanager
def seeded(seed: int, position: int) -> Iterator[None]:
    """Seed the generators of random, numpy and torch's CPU; afterwards they are as before.

    GPU generators are left alone: loading an image in the main process must not change the
    dropout of the training step.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    words = np.random.SeedSequence((seed, _AUGMENTATION_DOMAIN, position)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def limit_worker_threads(_worker_id: int) -> None:
    """Keep a worker process to one thread, so that workers do not compete with each other."""
    torch.set_num_threads(1)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)
