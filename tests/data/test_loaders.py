"""The loaders: exact repetition, exact resume, splitting over processes, errors of workers."""

import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm

from batchformer_panoptic.config import add_batchformer_panoptic_config
from batchformer_panoptic.data import (
    ResumableSampler,
    build_test_loader,
    build_train_loader,
    register_panoptic_dataset,
)
from batchformer_panoptic.data.loader import Failure, PackedBatch, identity_of, seeded
from batchformer_panoptic.errors import UserError


@pytest.fixture
def cfg(tiny_panoptic_dataset: Any) -> CfgNode:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.DATASETS.TRAIN = (tiny_panoptic_dataset.name,)
    cfg.DATASETS.TEST = (tiny_panoptic_dataset.name,)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 3
    cfg.INPUT.MIN_SIZE_TRAIN = (24, 28, 32, 36, 40)
    cfg.INPUT.RESIZE_OR_CROP.ENABLED = True
    cfg.INPUT.RESIZE_OR_CROP.MIN_SIZES = [30, 40]
    cfg.INPUT.RESIZE_OR_CROP.CROP_RANGE = [16, 32]
    return cfg


Batches = list[list[dict[str, Any]]]


def take(cfg: CfgNode, count: int, start_iter: int = 0) -> Batches:
    return list(itertools.islice(build_train_loader(cfg, start_iter=start_iter), count))


def assert_same(actual: Batches, expected: Batches) -> None:
    assert [len(batch) for batch in actual] == [len(batch) for batch in expected]
    for mine, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert mine["image_id"] == theirs["image_id"]
        for key in ("image", "segment_map"):
            torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=0)
        boxes, other_boxes = (x["instances"].gt_boxes.tensor for x in (mine, theirs))
        torch.testing.assert_close(boxes, other_boxes, rtol=0, atol=0)


@pytest.mark.parametrize("batch", [5, 6])
def test_a_batch_larger_than_the_data_set_is_named(
    cfg: CfgNode, caplog: pytest.LogCaptureFixture, batch: int
) -> None:
    cfg.SOLVER.IMS_PER_BATCH = batch
    with caplog.at_level("WARNING"):
        build_train_loader(cfg)
    expected = f"SOLVER.IMS_PER_BATCH is {batch}, but there are 5 training images"
    assert (expected in caplog.text) == (batch == 6)


