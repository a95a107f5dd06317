"""The cost of an image with a thousand segments is that of its pixels, not of a thousand masks."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from panopticapi.utils import id2rgb, rgb2id
from PIL import Image

from batchformer_panoptic.data import PanopticDatasetMapper
from batchformer_panoptic.data.panoptic_mapper import number_segments, panoptic_instances
from batchformer_panoptic.data.segment_maps import read_segment_map
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.set_prediction.targets import to_targets
from helpers.commands import load_script

HEIGHT, WIDTH = 240, 320


def image_of(segments: int, folder: Path) -> dict[str, Any]:
    """A dataset dict whose PNG is a grid of that many wavy cells, the ids in random order."""
    side = int(np.ceil(segments**0.5))
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    rows = (rows + 2 * np.sin(columns / 7)).clip(0, HEIGHT - 1).astype(int)
    cells = (rows * side // HEIGHT) * side + columns * side // WIDTH
    ids = np.random.default_rng(0).choice(2**24 - 1, segments, replace=False) + 1
    png, image = folder / f"{segments}.png", folder / "image.png"
    Image.fromarray(id2rgb(ids[cells.clip(max=segments - 1)])).save(png)
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)).save(image)
    infos = [{"id": int(x), "iscrowd": 0, "category_id": k % 7} for k, x in enumerate(ids)]
    return {
        "file_name": str(image),
        "pan_seg_file_name": str(png),
        "image_id": segments,
        "segments_info": infos,
    }


def peak(function: Callable[[], object]) -> int:
    """Peak bytes of Python and numpy during a call, after a warm-up call."""
    function()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def mapper() -> PanopticDatasetMapper:
    flip = [T.HFlipTransform(WIDTH)]
    return PanopticDatasetMapper(is_train=True, augmentations=flip, image_format="RGB")


def test_the_mapper_needs_no_memory_for_each_segment(
    mapper: PanopticDatasetMapper, tmp_path: Path
) -> None:
    few, many = image_of(10, tmp_path), image_of(1000, tmp_path)
    pixels = HEIGHT * WIDTH
    # A bool mask for each segment would be 1000 bytes a pixel.
    assert peak(lambda: mapper(many)) < peak(lambda: mapper(few)) + 12 * pixels < 40 * pixels
    assert len(mapper(many)["instances"]) == 1000


def test_ids_are_numbered_in_a_few_bytes_a_pixel(tmp_path: Path) -> None:
    for segments in (10, 1000):
        image = image_of(segments, tmp_path)
        used = peak(
            lambda image=image: number_segments(
                read_segment_map(image["pan_seg_file_name"]), image["segments_info"], png_name="a"
            )
        )
        assert used < 12 * HEIGHT * WIDTH  # an int32 for each channel would be as much


def test_what_a_worker_sends_and_the_target_hold_one_map(
    mapper: PanopticDatasetMapper, tmp_path: Path
) -> None:
    mapped = mapper(image_of(1000, tmp_path))
    assert mapped["segment_map"].nbytes == 2 * HEIGHT * WIDTH
    used = load_script("benchmarks/measure.py").peak_bytes(
        lambda: to_targets([mapped], torch.device("cpu"), with_masks=True)
    )
    assert used < 100 * 1000  # boxes and labels
    (target,) = to_targets([mapped], torch.device("cpu"), with_masks=True)
    assert target.masks.segment_map.data_ptr() == mapped["segment_map"].data_ptr()


def test_boxes_and_map_are_those_of_the_masks(
    mapper: PanopticDatasetMapper, tmp_path: Path
) -> None:
    image = image_of(1000, tmp_path)
    mapped = mapper(image)
    ids = rgb2id(np.asarray(Image.open(image["pan_seg_file_name"])))[:, ::-1]
    boxes = mapped["instances"].gt_boxes.tensor.tolist()
    for index in range(0, 1000, 7):
        segment = image["segments_info"][index]
        mask = ids == segment["id"]
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert boxes[index] == box
        assert mapped["instances"].gt_classes[index] == segment["category_id"]
        np.testing.assert_array_equal(mapped["segment_map"].numpy() == index, mask)


def test_segments_without_pixels_leave_no_gap() -> None:
    infos = [{"category_id": category} for category in (5, 6, 7, 8)]
    numbered = np.array([[0, 3, 3], [1, 1, 0]], dtype=np.uint8)
    instances, segment_map = panoptic_instances(numbered, infos)
    assert instances.gt_classes.tolist() == [5, 7]
    assert instances.gt_boxes.tensor.tolist() == [[0, 1, 2, 2], [1, 0, 3, 1]]
    assert segment_map.tolist() == [[-1, 1, 1], [0, 0, -1]]
    assert segment_map.dtype == torch.int16


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 7)])
def test_numbers_are_those_of_a_search_for_each_pixel(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    listed = [70_000, 3, 16_777_215, 256]
    ids = rng.choice([0, *listed], size=shape)
    infos = [{"id": x, "iscrowd": int(x == 3)} for x in listed if (ids == x).any()]
    expected = np.zeros(shape, dtype=np.uint8)
    for number, info in enumerate(infos):
        if not info["iscrowd"]:
            expected[ids == info["id"]] = number + 1
    segment_map = number_segments(ids, infos, png_name="a.png")
    np.testing.assert_array_equal(segment_map, expected)
    assert segment_map.dtype == np.uint8
    ids[-1, -1] = 9
    with pytest.raises(UserError, match=r"a\.png, segment 9: not listed in segments_info"):
        number_segments(ids, infos, png_name="a.png")


def test_ids_listed_twice_are_refused() -> None:
    infos = [{"id": 3, "iscrowd": 0}] * 2
    with pytest.raises(UserError, match=r"a\.png, segment 3: 2 entries of segments_info have"):
        number_segments(np.full((2, 2), 3), infos, png_name="a.png")


def test_more_segments_than_the_map_can_count_are_refused() -> None:
    infos = [{"id": segment_id, "iscrowd": 0} for segment_id in range(1, 2**15 + 1)]
    with pytest.raises(UserError, match=r"a\.png: 32768 segments; at most 32767 are possible"):
        number_segments(np.ones((2, 2), dtype=np.int32), infos, png_name="a.png")
