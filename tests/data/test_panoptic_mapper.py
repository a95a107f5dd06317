"""The mapper against a slow segment-by-segment computation, and its errors."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from panopticapi.utils import id2rgb, rgb2id
from PIL import Image

from batchformer_panoptic.config import add_batchformer_panoptic_config
from batchformer_panoptic.data import PanopticDatasetMapper, build_augmentations
from batchformer_panoptic.data.panoptic_mapper import (
    BoundedResize,
    number_segments,
    transform_segment_map,
)
from batchformer_panoptic.errors import UserError
from helpers.tiny_model import tiny_cfg


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    return cfg


@pytest.fixture
def dicts(tiny_panoptic_dataset: Any) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = DatasetCatalog.get(tiny_panoptic_dataset.name)
    return result


AUGMENTATIONS = {
    "none": [],
    "flip": [T.HFlipTransform(1)],
    "crop": [T.RandomCrop("absolute", (20, 18))],
    "smaller": [T.ResizeShortestEdge(23, 999, "choice")],
    "larger": [T.ResizeShortestEdge(70, 999, "choice")],
    "all": [
        T.RandomFlip(0.5),
        T.ResizeShortestEdge([30, 50], 999, "choice"),
        T.RandomCrop("absolute_range", (15, 40)),
        T.ResizeShortestEdge(45, 60, "choice"),
    ],
}


def slow_targets(
    dataset_dict: dict[str, Any], transforms: T.TransformList
) -> tuple[list[int], list[list[float]], list[np.ndarray]]:
    """Classes, boxes and masks, each segment moved on its own."""
    ids = rgb2id(np.asarray(Image.open(dataset_dict["pan_seg_file_name"]).convert("RGB")))
    classes, boxes, masks = [], [], []
    for segment in dataset_dict["segments_info"]:
        mask = transforms.apply_segmentation((ids == segment["id"]).astype(np.uint8)) > 0
        if segment["iscrowd"] or not mask.any():
            continue
        rows, columns = np.nonzero(mask)
        classes.append(segment["category_id"])
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        masks.append(mask)
    return classes, boxes, masks


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("number", range(5))
def test_image_masks_boxes_and_classes_move_together(
    dicts: list[dict[str, Any]], name: str, number: int
) -> None:
    mapper = PanopticDatasetMapper(
        is_train=True, augmentations=AUGMENTATIONS[name], image_format="RGB"
    )
    np.random.seed(number)
    out = mapper(dicts[number])
    np.random.seed(number)
    aug_input = T.AugInput(np.asarray(Image.open(dicts[number]["file_name"]).convert("RGB")))
    transforms = T.AugmentationList(AUGMENTATIONS[name])(aug_input)
    classes, boxes, masks = slow_targets(dicts[number], transforms)

    height, width = aug_input.image.shape[:2]
    expected_image = torch.from_numpy(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
    torch.testing.assert_close(out["image"], expected_image, rtol=0, atol=0)
    instances = out["instances"]
    assert instances.image_size == (height, width)
    torch.testing.assert_close(instances.gt_classes, torch.tensor(classes, dtype=torch.int64))
    expected_boxes = torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32)
    torch.testing.assert_close(instances.gt_boxes.tensor, expected_boxes)
    assert out["segment_map"].dtype == torch.int16
    expected_map = torch.full((height, width), -1, dtype=torch.int16)
    for position, mask in enumerate(masks):
        expected_map[torch.from_numpy(mask)] = position
    torch.testing.assert_close(out["segment_map"], expected_map, rtol=0, atol=0)


def test_crowd_and_void_are_left_out(dicts: list[dict[str, Any]], cfg: CfgNode) -> None:
    out = PanopticDatasetMapper(cfg, True)(dicts[0])
    assert out["instances"].gt_classes.tolist() == [3, 1, 0, 0, 2]
    assert (out["segment_map"][:, -2:] == -1).all()  # void
    assert (out["segment_map"][-6:, :7] == -1).all()  # crowd
    assert (out["segment_map"] == -1).sum() == 2 * 48 + 6 * 7
    assert out["instances"].gt_boxes.tensor[2].tolist() == [3, 4, 9, 10]


def test_segments_that_a_crop_removes_are_dropped(dicts: list[dict[str, Any]]) -> None:
    crop = T.CropTransform(0, 30, 8, 8)
    mapper = PanopticDatasetMapper(is_train=True, augmentations=[crop], image_format="RGB")
    out = mapper(dicts[0])
    assert out["instances"].gt_classes.tolist() == [1]
    assert out["instances"].gt_boxes.tensor.tolist() == [[0, 0, 8, 8]]
    assert out["segment_map"].unique().tolist() == [0]


def test_image_without_segments(dicts: list[dict[str, Any]], cfg: CfgNode) -> None:
    out = PanopticDatasetMapper(cfg, True)(dicts[4])
    assert out["instances"].gt_classes.shape == (0,)
    assert out["instances"].gt_classes.dtype == torch.int64
    assert out["instances"].gt_boxes.tensor.shape == (0, 4)
    assert (out["segment_map"] == -1).all()
    assert out["segment_map"].shape == (48, 64)


def test_evaluation_has_no_targets(dicts: list[dict[str, Any]], cfg: CfgNode) -> None:
    cfg.INPUT.MIN_SIZE_TEST = 80
    out = PanopticDatasetMapper(cfg, False)(dicts[1])
    assert set(out) == {"image", "file_name", "image_id", "height", "width"}
    assert out["image"].shape == (3, 100, 80)
    assert out["image"].dtype == torch.uint8
    assert (out["height"], out["width"], out["image_id"]) == (40, 32, 101)
    cfg.INPUT.MIN_SIZE_TEST = 0
    assert PanopticDatasetMapper(cfg, False)(dicts[1])["image"].shape == (3, 40, 32)


def test_channel_order(dicts: list[dict[str, Any]], cfg: CfgNode) -> None:
    rgb = PanopticDatasetMapper(cfg, False)(dicts[0])["image"]
    cfg.INPUT.FORMAT = "BGR"
    bgr = PanopticDatasetMapper(cfg, False)(dicts[0])["image"]
    torch.testing.assert_close(bgr.flip(0), rgb, rtol=0, atol=0)
    assert not torch.equal(bgr, rgb)
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(UserError, match=r"INPUT\.FORMAT"):
        PanopticDatasetMapper(cfg, False)


@pytest.mark.parametrize("is_train", [True, False])
def test_dataset_dict_is_left_alone(
    dicts: list[dict[str, Any]], cfg: CfgNode, is_train: bool
) -> None:
    before = copy.deepcopy(dicts[0])
    PanopticDatasetMapper(cfg, is_train)(dicts[0])
    assert dicts[0] == before


def _box_dict(dicts: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [([2, 3, 10, 5], 1, 0), ([20, 30, 5, 6], 0, 0), ([0, 0, 60, 40], 0, 1)]
    annotations = [
        {
            "bbox": bbox,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": category_id,
            "iscrowd": iscrowd,
            "segmentation": [[0.0, 0.0, 1.0, 1.0, 2.0, 0.0]],
        }
        for bbox, category_id, iscrowd in rows
    ]
    return {
        "file_name": dicts[0]["file_name"],
        "image_id": 1,
        "height": 48,
        "width": 64,
        "annotations": annotations,
    }


@pytest.mark.parametrize(
    ("transform", "classes", "boxes"),
    [
        (T.NoOpTransform(), [1, 0], [[2, 3, 12, 8], [20, 30, 25, 36]]),
        (T.HFlipTransform(64), [1, 0], [[52, 3, 62, 8], [39, 30, 44, 36]]),
        (T.CropTransform(0, 0, 30, 6), [1], [[2, 3, 12, 6]]),
    ],
)
def test_boxes(
    dicts: list[dict[str, Any]], transform: T.Transform, classes: list[int], boxes: list[Any]
) -> None:
    dataset_dict = _box_dict(dicts)
    before = copy.deepcopy(dataset_dict)
    mapper = PanopticDatasetMapper(is_train=True, augmentations=[transform], image_format="RGB")
    out = mapper(dataset_dict)
    assert "segment_map" not in out
    assert set(out["instances"].get_fields()) == {"gt_classes", "gt_boxes"}
    assert out["instances"].gt_classes.tolist() == classes
    assert out["instances"].gt_boxes.tensor.tolist() == boxes
    assert dataset_dict == before


def test_image_without_boxes(dicts: list[dict[str, Any]], cfg: CfgNode) -> None:
    out = PanopticDatasetMapper(cfg, True)({**_box_dict(dicts), "annotations": []})
    assert out["instances"].gt_boxes.tensor.shape == (0, 4)
    assert out["instances"].gt_classes.dtype == torch.int64


@pytest.mark.parametrize("segments", [3, 254, 255, 256, 700])
def test_many_segments_survive_a_resize(segments: int) -> None:
    png_ids = np.arange(30 * 40).reshape(30, 40) % segments + 1
    infos = [{"id": number + 1, "iscrowd": 0} for number in range(segments)]
    segment_map = number_segments(png_ids.astype(np.int32), infos, png_name="a.png")
    np.testing.assert_array_equal(segment_map, png_ids)
    resize = T.TransformList([T.ResizeTransform(30, 40, 21, 52), T.HFlipTransform(52)])
    expected = np.asarray(Image.fromarray(png_ids.astype(np.int32)).resize((52, 21), Image.NEAREST))
    moved = transform_segment_map(segment_map, resize)
    assert moved.dtype == segment_map.dtype
    np.testing.assert_array_equal(moved, expected[:, ::-1])


def _with_png(dataset_dict: dict[str, Any], ids: np.ndarray, folder: Path) -> dict[str, Any]:
    path = folder / "changed.png"
    Image.fromarray(id2rgb(ids)).save(path)
    return {**dataset_dict, "pan_seg_file_name": str(path)}


def test_png_that_disagrees_with_the_json(
    dicts: list[dict[str, Any]], cfg: CfgNode, tmp_path: Path
) -> None:
    mapper = PanopticDatasetMapper(cfg, True)
    ids = rgb2id(np.asarray(Image.open(dicts[0]["pan_seg_file_name"])))
    for unlisted in (2, 16_000_000):  # between the listed ids, and above them
        changed = ids.copy()
        changed[0, 0] = unlisted
        with pytest.raises(
            UserError, match=rf"changed\.png, segment {unlisted}: not listed in segments_info"
        ):
            mapper(_with_png(dicts[0], changed, tmp_path))
    changed = np.where(ids == 5, 1, ids)
    with pytest.raises(
        UserError,
        match=r"changed\.png, segment 5: listed in segments_info, but no pixel has this id",
    ):
        mapper(_with_png(dicts[0], changed, tmp_path))
    with pytest.raises(UserError, match=r"changed\.png is 60x48, but its image is 64x48"):
        mapper(_with_png(dicts[0], ids[:, :60], tmp_path))


def test_files_that_cannot_be_read(
    dicts: list[dict[str, Any]], cfg: CfgNode, tmp_path: Path
) -> None:
    mapper = PanopticDatasetMapper(cfg, True)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(dicts[0]["file_name"]).read_bytes()[:200])
    missing = str(tmp_path / "missing.png")
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    for changes, words in (
        ({"file_name": missing}, r"^image .*missing\.png does not exist"),
        ({"file_name": str(broken)}, r"^image .*broken\.jpg cannot be read"),
        ({"file_name": str(text)}, r"^image .*text\.jpg cannot be read"),
        ({"pan_seg_file_name": missing}, r"^panoptic PNG .*missing\.png does not exist"),
        ({"pan_seg_file_name": str(text)}, r"^panoptic PNG .*text\.jpg cannot be read"),
        ({"width": 63}, r"000\.png is 64x48, but in the JSON 63x48"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            mapper({**dicts[0], **changes})
        assert "\n" not in str(caught.value)


def test_dict_without_annotations(dicts: list[dict[str, Any]], cfg: CfgNode) -> None:
    dataset_dict = {key: dicts[0][key] for key in ("file_name", "image_id")}
    with pytest.raises(UserError, match="neither segments nor boxes"):
        PanopticDatasetMapper(cfg, True)(dataset_dict)
    assert PanopticDatasetMapper(cfg, False)(dataset_dict)["height"] == 48


def test_resize_or_crop_ranges(cfg: CfgNode) -> None:
    cfg.INPUT.MIN_SIZE_TRAIN = (20, 24)
    cfg.INPUT.MAX_SIZE_TRAIN = 40
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    cfg.INPUT.RESIZE_OR_CROP.ENABLED = True
    cfg.INPUT.RESIZE_OR_CROP.MIN_SIZES = [30, 36]
    cfg.INPUT.RESIZE_OR_CROP.CROP_RANGE = [16, 33]
    augmentations = T.AugmentationList(build_augmentations(cfg, True))
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    crops, flips, shorts, first_sizes = [], 0, set(), set()
    for _ in range(400):
        transforms = augmentations(T.AugInput(image.copy())).transforms
        kinds = [type(transform).__name__ for transform in transforms]
        flips += "HFlipTransform" in kinds
        if "CropTransform" in kinds:
            assert kinds[:3] == ["_Resize", "CropTransform", "_Resize"]
            first_sizes.add(transforms[0].new_h)
            crops.append((transforms[1].h, transforms[1].w))
        resizes = [t for t in transforms if isinstance(t, T.ResizeTransform)]
        last = resizes[-1]
        if max(last.new_h, last.new_w) < 40:
            shorts.add(min(last.new_h, last.new_w))
    assert 150 < len(crops) < 250
    assert 150 < flips < 250
    assert first_sizes == {30, 36}
    assert shorts == {20, 24}
    heights, widths = zip(*crops, strict=True)
    assert (min(heights), max(heights)) == (16, 33)
    assert (min(widths), max(widths)) == (16, 33)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.RANDOM_FLIP", "diagonal"),
        ("INPUT.RESIZE_OR_CROP.CROP_RANGE", [600, 384]),
        ("INPUT.RESIZE_OR_CROP.CROP_RANGE", [384]),
        ("INPUT.RESIZE_OR_CROP.MIN_SIZES", []),
    ],
)
def test_augmentations_that_do_not_exist(cfg: CfgNode, key: str, value: object) -> None:
    cfg.INPUT.RESIZE_OR_CROP.ENABLED = True
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=key):
        build_augmentations(cfg, True)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_crops_and_flips_are_resized_as_by_detectron2(dtype: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3)).astype(np.uint8)
    of_crop = pixels[5:45, 10:60][:, ::-1]
    resize = BoundedResize(T.ResizeShortestEdge([31], sample_style="choice"), 10**6)
    ours, theirs = resize.get_transform(of_crop), T.ResizeTransform(40, 50, 31, 39)
    np.testing.assert_array_equal(ours.apply_image(of_crop), theirs.apply_image(of_crop.copy()))
    segment_map = of_crop[..., 0].astype(dtype)
    np.testing.assert_array_equal(
        transform_segment_map(segment_map, T.TransformList([ours])),
        transform_segment_map(segment_map.copy(), T.TransformList([theirs])),
    )


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1), (1, 96)])
def test_a_thin_image_keeps_a_pixel(size):
    cfg = tiny_cfg(INPUT__MIN_SIZE_TEST=48, INPUT__MAX_SIZE_TEST=64)
    mapped = PanopticDatasetMapper(cfg, is_train=False).map_image(np.zeros((*size, 3), np.uint8))
    height, width = mapped["image"].shape[1:]
    assert min(height, width) >= 1
    assert max(height, width) <= 64
    assert (mapped["height"], mapped["width"]) == size


def test_a_resize_that_explodes_is_refused():
    resize = BoundedResize(T.ResizeShortestEdge([48], sample_style="choice"), 48 * 4608)
    assert resize.get_transform(np.zeros((1, 96, 3), np.uint8)).new_w == 4608
    with pytest.raises(UserError, match=r"97 x 1 pixels would be resized to 4656 x 48, more than"):
        resize.get_transform(np.zeros((1, 97, 3), np.uint8))