def same_pixels(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return torch.equal(first["image"], second["image"])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(cfg: CfgNode, num_workers: int) -> None:
    expected = take(cfg, 6)
    np.random.seed(77)
    torch.manual_seed(77)
    cfg.DATALOADER.NUM_WORKERS = num_workers
    assert_same(take(cfg, 6), expected)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_moves_to_a_gpu_as_one_buffer_is_the_same(
    cfg: CfgNode, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = take(cfg, 3)
    cfg.DATALOADER.NUM_WORKERS = num_workers
    cfg.MODEL.DEVICE = "cuda"
    loader, test_loader = build_train_loader(cfg), build_test_loader(cfg, cfg.DATASETS.TEST[0])
    for checked in (loader, test_loader):
        assert checked.loader.pin_memory
        monkeypatch.setattr(checked, "_device", torch.device("cpu"))
    found = list(itertools.islice(loader, 3))
    assert_same(found, expected)
    assert all(one_buffer(batch) for batch in found)
    assert not any(one_buffer(batch) for batch in expected)
    cfg.MODEL.DEVICE = "cpu"
    usual = build_test_loader(cfg, cfg.DATASETS.TEST[0])
    for mine, theirs in zip(test_loader, usual, strict=True):
        assert mine[0].keys() == theirs[0].keys()
        assert same_pixels(mine[0], theirs[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_arrive_on_the_gpu_in_one_buffer(cfg: CfgNode, num_workers: int) -> None:
    cfg.DATALOADER.NUM_WORKERS = num_workers
    expected = take(cfg, 3)
    cfg.MODEL.DEVICE = "cuda"
    found = take(cfg, 3)
    assert all(sample["image"].is_cuda for batch in found for sample in batch)
    assert all(one_buffer(batch) for batch in found)
    for sample in itertools.chain(*found):
        sample |= {key: sample[key].cpu() for key in ("image", "segment_map")}
    assert_same(found, expected)


def one_buffer(batch: list[dict[str, Any]]) -> bool:
    tensors = [sample[key] for sample in batch for key in ("image", "segment_map")]
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_a_packed_batch_keeps_types_shapes_and_everything_else() -> None:
    tensors = {
        "image": torch.arange(45, dtype=torch.uint8).view(3, 3, 5),
        "float": torch.rand(2, 3),
        "map": torch.arange(6, dtype=torch.int16).view(2, 3),
        "nothing": torch.empty(0, 4),
        "one": torch.tensor(7),
        "bool": torch.tensor([True, False]),
    }
    failure = Failure("no such file")
    others = {"file_name": "a.jpg", "instances": object()}
    packed = PackedBatch([{**others, **tensors}, failure, {"image": tensors["image"][:, :2]}])
    first, second, third = packed.unpack(torch.device("cpu"))
    assert first.keys() == {**others, **tensors}.keys()
    for key, expected in tensors.items():
        assert first[key].dtype == expected.dtype
        torch.testing.assert_close(first[key], expected, rtol=0, atol=0)
    assert {key: first[key] for key in others} == others
    assert second is failure
    torch.testing.assert_close(third["image"], tensors["image"][:, :2], rtol=0, atol=0)


@pytest.mark.parametrize("start_iter", [1, 3, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_late_goes_on_exactly(cfg: CfgNode, start_iter: int, num_workers: int) -> None:
    expected = take(cfg, 7)[start_iter:]
    cfg.DATALOADER.NUM_WORKERS = num_workers
    assert_same(take(cfg, 7 - start_iter, start_iter), expected)


def test_another_seed_gives_other_images(cfg: CfgNode) -> None:
    batches = take(cfg, 10)
    cfg.SEED = 4
    others = take(cfg, 10)
    ids, other_ids = (
        [sample["image_id"] for batch in run for sample in batch] for run in (batches, others)
    )
    assert ids != other_ids


def test_every_epoch_has_every_image_and_new_augmentations(cfg: CfgNode) -> None:
    samples = list(itertools.chain(*take(cfg, 10)))  # four epochs of five images
    epochs = [samples[start : start + 5] for start in range(0, 20, 5)]
    for epoch in epochs:
        assert {sample["image_id"] for sample in epoch} == {100, 101, 102, 103, 104}
    orders = {tuple(sample["image_id"] for sample in epoch) for epoch in epochs}
    assert len(orders) > 1
    views = [sample for sample in samples if sample["image_id"] == 100]
    assert not all(same_pixels(views[0], view) for view in views[1:])


def test_images_without_segments_are_kept(cfg: CfgNode) -> None:
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    empty = [s for batch in take(cfg, 3) for s in batch if s["image_id"] == 104]
    assert empty
    assert all(len(sample["instances"]) == 0 for sample in empty)


def test_batch_larger_than_the_data_set(cfg: CfgNode) -> None:
    cfg.SOLVER.IMS_PER_BATCH = 12
    (batch,) = take(cfg, 1)
    counts = Counter(sample["image_id"] for sample in batch)
    assert sum(counts.values()) == 12
    assert set(counts.values()) == {2, 3}


def test_negative_seed_differs_between_runs(cfg: CfgNode) -> None:
    cfg.SEED = -1
    np.random.seed()
    runs = [[s["image_id"] for batch in take(cfg, 10) for s in batch] for _ in range(3)]
    assert any(run != runs[0] for run in runs[1:])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_generators_alone(cfg: CfgNode, num_workers: int) -> None:
    cfg.DATALOADER.NUM_WORKERS = num_workers
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    take(cfg, 2)
    next(iter(build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_seeded_covers_all_three_generators() -> None:
    def draw(seed: int, position: int) -> tuple[float, float, float]:
        with seeded(seed, position):
            return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw(0, 0)
    assert draw(0, 0) == first
    for other in (draw(0, 1), draw(1, 0)):
        assert all(mine != theirs for mine, theirs in zip(other, first, strict=True))


def _images(sampler: ResumableSampler, count: int) -> list[int]:
    return [item.image_index for item in itertools.islice(sampler, count)]


@pytest.mark.parametrize("size", [6, 7])
def test_two_processes_share_each_epoch(size: int) -> None:
    whole = _images(ResumableSampler(size, seed=5), 4 * size)
    shares = [
        _images(ResumableSampler(size, seed=5, rank=rank, world_size=2), 2 * size)
        for rank in range(2)
    ]
    assert [image for pair in zip(*shares, strict=True) for image in pair] == whole
    assert sorted(whole[:size]) == list(range(size))
    assert sorted(whole[size : 2 * size]) == list(range(size))
    assert whole[:size] != whole[size : 2 * size]


def test_sampler_starts_anywhere() -> None:
    run = list(itertools.islice(ResumableSampler(5, seed=1, rank=1, world_size=2), 20))
    late = ResumableSampler(5, seed=1, rank=1, world_size=2, start=2 * 6)
    assert list(itertools.islice(late, 14)) == run[6:]
    assert [item.position for item in run[:3]] == [1, 3, 5]


@pytest.mark.parametrize(
    "arguments", [{"size": 0}, {"seed": -1}, {"rank": 2, "world_size": 2}, {"start": -2}]
)
def test_sampler_refuses(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="size="):
        ResumableSampler(**{"size": 3, "seed": 0, **arguments})


def test_processes_split_the_batch(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg.SOLVER.IMS_PER_BATCH = 4
    whole = take(cfg, 3)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        assert_same(take(cfg, 3), [batch[rank::2] for batch in whole])
    cfg.SOLVER.IMS_PER_BATCH = 3
    with pytest.raises(UserError, match="IMS_PER_BATCH is 3"):
        build_train_loader(cfg)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_evaluation_sees_every_image_once_in_order(
    cfg: CfgNode, batch_size: int, num_workers: int
) -> None:
    cfg.TEST.IMS_PER_BATCH = batch_size
    cfg.DATALOADER.NUM_WORKERS = num_workers
    loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
    batches = list(loader)
    assert len(batches) == len(loader) == -(-5 // batch_size)
    assert [s["image_id"] for batch in batches for s in batch] == [100, 101, 102, 103, 104]
    assert all("instances" not in sample for batch in batches for sample in batch)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "TrainingSampler"),
        ("DATALOADER.ASPECT_RATIO_GROUPING", True, "set it to False"),
        ("SOLVER.IMS_PER_BATCH", 0, "IMS_PER_BATCH is 0"),
        ("DATASETS.TRAIN", (), "no data set is named"),
        ("DATASETS.TRAIN", ("unheard_of",), "unknown data set 'unheard_of'"),
        ("DATASETS.TRAIN", ("coco_2017_val_100_panoptic",), "panoptic_val2017_100"),
        ("DATASETS.TRAIN", ("coco_2017_val_100",), "does not exist"),
    ],
)
def test_configs_that_cannot_be_trained(cfg: CfgNode, key: str, value: object, words: str) -> None:
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=words):
        build_train_loader(cfg)


def test_evaluation_batch_of_zero(cfg: CfgNode) -> None:
    cfg.TEST.IMS_PER_BATCH = 0
    with pytest.raises(UserError, match=r"TEST\.IMS_PER_BATCH"):
        build_test_loader(cfg, cfg.DATASETS.TEST[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_gives_one_line(
    cfg: CfgNode, tiny_panoptic_dataset: Any, tmp_path: Path, num_workers: int
) -> None:
    root = tmp_path / "broken"
    shutil.copytree(tiny_panoptic_dataset.panoptic_json.parent, root)
    (root / "images" / "002.png").write_bytes(b"no image")
    name = f"broken_{num_workers}_{id(root)}"
    paths = [str(root / part) for part in ("images", "png", "panoptic.json")]
    register_panoptic_dataset(name, *paths)
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATALOADER.NUM_WORKERS = num_workers
    for batches in (build_train_loader(cfg), build_test_loader(cfg, name)):
        with pytest.raises(UserError, match=r"images/002\.png cannot be read") as caught:
            list(itertools.islice(batches, 5))
        assert "\n" not in str(caught.value)


def test_a_data_set_that_detectron2_cannot_read(
    cfg: CfgNode, tiny_panoptic_dataset: Any, tmp_path: Path
) -> None:
    from detectron2.data.datasets import register_coco_panoptic

    content = json.loads(tiny_panoptic_dataset.panoptic_json.read_text())
    del content["annotations"][0]["segments_info"]
    path = tmp_path / "panoptic.json"
    path.write_text(json.dumps(content))
    name = f"detectron2_{id(path)}"
    metadata = {"thing_classes": ["a"], "stuff_classes": ["a"]}
    register_coco_panoptic(name, metadata, *tiny_panoptic_dataset.row[1:3], str(path))
    with pytest.raises(UserError, match="segments_info"):
        build_test_loader(cfg, name)


def test_a_data_set_is_identified_by_its_content_not_its_place() -> None:
    image = {"file_name": "/a/1.png", "image_id": 1, "segments_info": [{"id": 7, "iscrowd": 0}]}
    same = identity_of([image, {"file_name": "/a/2.png"}])
    assert identity_of([{**image, "file_name": "/b/1.png"}, {"file_name": "/b/2.png"}]) == same
    assert same["count"] == 2
    changed = [{**image, "segments_info": []}, {**image, "image_id": 2}]
    digests = {identity_of([one])["digest"] for one in (image, *changed)}
    assert len(digests) == 3
