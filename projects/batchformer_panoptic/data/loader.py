"""Data loaders for training and evaluation.

Which image comes when: a stream that can be entered at any point.

Between the mapper and the trainer: seeding of each image, and errors of worker processes.
"""

import contextlib
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError, one_line
from .classification_mapper import ClassificationMapper
from .datasets.image_folder import CLASSIFICATION
from .datasets.panoptic import check_paths
from .datasets.setup import check_registered
from .panoptic_mapper import PanopticDatasetMapper

# Tells the random numbers of permutations from those of augmentations (see loading.py).
_PERMUTATION_DOMAIN = 0


class SampledItem(NamedTuple):
    """One element of the endless stream of training images.

    Attributes:
        position: place in the stream of all processes together, from 0. It never repeats, and so
            tells the epochs of one image apart.
        image_index: which image of the data set.
    """

    position: int
    image_index: int


class ResumableSampler(Sampler[SampledItem]):
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

    def __iter__(self) -> Iterator[SampledItem]:
        """Yield without end."""
        position = self._first_position
        epoch, permutation = -1, np.empty(0, dtype=np.int64)
        while True:
            position_epoch, place = divmod(position, self._size)
            if position_epoch != epoch:
                epoch, permutation = position_epoch, self._permutation(position_epoch)
            yield SampledItem(position, int(permutation[place // self._repeats]))
            position += self._world_size

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, _PERMUTATION_DOMAIN, epoch)).permutation(
            self._size
        )


Mapper = Callable[[dict[str, Any]], dict[str, Any]]

# Tells the seeds of augmentations from those of permutations (see ResumableSampler).
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


class SampledDataset(Dataset[dict[str, Any] | Failure]):
    """Maps the elements of a `ResumableSampler`, each with random numbers of its own.

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

    def __getitem__(self, item: SampledItem) -> dict[str, Any] | Failure:
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


logger = logging.getLogger(__name__)

_PATH_KEYS = ("panoptic_json", "panoptic_root", "image_root", "json_file")


def build_train_loader(cfg: CfgNode, *, start_iter: int = 0) -> CheckedLoader:
    """An endless loader of training batches, lists of SOLVER.IMS_PER_BATCH / processes dicts.

    Images and augmentations of batch i follow from SEED, rank, number of processes and i alone,
    with any number of workers, and a loader started at iteration i goes on exactly as one that has
    run until there. A negative SEED draws one, the same on all processes; such a run cannot be
    repeated.

    Args:
        cfg: after `setup_datasets`.
        start_iter: first iteration, 0 or the one a run is resumed at.

    Raises:
        UserError: an unusable config (the batch does not divide, a sampler or grouping that
            cannot be resumed exactly) or data set. While iterating: an image that cannot be used.
    """
    _check_train_config(cfg)
    batch_size = _batch_size_per_process(cfg.SOLVER.IMS_PER_BATCH)
    dataset_dicts = load_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    logger.info("%d training images, %d per process and step", len(dataset_dicts), batch_size)
    loader: DataLoader[Any] = DataLoader(
        SampledDataset(dataset_dicts, _build_mapper(cfg, cfg.DATASETS.TRAIN[0], True), seed),
        batch_size=batch_size,
        sampler=ResumableSampler(
            len(dataset_dicts),
            seed=seed,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
            start=start_iter * cfg.SOLVER.IMS_PER_BATCH,
            repeats=_draws_per_image(cfg),
        ),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        worker_init_fn=limit_worker_threads,
        # Workers are numbered from a generator; the global one belongs to the model.
        generator=torch.Generator(),
    )
    return CheckedLoader(loader)


def build_test_loader(cfg: CfgNode, dataset_name: str) -> CheckedLoader:
    """One pass over a data set, in order, split over the processes; lists of TEST.IMS_PER_BATCH.

    Raises:
        UserError: an unusable data set or batch size. While iterating: an image that cannot be
            used.
    """
    if cfg.TEST.IMS_PER_BATCH < 1:
        raise UserError(f"TEST.IMS_PER_BATCH is {cfg.TEST.IMS_PER_BATCH}: give 1 or more")
    loader = build_detection_test_loader(
        load_dataset_dicts([dataset_name], filter_empty=False),
        mapper=IsolatedMapper(_build_mapper(cfg, dataset_name, False)),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    loader.worker_init_fn = limit_worker_threads
    # An evaluation in the middle must not change the random numbers of the training around it.
    loader.generator = torch.Generator()
    return CheckedLoader(loader)


def load_dataset_dicts(names: Sequence[str], *, filter_empty: bool) -> list[dict[str, Any]]:
    """Dataset dicts of all names together.

    Args:
        names: registered data sets.
        filter_empty: leave out images without annotated boxes, as Detectron2 does and logs for
            data sets of boxes. Images of panoptic data sets are all kept.

    Raises:
        UserError: no names, an unknown name, missing files, or a data set that cannot be read.
    """
    if not names:
        raise UserError("no data set is named: set DATASETS.TRAIN (DATASETS.TEST for evaluation)")
    for name in names:
        check_registered(name)
        metadata = MetadataCatalog.get(name)
        check_paths(name, {key: metadata.get(key) for key in _paths_to_check(metadata)})
    try:
        dataset_dicts: list[dict[str, Any]] = get_detection_dataset_dicts(
            list(names), filter_empty=filter_empty
        )
    except UserError:
        raise
    except (OSError, AssertionError, KeyError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"data set {', '.join(names)} cannot be read: {reason}") from error
    return dataset_dicts


def _build_mapper(cfg: CfgNode, dataset_name: str, is_train: bool) -> Mapper:
    """The mapper for the kind of data set that a registered name stands for."""
    if _is_image_folder(dataset_name):
        return ClassificationMapper(cfg, is_train=is_train)
    return PanopticDatasetMapper(cfg, is_train=is_train)


def _draws_per_image(cfg: CfgNode) -> int:
    repeats = int(cfg.INPUT.CLASSIFICATION.REPEATED_AUGMENTATION)
    if repeats < 1:
        raise UserError(
            f"INPUT.CLASSIFICATION.REPEATED_AUGMENTATION is {repeats}: give 1 or more draws"
        )
    return repeats if _is_image_folder(cfg.DATASETS.TRAIN[0]) else 1


def _is_image_folder(dataset_name: str) -> bool:
    return bool(MetadataCatalog.get(dataset_name).get("evaluator_type") == CLASSIFICATION)


def _paths_to_check(metadata: Any) -> Sequence[str]:
    """Metadata keys of the files that reading needs.

    A panoptic data set of Detectron2's also names the JSON of the boxes, which nothing reads.
    """
    return _PATH_KEYS[:3] if metadata.get("panoptic_json") else _PATH_KEYS[2:]


def _batch_size_per_process(total: int) -> int:
    world_size = comm.get_world_size()
    if total < 1 or total % world_size:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {total}, the total over {world_size} process(es): "
            f"give a multiple of {world_size}"
        )
    return total // world_size


def _check_train_config(cfg: CfgNode) -> None:
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN!r}: "
            "only 'TrainingSampler' is supported"
        )
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        raise UserError(
            "DATALOADER.ASPECT_RATIO_GROUPING makes batches depend on earlier ones, so that a run "
            "could not be resumed exactly: set it to False"
        )
