"""Data loaders for training and evaluation."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader

from ..errors import UserError
from .classification import ClassificationMapper
from .dataset_mapper import PanopticDatasetMapper
from .datasets.image_folder import CLASSIFICATION
from .datasets.panoptic import check_paths
from .datasets.setup import check_registered
from .loading import CheckedLoader, IsolatedMapper, Mapper, StreamDataset, limit_worker_threads
from .samplers import StreamSampler

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
        StreamDataset(dataset_dicts, _build_mapper(cfg, cfg.DATASETS.TRAIN[0], True), seed),
        batch_size=batch_size,
        sampler=StreamSampler(
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
        reason = " ".join(str(error).split())
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
