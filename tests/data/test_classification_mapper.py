"""Augmentation and mapper of image classification, repeated augmentation and exact resuming."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from PIL import Image
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler

from batchformer_panoptic import add_batchformer_panoptic_config
from batchformer_panoptic.data import (
    ClassificationMapper,
    ResumableSampler,
    build_test_loader,
    build_train_loader,
    setup_datasets,
)
from batchformer_panoptic.data.classification_mapper import PixelErasing, build_image_transform
from batchformer_panoptic.data.loader import seeded
from batchformer_panoptic.errors import UserError
from helpers.image_folders import unique_name, write_image_folder

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 58.0, 56.0]


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
    cfg.MODEL.CLASSIFIER.IMAGE_SIZE = 8
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = MEAN, STD
    cfg.INPUT.FORMAT = "RGB"
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = 0, 2, 3
    name = unique_name()
    cfg.DATASETS.CUSTOM_IMAGE_FOLDERS = [[name, str(write_image_folder(tmp_path / "set"))]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    setup_datasets(cfg)
    return cfg


def record_of(tmp_path: Path, name: str = "bee/0.png") -> dict[str, Any]:
    return {"file_name": str(tmp_path / "set" / name), "image_id": 7, "label": 1}


def test_evaluation_is_timms_without_its_normalisation(cfg: CfgNode, tmp_path: Path) -> None:
    record = record_of(tmp_path)
    mapped = ClassificationMapper(cfg, is_train=False)(record)
    picture = Image.open(record["file_name"])
    expected = create_transform(8, interpolation="bicubic", crop_pct=0.875)(picture)
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    torch.testing.assert_close((mapped["image"] / 255 - mean) / std, expected)
    assert mapped["image"].dtype == torch.uint8
    assert {key: mapped[key] for key in record} == record
    assert record == record_of(tmp_path)


@pytest.mark.parametrize("is_train", [False, True])
def test_channels_follow_the_format(cfg: CfgNode, tmp_path: Path, is_train: bool) -> None:
    images = []
    for image_format, mean, std in (("RGB", MEAN, STD), ("BGR", MEAN[::-1], STD[::-1])):
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = image_format, mean, std
        cfg.INPUT.CLASSIFICATION.RANDOM_ERASING = 0.0
        with seeded(1, 2):
            images.append(
                ClassificationMapper(cfg, is_train=is_train)(record_of(tmp_path))["image"]
            )
    assert torch.equal(images[0], images[1].flip(0))
    assert not torch.equal(images[0], images[1])


def test_training_is_timms_with_the_same_random_numbers(cfg: CfgNode, tmp_path: Path) -> None:
    record = record_of(tmp_path)
    with seeded(1, 2):
        mapped = ClassificationMapper(cfg, is_train=True)(record)
    cfg.INPUT.CLASSIFICATION.RANDOM_ERASING = 1.0
    with seeded(1, 2):
        erased = ClassificationMapper(cfg, is_train=True)(record)["image"]
    mean, std = (tuple(v / 255 for v in values) for values in (MEAN, STD))
    for image, probability in ((mapped["image"], 0.25), (erased, 1.0)):
        transform = create_transform(
            8,
            is_training=True,
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            re_prob=probability,
            re_mode="pixel",
            mean=mean,
            std=std,
        )
        with seeded(1, 2):
            expected = transform(Image.open(record["file_name"]))
        normalized = (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(normalized, expected, rtol=1e-4, atol=1e-4)
    assert erased.dtype == torch.float32
    assert not torch.equal(mapped["image"], erased)


def test_erasing_has_unit_noise_after_the_normalisation() -> None:
    torch.manual_seed(0)
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    erased = PixelErasing(1.0, MEAN, STD)(image)
    touched = (erased - 200).abs() > 1e-3
    assert 0.01 < touched[0].float().mean() < 0.4
    for channel in range(3):
        noise = (erased[channel][touched[channel]] - MEAN[channel]) / STD[channel]
        assert noise.mean().abs() < 0.3
        assert 0.7 < noise.std() < 1.3
    assert image.unique().tolist() == [200]


def test_padded_crop_moves_the_whole_image(cfg: CfgNode) -> None:
    node = cfg.INPUT.CLASSIFICATION
    node.TRAIN_CROP, node.PADDING, node.HFLIP, node.AUTO_AUGMENT = "padded", 1, 0.0, ""
    node.COLOR_JITTER, node.RANDOM_ERASING = 0.0, 0.0
    pixels = np.random.default_rng(0).integers(1, 256, (8, 8, 3)).astype(np.uint8)
    transform = build_image_transform(cfg, is_train=True)
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)))
    shifts = set()
    for seed in range(60):
        with seeded(0, seed):
            image = transform(Image.fromarray(pixels)).numpy().transpose(1, 2, 0)
        shifts |= {
            (y, x)
            for y in range(3)
            for x in range(3)
            if np.array_equal(padded[y : y + 8, x : x + 8], image)
        }
    assert len(shifts) == 9


def test_flip_follows_its_probability(cfg: CfgNode, tmp_path: Path) -> None:
    node = cfg.INPUT.CLASSIFICATION
    node.TRAIN_CROP, node.PADDING, node.HFLIP, node.AUTO_AUGMENT = "padded", 0, 1.0, ""
    node.COLOR_JITTER, node.RANDOM_ERASING = 0.0, 0.0
    record = record_of(tmp_path)
    image = ClassificationMapper(cfg, is_train=True)(record)["image"]
    node.HFLIP = 0.0
    straight = ClassificationMapper(cfg, is_train=True)(record)["image"]
    assert torch.equal(image, straight.flip(2))
    assert not torch.equal(image, straight)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("TRAIN_CROP", "center", "choose one of resized, padded"),
        ("INTERPOLATION", "area", "choose one of bilinear, bicubic, random"),
        ("AUTO_AUGMENT", "rant-m9", "timm does not support .* 'rant-m9'"),
        ("HFLIP", 1.5, "HFLIP is 1.5: give 0 to 1"),
        ("RANDOM_ERASING", -0.1, "RANDOM_ERASING is -0.1: give 0 to 1"),
        ("SCALE", [0.5, 0.1], "SCALE is"),
        ("RATIO", [1.0], "RATIO is"),
        ("CROP_PCT", 0.0, "CROP_PCT is 0.0"),
        ("PADDING", -1, "PADDING is -1"),
        ("COLOR_JITTER", -1.0, "COLOR_JITTER -1.0"),
        ("REPEATED_AUGMENTATION", 0, "REPEATED_AUGMENTATION is 0: give 1 or more"),
    ],
)
def test_bad_values_are_reported(cfg: CfgNode, key: str, value: Any, message: str) -> None:
    cfg.INPUT.CLASSIFICATION[key] = value
    with pytest.raises(UserError, match=message):
        build_train_loader(cfg)


def test_bad_format_and_size(cfg: CfgNode) -> None:
    cfg.INPUT.FORMAT = "YUV"
    with pytest.raises(UserError, match=r"INPUT\.FORMAT is 'YUV'"):
        ClassificationMapper(cfg, is_train=False)
    cfg.INPUT.FORMAT, cfg.MODEL.CLASSIFIER.IMAGE_SIZE = "RGB", 0
    with pytest.raises(UserError, match="IMAGE_SIZE is 0"):
        ClassificationMapper(cfg, is_train=False)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named(cfg: CfgNode, tmp_path: Path, num_workers: int) -> None:
    cfg.DATALOADER.NUM_WORKERS = num_workers
    (tmp_path / "set" / "bee" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"image .*bee/0\.png cannot be read") as error:
        list(build_test_loader(cfg, cfg.DATASETS.TEST[0]))
    assert "\n" not in str(error.value)


def take(cfg: CfgNode, count: int, start_iter: int = 0) -> list[dict[str, Any]]:
    batches = itertools.islice(build_train_loader(cfg, start_iter=start_iter), count)
    return list(itertools.chain(*batches))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_late_goes_on_exactly(cfg: CfgNode, repeats: int, num_workers: int) -> None:
    cfg.INPUT.CLASSIFICATION.REPEATED_AUGMENTATION = repeats
    expected = take(cfg, 7)[2 * 3 :]
    cfg.DATALOADER.NUM_WORKERS = num_workers
    late = take(cfg, 4, start_iter=3)
    assert [sample["image_id"] for sample in late] == [sample["image_id"] for sample in expected]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(late, expected, strict=True))


def test_repetitions_of_an_image_are_different_views(cfg: CfgNode) -> None:
    cfg.INPUT.CLASSIFICATION.REPEATED_AUGMENTATION = 3
    first = take(cfg, 3)[:3]
    assert len({sample["image_id"] for sample in first}) == 1
    assert not torch.equal(first[0]["image"], first[1]["image"])
    assert not torch.equal(first[1]["image"], first[2]["image"])


def test_repeats_are_those_of_deits_sampler() -> None:
    """An epoch of N draws: N / R images, R times each, distributed over the processes."""
    size, repeats, world_size = 12, 3, 2
    shares = []
    for rank in range(world_size):
        sampler = ResumableSampler(size, seed=0, rank=rank, world_size=world_size, repeats=repeats)
        shares.append([item.image_index for item in itertools.islice(sampler, size // world_size)])
        theirs = RepeatAugSampler(
            range(size), world_size, rank, num_repeats=repeats, selected_round=0
        )
        assert len(shares[-1]) == len(theirs)
        assert _pattern(shares[-1]) == _pattern(list(theirs))
    assert sorted(Counter(itertools.chain(*shares)).values()) == [3, 3, 3, 3]


def _pattern(images: list[int]) -> list[int]:
    """For each draw, the first draw of the same image."""
    return [images.index(image) for image in images]


def test_each_epoch_has_its_own_images() -> None:
    sampler = ResumableSampler(30, seed=0, repeats=3)
    draws = [item.image_index for item in itertools.islice(sampler, 90)]
    epochs = [set(draws[start : start + 30]) for start in (0, 30, 60)]
    assert [len(epoch) for epoch in epochs] == [10, 10, 10]
    assert len(set.union(*epochs)) > 15


def test_a_thin_image_that_would_explode_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "thin.png"
    Image.new("RGB", (96, 1)).save(path)
    arguments = {"transform": lambda _: torch.zeros(3, 1, 1), "short_side": 256}
    ClassificationMapper(**arguments, max_pixels=256 * 96 * 256)({"file_name": str(path)})
    smaller = ClassificationMapper(**arguments, max_pixels=256 * 96 * 256 - 1)
    with pytest.raises(UserError, match=r"thin.png: 96 x 1 pixels .* resized to 256 are more than"):
        smaller({"file_name": str(path)})
