"""Data loaders for training and evaluation.

Training samples are numbered by their position in one endless sequence of shuffled epochs. The
image and the augmentation at a position follow from the seed and the position only, so that a run
can be resumed anywhere, with any number of workers.
"""

import contextlib
import hashlib
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    trivial_batch_collator,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError, one_line
from ..signals import leave_signals_to_main_process
from .classification_mapper import ClassificationMapper
from .datasets.catalog import check_paths
from .datasets.image_folder import CLASSIFICATION
from .datasets.setup import check_registered
from .panoptic_mapper import PanopticDatasetMapper
from .validation import no_training_targets

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Maps a dataset dict, or two of them for copy-paste.
Mapper = Callable[..., dict[str, Any]]

# Random numbers of permutations, augmentations and pairs of images for copy-paste come from the
# same seed in separate domains.
_PERMUTATION_DOMAIN = 0
_AUGMENTATION_DOMAIN = 1
_PASTE_DOMAIN = 2

_PATH_KEYS = ("panoptic_json", "panoptic_root", "image_root", "json_file")


def build_train_loader(cfg: CfgNode, *, start_iter: int = 0) -> "CheckedLoader":
    """Build an endless loader of batches, lists of SOLVER.IMS_PER_BATCH / processes dicts.

    Images and augmentations of batch i depend only on SEED, rank, number of processes and i, with
    any number of workers. A loader started at iteration i continues exactly as one that has run
    that far. A negative SEED draws one, the same on all processes; such a run cannot be repeated.

    Args:
        cfg: after `setup_datasets`.
        start_iter: first iteration: 0, or that of a resumed run.

    Raises:
        UserError: an unusable config (the batch does not divide, a sampler or grouping that
            cannot be resumed exactly) or data set. While iterating: an image that cannot be used.
    """
    _check_train_config(cfg)
    batch_size = _batch_size_per_process(cfg.SOLVER.IMS_PER_BATCH)
    dataset_dicts = load_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    if not (_is_image_folder(cfg.DATASETS.TRAIN[0]) or any(map(_has_target, dataset_dicts))):
        raise UserError(str(no_training_targets(cfg.DATASETS.TRAIN)))
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    logger.info("%d training images, %d per process and step", len(dataset_dicts), batch_size)
    if len(dataset_dicts) < cfg.SOLVER.IMS_PER_BATCH:
        logger.warning(
            "SOLVER.IMS_PER_BATCH is %d, but there are %d training images, so that every batch "
            "repeats some: set it to %d or less",
            cfg.SOLVER.IMS_PER_BATCH,
            len(dataset_dicts),
            len(dataset_dicts),
        )
    loader: DataLoader[Any] = DataLoader(
        SampledDataset(
            dataset_dicts,
            _build_mapper(cfg, cfg.DATASETS.TRAIN[0], True),
            seed,
            paste_probability=cfg.INPUT.COPY_PASTE,
        ),
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
        worker_init_fn=prepare_worker,
        # The base seed of workers is drawn from this generator; the global one is the model's.
        generator=torch.Generator(),
    )
    return CheckedLoader(loader, identity_of(dataset_dicts), device=cfg.MODEL.DEVICE)


def build_test_loader(cfg: CfgNode, dataset_name: str) -> "CheckedLoader":
    """Build a loader of one pass in order, split over the processes; TEST.IMS_PER_BATCH dicts each.

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
    loader.worker_init_fn = prepare_worker
    # An evaluation during training must not change the random numbers of the training.
    loader.generator = torch.Generator()
    return CheckedLoader(loader, device=cfg.MODEL.DEVICE)


def load_dataset_dicts(names: Sequence[str], *, filter_empty: bool) -> list[dict[str, Any]]:
    """Return the dataset dicts of all names together.

    Args:
        names: registered data sets.
        filter_empty: leave out images without annotated boxes, as Detectron2 does (and logs) for
            data sets of boxes. All images of panoptic data sets are kept.

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
            list(names), filter_empty=False
        )
    except UserError:
        raise
    except (OSError, AssertionError, KeyError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"data set {', '.join(names)} cannot be read: {reason}") from error
    if filter_empty and "annotations" in dataset_dicts[0]:
        dataset_dicts = filter_images_with_only_crowd_annotations(dataset_dicts)
    return dataset_dicts


