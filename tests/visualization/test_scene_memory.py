"""A scene of a thousand segments stores a single segment map, for any source."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from panopticapi.utils import id2rgb
from PIL import Image

from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.visualization.drawing import draw_scene
from batchformer_panoptic.visualization.scene import (
    Region,
    Scene,
    scene_of_annotation,
    scene_of_result,
    scene_of_targets,
)
from helpers.commands import load_script

HEIGHT, WIDTH = 60, 90
TABLE = ClassTable(
    names=("box", "ground"),
    is_thing=(True, False),
    colors=((220, 20, 60), (110, 200, 110)),
    dataset_ids=(3, 7),
)


def grid(across: int) -> np.ndarray:
    """(H, W) int64 ids from 1, so many cells in a row and half as many in a column."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return 1 + (rows * (across // 2) // HEIGHT) * across + columns * across // WIDTH


def scenes(ids: np.ndarray, folder) -> dict[str, Scene]:
    """The same segments three times; the last one is a crowd where the source has such a thing."""
    Image.fromarray(id2rgb(ids)).save(folder / "segments.png")
    number = int(ids.max())
    infos = [{"id": k, "category_id": k % 2, "iscrowd": k // number} for k in range(1, number + 1)]
    instances = Instances(ids.shape)
    instances.gt_boxes = Boxes(torch.zeros(number, 4))
    instances.gt_classes = torch.tensor([info["category_id"] for info in infos])
    segment_map = torch.from_numpy(ids - 1).short()
    annotation = {"pan_seg_file_name": str(folder / "segments.png"), "segments_info": infos}
    return {
        "result": scene_of_result({"panoptic_seg": (torch.from_numpy(ids), infos)}),
        "annotation": scene_of_annotation(annotation),
        "targets": scene_of_targets({"instances": instances, "segment_map": segment_map}),
    }


@pytest.mark.parametrize("source", ["result", "annotation", "targets"])
def test_a_scene_holds_no_mask_for_each_segment(source, tmp_path) -> None:
    peak = load_script("benchmarks/measure.py").python_peak_bytes
    ids = grid(44)
    scene = scenes(ids, tmp_path)[source]
    assert len(scene.regions) == 968
    for index in (0, 500, 967):
        np.testing.assert_array_equal(scene.regions[index].mask, ids == index + 1)

    def resized() -> list[Region]:
        return [region.resized((4 * HEIGHT, 4 * WIDTH), 4.0) for region in scene.regions]

    # A mask of each at this size would be 968 bytes for each pixel of the picture.
    assert peak(lambda: scenes(ids, tmp_path)) < 100 * 16 * ids.size
    assert peak(resized) < 20 * 16 * ids.size


@pytest.mark.parametrize("source", ["result", "annotation", "targets"])
@pytest.mark.parametrize("scale", [1.0, 0.7, 2.3])
def test_pictures_are_those_of_masks_that_are_held(source, scale, tmp_path) -> None:
    lazy = scenes(grid(4), tmp_path)[source]
    held = Scene([region._replace(pixels=region.mask) for region in lazy.regions], True)
    image = np.full((HEIGHT, WIDTH, 3), 100, dtype=np.uint8)
    a, b = (draw_scene(image, scene, TABLE, scale=scale) for scene in (lazy, held))
    np.testing.assert_array_equal(a, b)
    assert a.std() > 10
