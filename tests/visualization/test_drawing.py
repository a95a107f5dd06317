"""Drawing: colours, void and crowds, sizes, labels."""

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from panopticapi.utils import id2rgb
from PIL import Image

from batchformer_panoptic.data import ClassTable
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.visualization import (
    draw_ground_truth,
    draw_result,
    draw_targets,
    drawing,
)
from batchformer_panoptic.visualization.drawing import Named, instance_shade, place_labels
from batchformer_panoptic.visualization.scene import Region
from batchformer_panoptic.visualization.text import Label

TABLE = ClassTable(
    names=("box", "ground", "disc"),
    is_thing=(True, False, True),
    colors=((220, 20, 60), (110, 200, 110), (0, 0, 142)),
    dataset_ids=(3, 7, 12),
)
GRAY = 100
VOID, GROUND, BOX, OTHER_BOX = 0, 1, 2, 3


def gray_image(height: int = 40, width: int = 60) -> np.ndarray:
    return np.full((height, width, 3), GRAY, dtype=np.uint8)


def segment_ids() -> np.ndarray:
    """(40, 60): void on the left, ground, two boxes of 16x14 pixels."""
    ids = np.full((40, 60), GROUND)
    ids[:, :12] = VOID
    ids[12:28, 18:32] = BOX
    ids[12:28, 40:54] = OTHER_BOX
    return ids


def segments(**fields: Any) -> list[dict[str, Any]]:
    classes = {GROUND: 1, BOX: 0, OTHER_BOX: 0}
    return [
        {"id": k, "category_id": c, "isthing": TABLE.is_thing[c], **fields}
        for k, c in classes.items()
    ]


def result() -> dict[str, Any]:
    return {"panoptic_seg": (torch.from_numpy(segment_ids()).int(), segments())}


def patch(picture: np.ndarray, row: int, column: int, scale: int = 10) -> np.ndarray:
    """The middle of the square that pixel (row, column) has become."""
    rows, columns = (slice(x * scale + 2, x * scale + 8) for x in (row, column))
    return picture[rows, columns].reshape(-1, 3).astype(float)


def filled(color: tuple[float, ...]) -> np.ndarray:
    return 0.5 * GRAY + 0.5 * np.array(color)


def test_segments_have_the_colours_of_their_classes() -> None:
    picture = draw_result(gray_image(), result(), TABLE, scale=10)
    assert picture.shape == (400, 600, 3)
    assert picture.dtype == np.uint8
    for (row, column), color in {(2, 57): TABLE.colors[1], (13, 19): TABLE.colors[0]}.items():
        np.testing.assert_allclose(
            patch(picture, row, column) - filled(color), 0, atol=3, err_msg=str((row, column))
        )


def test_instances_of_a_class_differ_unless_told_otherwise() -> None:
    varied = draw_result(gray_image(), result(), TABLE, scale=10)
    second = 255 * np.array(instance_shade(TABLE.colors[0], 1))
    np.testing.assert_allclose(patch(varied, 13, 41) - filled(second), 0, atol=3)
    assert abs(second - TABLE.colors[0]).max() > 30
    steady = draw_result(gray_image(), result(), TABLE, scale=10, vary_instances=False)
    np.testing.assert_allclose(patch(steady, 13, 41), patch(steady, 13, 19), atol=2)


def test_void_is_hatched_and_other_regions_are_not() -> None:
    picture = draw_result(gray_image(), result(), TABLE, scale=10)
    assert picture[10:60, 10:60].std() > 2
    assert picture[10:60, 420:520].std(axis=(0, 1)).max() < 1
    colors = np.unique(picture[10:60, 10:60].reshape(-1, 3), axis=0)
    assert GRAY in colors[:, 0]  # between the stripes there is the image