def identity_of(dataset_dicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return "count" and "digest" of the images and annotations of a data set, in their order.

    Of paths only the file name counts, so that a data set can be moved.
    """
    digest = hashlib.sha256()
    for dataset_dict in dataset_dicts:
        content = {
            key: os.path.basename(value) if key.endswith("file_name") else value
            for key, value in dataset_dict.items()
        }
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return {"count": len(dataset_dicts), "digest": digest.hexdigest()}


def _has_target(dataset_dict: dict[str, Any]) -> bool:
    found = dataset_dict.get("segments_info") or dataset_dict.get("annotations") or ()
    return any(not item.get("iscrowd", 0) for item in found)


def _build_mapper(cfg: CfgNode, dataset_name: str, is_train: bool) -> Mapper:
    """Build the mapper for the format of a registered data set."""
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
    """Return the metadata keys of the files needed to read a data set.

    Detectron2's own panoptic data sets also name the JSON of the boxes, which is not read.
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
    _check_copy_paste(cfg)


def _check_copy_paste(cfg: CfgNode) -> None:
    probability = cfg.INPUT.COPY_PASTE
    if not 0 <= probability <= 1:
        raise UserError(f"INPUT.COPY_PASTE is {probability}: give a probability from 0 to 1")
    if probability == 0:
        return
    if not cfg.INPUT.LARGE_SCALE_JITTER.ENABLED:
        raise UserError(
            f"INPUT.COPY_PASTE is {probability}: it needs images of one size; "
            "set INPUT.LARGE_SCALE_JITTER.ENABLED True, or INPUT.COPY_PASTE 0"
        )
    for name in cfg.DATASETS.TRAIN:
        if not MetadataCatalog.get(name).get("panoptic_json"):
            raise UserError(
                f"INPUT.COPY_PASTE is {probability}: data set {name} has no masks to paste; "
                "set it to 0"
            )


# ---------------------------------------------------------------------------
# The order of training images
# ---------------------------------------------------------------------------


class SampledItem(NamedTuple):
    """One element of the endless sequence of training images.

    Attributes:
        position: in the sequence of all processes together, from 0. It is never repeated, so the
            same image has another position in each epoch.
        image_index: position of the image in the data set.
    """

    position: int
    image_index: int


class ResumableSampler(Sampler[SampledItem]):
    """One process's share of an endless sequence of shuffled epochs.

    The sequence is permutation 0, permutation 1, ... of the data set. Process r of W takes the
    positions r, r + W, r + 2 W, ... Permutation e depends on the seed and e only. A sampler can
    therefore start at any position at no cost and continue as an uninterrupted run would, even
    with another number of processes if the total batch is the same.

    Repeated augmentation: with R repeats every image of a permutation occurs R times in a row. Each
    occurrence has its own position and therefore its own augmentation. As in DeiT's sampler an
    epoch still ends after as many draws as there are images, so that it shows one image in R. The
    occurrences of an image are distributed over the processes.
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
        """Define the sequence.

        Args:
            size: number of images.
            seed: 0 or more, the same on all processes.
            rank: this process.
            world_size: number of processes.
            start: position of the first element for process 0; a multiple of the world size.
            repeats: consecutive draws of an image, 1 or more.
        """
        if size < 1 or not 0 <= rank < world_size or start < 0 or seed < 0 or repeats < 1:
            raise ValueError(f"{size=}, {seed=}, {rank=}, {world_size=}, {start=}, {repeats=}")
        self._size = size
        self._repeats = repeats
        self._seed = seed
        self._world_size = world_size
        self._first_position = start + rank

    def __iter__(self) -> Iterator[SampledItem]:
        """Yield elements endlessly."""
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


# ---------------------------------------------------------------------------
# Seeds and errors of single images
# ---------------------------------------------------------------------------


@contextlib.contextmanager
def seeded(seed: int, position: int) -> Iterator[None]:
    """Seed the generators of random, numpy and torch's CPU, and restore them afterwards.

    GPU generators are not touched: loading an image in the main process must not change the
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


class Failure(NamedTuple):
    """Replaces an image that could not be mapped in its batch."""

    message: str


class IsolatedMapper:
    """A mapper with its own random numbers for each image, which returns errors as values.

    Random numbers follow from two integers, not from earlier draws, and the generators of the
    process are restored afterwards. `UserError` becomes a `Failure`, which `CheckedLoader` raises
    in the main process; PyTorch would turn an exception in a worker into a long traceback.
    """

    def __init__(self, mapper: Mapper) -> None:
        self._mapper = mapper

    def __call__(
        self, *dataset_dicts: dict[str, Any], seed: int = 0, position: int = 0
    ) -> dict[str, Any] | Failure:
        """Map a dataset dict, or two for copy-paste; return a `Failure` for a `UserError`."""
        try:
            with seeded(seed, position):
                return self._mapper(*dataset_dicts)
        except UserError as error:
            return Failure(str(error))


class SampledDataset(Dataset[dict[str, Any] | Failure]):
    """Maps the elements of a `ResumableSampler`, each with its own random numbers.

    They follow from the seed and the position, not from the worker process that maps the element.
    """

    def __init__(
        self,
        dataset_dicts: list[dict[str, Any]],
        mapper: Mapper,
        seed: int,
        *,
        paste_probability: float = 0.0,
    ) -> None:
        """Store the dicts in serialized form, which worker processes share without copying.

        Args:
            dataset_dicts: one per image.
            mapper: takes a dict, and a second one with things to paste.
            seed: 0 or more.
            paste_probability: that an element is mapped together with a second, random image.
        """
        self._dataset_dicts = DatasetFromList(dataset_dicts, copy=False)
        self._mapper = IsolatedMapper(mapper)
        self._seed = seed
        self._paste_probability = paste_probability

    def __len__(self) -> int:
        """Number of images."""
        return len(self._dataset_dicts)

    def __getitem__(self, item: SampledItem) -> dict[str, Any] | Failure:
        """Map one element of the sampler."""
        indices = [item.image_index]
        if self._paste_probability > 0:
            generator = np.random.default_rng((self._seed, _PASTE_DOMAIN, item.position))
            if generator.random() < self._paste_probability:
                indices.append(int(generator.integers(len(self))))
        dataset_dicts = [self._dataset_dicts[index] for index in indices]
        return self._mapper(*dataset_dicts, seed=self._seed, position=item.position)


class CheckedLoader:
    """Iterates a DataLoader whose mapper reports failures, and raises them as `UserError`."""

    def __init__(
        self,
        loader: "DataLoader[Any]",
        images: Mapping[str, Any] | None = None,
        *,
        device: str = "cpu",
    ) -> None:
        """Wrap a loader.

        Args:
            loader: of batches of dicts or `Failure`; changed for a GPU.
            images: the `identity_of` its data set, None for an evaluation.
            device: MODEL.DEVICE. To a GPU, the images and segment maps of a batch are moved in one
                copy, from memory that a thread of the loader has pinned.
        """
        self.loader = loader
        self.images = images
        self._device = torch.device(device)
        if self._device.type == "cuda":
            loader.collate_fn, loader.pin_memory = PackedBatch, True
        _allow_open_files(loader.num_workers)

    def __len__(self) -> int:
        """Number of batches; TypeError for an endless loader."""
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yield batches: lists of mapped dicts."""
        for found in self.loader:
            batch = found.unpack(self._device) if isinstance(found, PackedBatch) else found
            for sample in batch:
                if isinstance(sample, Failure):
                    raise UserError(sample.message)
            yield batch


class PackedBatch:
    """A batch whose tensors are stored in one buffer, one after the other.

    Tensors are those directly in the dicts: images and segment maps. The few numbers of the
    instances stay where they are, since the model joins them on the host.

    Args:
        samples: dicts, or `Failure`; not changed.
    """

    def __init__(self, samples: Sequence[dict[str, Any] | Failure]) -> None:
        tensors = [value for _, _, value in _tensors_of(samples)]
        self._buffer = torch.empty(sum(map(_stored_bytes, tensors)), dtype=torch.uint8)
        for tensor, place in zip(tensors, self._places(self._buffer, tensors), strict=True):
            place.copy_(tensor)
        # Shapes and types without values.
        self._samples = _with_tensors(samples, [x.to("meta") for x in tensors])

    @staticmethod
    def _places(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the parts of the buffer, each with the shape and type of its tensor."""
        parts = buffer.split([_stored_bytes(tensor) for tensor in tensors])
        return [
            part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for part, tensor in zip(parts, tensors, strict=True)
        ]

    def pin_memory(self) -> "PackedBatch":
        """Move the buffer to pinned memory; PyTorch's loader calls it in its own thread."""
        self._buffer = self._buffer.pin_memory()
        return self

    def unpack(self, device: torch.device) -> list[Any]:
        """Return the samples; their tensors are parts of one buffer on the device."""
        buffer = self._buffer.to(device, non_blocking=True)
        shapes = [value for _, _, value in _tensors_of(self._samples)]
        return _with_tensors(self._samples, self._places(buffer, shapes))


def _tensors_of(
    samples: Sequence[dict[str, Any] | Failure],
) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Yield the number of the sample, the key and the tensor."""
    for number, sample in enumerate(samples):
        for key, value in sample.items() if isinstance(sample, dict) else ():
            if isinstance(value, torch.Tensor):
                yield number, key, value


def _with_tensors(
    samples: Sequence[dict[str, Any] | Failure], tensors: Sequence[torch.Tensor]
) -> list[Any]:
    """Return copies of the samples with other tensors, in the order of `_tensors_of`."""
    copies: list[Any] = [dict(x) if isinstance(x, dict) else x for x in samples]
    for (number, key, _), tensor in zip(_tensors_of(samples), tensors, strict=True):
        copies[number][key] = tensor
    return copies


def _stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes in a buffer, up to a multiple of the largest element, as views of a type need."""
    return -(-tensor.nbytes // 16) * 16


def _allow_open_files(workers: int) -> None:
    """Raise this process's limit of open files as far as it needs.

    Workers pass tensors through files. Without a free number they would lose them, and the main
    process would wait for ever.
    """
    if resource is None or workers == 0:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 128 + 32 * workers
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"DATALOADER.NUM_WORKERS {workers} needs {needed} open files, and the system allows "
            f"{hard}: raise the limit (ulimit -n), or set it to 0"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def prepare_worker(_worker_id: int) -> None:
    """Limit a worker process to one thread, and leave stop signals to the main process.

    Workers would compete with each other; and the main process still needs them for its last step.
    """
    leave_signals_to_main_process()
    torch.set_num_threads(1)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)
