"""Copy-paste: pixels and segments of two small images by hand, and its way through the loader."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog

from batchformer_panoptic.config import add_batchformer_panoptic_config
from batchformer_panoptic.data import PanopticDatasetMapper, build_train_loader
from batchformer_panoptic.data.copy_paste import SegmentedImage, paste_things
from batchformer_panoptic.errors import UserError

THING, STUFF = {"category_id": 0, "isthing": True}, {"category_id": 1, "isthing": False}


def segmented(
    segment_map: list[list[int]], infos: list[dict[str, Any]], value: int
) -> SegmentedImage:
    numbers = np.array(segment_map, dtype=np.uint8)
    image = np.full((*numbers.shape, 3), value, dtype=np.uint8) + numbers[..., None]
    return SegmentedImage(image, numbers, infos)


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets every random number that `paste_things` draws."""

    def fix(value: float) -> None:
        monkeypatch.setattr(np.random, "random", lambda size: np.full(size, value))

    return fix


def test_pixels_and_segments_by_hand(draw: Callable[[float], None]) -> None:
    draw(0.1)
    target = segmented([[1, 1, 2, 2], [1, 1, 2, 0]], [STUFF, THING], value=10)
    # Stuff (1), a thing (2), a thing that is not visible (3), another thing (4), and void.
    source = segmented([[0, 2, 2, 1], [4, 0, 1, 4]], [STUFF, THING, THING, THING], value=100)
    result = paste_things(target, source)
    np.testing.assert_array_equal(result.segment_map, [[1, 3, 3, 2], [4, 1, 2, 4]])
    np.testing.assert_array_equal(result.image[..., 0], [[11, 102, 102, 12], [104, 11, 12, 104]])
    assert result.segment_map.dtype == np.uint8
    assert [info["isthing"] for info in result.segments_info] == [False, True, True, True]


def test_things_that_are_not_drawn_stay_behind(draw: Callable[[float], None]) -> None:
    draw(0.9)
    target = segmented([[1, 0]], [STUFF], value=10)
    result = paste_things(target, segmented([[1, 1]], [THING], value=100))
    np.testing.assert_array_equal(result.image, target.image)
    np.testing.assert_array_equal(result.segment_map, target.segment_map)


def test_half_of_the_things_are_drawn() -> None:
    np.random.seed(0)
    target = segmented([[0] * 1000], [], value=0)
    source = SegmentedImage(
        np.ones((1, 1000, 3), dtype=np.uint8),
        np.arange(1, 1001, dtype=np.uint16)[None],
        [THING] * 1000,
    )
    result = paste_things(target, source)
    assert 450 < len(result.segments_info) < 550
    # More than 255 segments do not fit in uint8.
    assert result.segment_map.max() == len(result.segments_info)
    np.testing.assert_array_equal(result.segment_map > 0, result.image[..., 0] > 0)


def test_other_sizes_are_refused() -> None:
    target = segmented([[1, 1]], [THING], value=0)
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(1, 1\) differ"):
        paste_things(target, segmented([[1]], [THING], value=0))


@pytest.fixture
def cfg(tiny_panoptic_dataset: Any) -> CfgNode:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.DATASETS.TRAIN = (tiny_panoptic_dataset.name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 3
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.LARGE_SCALE_JITTER.ENABLED = True
    cfg.INPUT.LARGE_SCALE_JITTER.SIZE = 40
    cfg.INPUT.COPY_PASTE = 0.8
    return cfg


def take(cfg: CfgNode, count: int, start_iter: int = 0) -> list[dict[str, Any]]:
    batches = build_train_loader(cfg, start_iter=start_iter)
    return list(itertools.chain(*itertools.islice(batches, count)))


def test_targets_describe_the_pasted_image(
    tiny_panoptic_dataset: Any, cfg: CfgNode, draw: Callable[[float], None]
) -> None:
    dicts = DatasetCatalog.get(tiny_panoptic_dataset.name)
    cfg.INPUT.LARGE_SCALE_JITTER.SCALE_RANGE = [1.0, 1.0]
    cfg.INPUT.RANDOM_FLIP = "none"
    mapper = PanopticDatasetMapper(cfg, is_train=True)
    draw(0.1)
    target, source, result = mapper(dicts[0]), mapper(dicts[1]), mapper(dicts[0], dicts[1])
    assert result["image_id"] == dicts[0]["image_id"]
    infos = [info for info in dicts[1]["segments_info"] if not info["iscrowd"]]
    things = {info["category_id"] for info in infos if info["isthing"]}
    moved = torch.tensor(
        [label in things for label in source["instances"].gt_classes.tolist()] + [False]
    )[source["segment_map"].long()]
    assert moved.any()
    assert not moved.all()
    assert torch.equal(result["image"], torch.where(moved, source["image"], target["image"]))
    classes = torch.cat([result["instances"].gt_classes, torch.tensor([-1])])
    expected = torch.where(
        moved,
        torch.cat([source["instances"].gt_classes, torch.tensor([-1])])[
            source["segment_map"].long()
        ],
        torch.cat([target["instances"].gt_classes, torch.tensor([-1])])[
            target["segment_map"].long()
        ],
    )
    assert torch.equal(classes[result["segment_map"].long()], expected)


def test_images_follow_from_the_position(cfg: CfgNode) -> None:
    expected = take(cfg, 6)
    for actual, wanted in zip(take(cfg, 3, start_iter=3), expected[6:], strict=True):
        assert torch.equal(actual["image"], wanted["image"])
        assert torch.equal(actual["segment_map"], wanted["segment_map"])


def test_the_probability_decides_which_images_change(cfg: CfgNode) -> None:
    with_paste = take(cfg, 20)
    cfg.INPUT.COPY_PASTE = 0.0
    without = take(cfg, 20)
    changed = [
        not torch.equal(a["image"], b["image"]) for a, b in zip(with_paste, without, strict=True)
    ]
    # Some sources have no thing that is drawn.
    assert 15 < sum(changed) < 40
    assert [a["image_id"] for a in with_paste] == [b["image_id"] for b in without]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("INPUT.COPY_PASTE", 1.5, "COPY_PASTE is 1.5: give a probability"),
        ("INPUT.COPY_PASTE", -0.1, "COPY_PASTE is -0.1: give a probability"),
        ("INPUT.LARGE_SCALE_JITTER.ENABLED", False, "LARGE_SCALE_JITTER.ENABLED True"),
        ("DATASETS.TRAIN", ("coco_2017_val",), "coco_2017_val has no masks to paste"),
        ("INPUT.LARGE_SCALE_JITTER.SCALE_RANGE", [2.0, 0.1], "smallest and the largest factor"),
        ("INPUT.LARGE_SCALE_JITTER.SIZE", 0, "SIZE is 0"),
        ("INPUT.RESIZE_OR_CROP.ENABLED", True, "both enabled"),
    ],
)
def test_settings_that_are_refused(cfg: CfgNode, key: str, value: object, words: str) -> None:
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=words):
        build_train_loader(cfg)


def test_large_scale_jitter_pads_with_void(cfg: CfgNode) -> None:
    cfg.INPUT.COPY_PASTE = 0.0
    cfg.INPUT.LARGE_SCALE_JITTER.SCALE_RANGE = [0.5, 0.5]
    samples = take(cfg, 10)
    # Flipped images, too, are padded at the right and at the bottom.
    for sample in samples:
        assert sample["image"].shape == (3, 40, 40)
        outside = sample["segment_map"].clone()
        outside[:20, :20] = -1
        assert (outside == -1).all()
    assert any((sample["segment_map"][:20, :20] >= 0).any() for sample in samples)