def test_ground_truth_looks_like_an_equal_prediction(tmp_path) -> None:
    Image.fromarray(id2rgb(segment_ids())).save(tmp_path / "ids.png")
    annotation = {
        "file_name": "x.png",
        "pan_seg_file_name": str(tmp_path / "ids.png"),
        "segments_info": segments(iscrowd=0),
    }
    np.testing.assert_array_equal(
        draw_ground_truth(gray_image(), annotation, TABLE),
        draw_result(gray_image(), result(), TABLE),
    )
    annotation["segments_info"] = segments(iscrowd=1)
    crowd = draw_ground_truth(gray_image(), annotation, TABLE, scale=10)
    assert crowd[10:60, 420:520].std(axis=(0, 1)).max() > 5, "crowds are hatched"


@pytest.mark.parametrize(
    ("size", "expected"), [((40, 60), (384, 576)), ((400, 500), (400, 500)), ((96, 96), (384, 384))]
)
def test_small_images_are_enlarged(size: tuple[int, int], expected: tuple[int, int]) -> None:
    empty = {"panoptic_seg": (torch.zeros(size, dtype=torch.int32), [])}
    assert draw_result(gray_image(*size), empty, TABLE).shape == (*expected, 3)


def test_inputs_and_random_numbers_are_left_alone() -> None:
    image, drawn = gray_image(), result()
    before = np.random.get_state()[1].copy()
    draw_result(image, drawn, TABLE)
    np.testing.assert_array_equal(image, gray_image())
    assert drawn["panoptic_seg"][1] == segments()
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_instances_are_drawn_where_there_is_no_panoptic_map() -> None:
    instances = Instances((40, 60))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 10.0, 50.0, 30.0]]))
    instances.pred_classes, instances.scores = torch.tensor([2]), torch.tensor([0.7])
    picture = draw_result(gray_image(), {"instances": instances}, TABLE, scale=10)
    np.testing.assert_allclose(picture[200, 500], TABLE.colors[2], atol=3)
    assert (picture[50:80, 550] == GRAY).all(), "outside nothing is hatched or filled"
    assert (picture[200, 300] == GRAY).all()


def test_annotated_boxes_are_drawn() -> None:
    annotation = {
        "file_name": "x.png",
        "height": 40,
        "width": 60,
        "annotations": [
            {
                "bbox": [10, 10, 40, 20],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 2,
                "segmentation": [[10, 10, 50, 10, 50, 30, 10, 30]],
            }
        ],
    }
    picture = draw_ground_truth(gray_image(), annotation, TABLE, scale=10)
    np.testing.assert_allclose(picture[200, 500], TABLE.colors[2], atol=3)
    np.testing.assert_allclose(patch(picture, 20, 30) - filled(TABLE.colors[2]), 0, atol=3)


def test_nothing_annotated_is_an_error() -> None:
    with pytest.raises(UserError, match=r"x\.png has neither segments nor boxes"):
        draw_ground_truth(gray_image(), {"file_name": "x.png"}, TABLE)


def test_an_unreadable_panoptic_png_is_named(tmp_path) -> None:
    (tmp_path / "bad.png").write_text("no image")
    annotation = {"pan_seg_file_name": str(tmp_path / "bad.png"), "segments_info": []}
    with pytest.raises(UserError, match=r"panoptic PNG .*bad\.png cannot be read"):
        draw_ground_truth(gray_image(), annotation, TABLE)


def test_targets_are_drawn_with_masks_and_boxes() -> None:
    instances = Instances((40, 60))
    instances.gt_boxes = Boxes(torch.tensor([[18.0, 12.0, 32.0, 28.0]]))
    instances.gt_classes = torch.tensor([2])
    segment_map = torch.from_numpy(np.where(segment_ids() == BOX, 0, -1)).short()
    mapped = {"instances": instances, "segment_map": segment_map}
    picture = draw_targets(gray_image(), mapped, TABLE, scale=10)
    np.testing.assert_allclose(patch(picture, 20, 25) - filled(TABLE.colors[2]), 0, atol=3)
    assert picture[10:60, 10:60].std() > 2, "what has no target is void"
    # Without the segment map: only the box.
    boxes_only = draw_targets(gray_image(), {"instances": instances}, TABLE, scale=10)
    assert (patch(boxes_only, 20, 25) == GRAY).all()
    np.testing.assert_allclose(boxes_only[200, 320], TABLE.colors[2], atol=3)


def boxes_of(labels: list[Label]) -> list[tuple[float, float, float, float]]:
    return [(label.x0, label.y0, label.x1, label.y1) for label in labels]


def test_labels_stay_inside_and_apart() -> None:
    size = (384, 384)
    masks = []
    for left in (0, 60, 330):  # the names of the first two would overlap above them
        mask = np.zeros(size, dtype=bool)
        mask[0:30, left : left + 50] = True
        masks.append(mask)
    ground = ~np.logical_or.reduce(masks)
    named = [Named(Region(0, mask), "a long name", (1, 2, 3), True) for mask in masks]
    named.append(Named(Region(1, ground), "ground", (1, 2, 3), False))
    labels = place_labels(named, size)
    assert [label.text for label in labels] == ["a long name"] * 3 + ["ground"]
    assert labels[0].pixels >= 12
    boxes = boxes_of(labels)
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        assert 0 <= x0 < x1 <= 384, index
        assert 0 <= y0 < y1 <= 384, index
        for other in boxes[:index]:
            assert x1 <= other[0] or other[2] <= x0 or y1 <= other[1] or other[3] <= y0, index


def test_names_without_a_place_are_left_out() -> None:
    size = (200, 200)
    named = []
    for row in range(0, 200, 10):
        for column in range(0, 200, 10):
            mask = np.zeros(size, dtype=bool)
            mask[row : row + 10, column : column + 10] = True
            named.append(Named(Region(0, mask), "window", (1, 2, 3), True))
    boxes = boxes_of(place_labels(named, size))
    assert 20 < len(boxes) < len(named)
    for index, first in enumerate(boxes):
        area = (first[2] - first[0]) * (first[3] - first[1])
        for other in boxes[:index]:
            width = min(first[2], other[2]) - max(first[0], other[0])
            height = min(first[3], other[3]) - max(first[1], other[1])
            assert max(0, width) * max(0, height) <= 0.25 * area


@pytest.mark.parametrize(("short", "expected"), [(100, 7), (200, 14), (400, 14), (3000, 67)])
def test_names_grow_with_the_picture(short: int, expected: int) -> None:
    mask = np.ones((short, 2 * short), dtype=bool)
    (label,) = place_labels([Named(Region(0, mask), "x", (1, 2, 3), True)], mask.shape)
    assert label.pixels == expected


def test_things_and_stuff_show_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        drawing,
        "draw_labels",
        lambda picture, labels: drawn.extend(label.text for label in labels) or picture,
    )
    scored = segments(score=0.876)
    draw_result(gray_image(), {"panoptic_seg": (result()["panoptic_seg"][0], scored)}, TABLE)
    assert sorted(drawn) == ["box 88%", "box 88%", "ground 88%", "void"]


def test_the_smaller_of_two_masks_is_on_top() -> None:
    instances = Instances((40, 60))
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 10:30, 20:40] = True
    masks[1] = True
    instances.pred_boxes = Boxes(torch.tensor([[20.0, 10, 40, 30], [0, 0, 60, 40]]))
    instances.pred_classes, instances.scores = torch.tensor([2, 0]), torch.tensor([0.9, 0.8])
    instances.pred_masks = masks
    picture = draw_result(gray_image(), {"instances": instances}, TABLE, scale=10)
    np.testing.assert_allclose(patch(picture, 26, 36) - filled(TABLE.colors[2]), 0, atol=3)
    np.testing.assert_allclose(patch(picture, 36, 50) - filled(TABLE.colors[0]), 0, atol=3)
