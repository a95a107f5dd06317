"""The error map: every kind of difference between annotation and prediction."""

import numpy as np
import pytest
import torch
from panopticapi.utils import id2rgb
from PIL import Image

from batchformer_panoptic.data import ClassTable
from batchformer_panoptic.visualization import ERROR_ENTRIES, draw_errors
from batchformer_panoptic.visualization.error_map import (
    CORRECT,
    INVENTED,
    MISSED,
    WRONG_CLASS,
    WRONG_OBJECT,
    error_kinds,
)
from batchformer_panoptic.visualization.scene import Region, Scene, Segment, SharedSegmentMap

BOX, DISC, GROUND, SKY = range(4)
TABLE = ClassTable(
    names=("box", "disc", "ground", "sky"),
    is_thing=(True, True, False, False),
    colors=((220, 20, 60), (0, 0, 142), (110, 200, 110), (70, 130, 180)),
    dataset_ids=(1, 2, 3, 4),
)


def scene(columns: list[int], classes: dict[int, int], crowds: tuple[int, ...] = ()) -> Scene:
    """Segments as vertical stripes of a 4 pixels high image; 0 is void."""
    shared = SharedSegmentMap(np.tile(np.array(columns, dtype=np.int32), (4, 1)))
    return Scene(
        [Region(c, Segment(shared, k), crowd=k in crowds) for k, c in classes.items()], True
    )


@pytest.mark.parametrize(
    ("true_class", "pred_class", "expected"),
    [
        (BOX, GROUND, MISSED),
        (BOX, None, MISSED),
        (GROUND, None, MISSED),
        (GROUND, BOX, INVENTED),
        (BOX, DISC, WRONG_CLASS),
        (GROUND, SKY, WRONG_CLASS),
        (BOX, BOX, CORRECT),
        (GROUND, GROUND, CORRECT),
        (None, BOX, CORRECT),
        (None, None, CORRECT),
    ],
)
def test_kinds_of_one_segment(
    true_class: int | None, pred_class: int | None, expected: int
) -> None:
    truth, prediction = (
        scene([0 if c is None else 5] * 6, {} if c is None else {5: c})
        for c in (true_class, pred_class)
    )
    assert (error_kinds(truth, prediction, TABLE, (4, 6)) == expected).all()


def test_one_prediction_on_two_objects_matches_the_larger() -> None:
    truth = scene([1, 1, 1, 1, 2, 2], {1: BOX, 2: BOX})
    merged = scene([7] * 6, {7: BOX})
    kinds = error_kinds(truth, merged, TABLE, (4, 6))
    assert kinds[0].tolist() == [CORRECT] * 4 + [WRONG_OBJECT] * 2


def test_half_an_object_does_not_match() -> None:
    truth, half = (
        scene([1] * 4 + [2] * 2, {1: BOX, 2: GROUND}),
        scene([5, 5, 6, 6, 6, 6], {5: BOX, 6: GROUND}),
    )
    kinds = error_kinds(truth, half, TABLE, (4, 6))
    assert kinds[0].tolist() == [WRONG_OBJECT] * 2 + [MISSED] * 2 + [CORRECT] * 2
    # Pixels of the prediction on void do not count in the union: 3 of 4 match.
    truth, wide = scene([1, 1, 1, 1, 0, 0], {1: BOX}), scene([0, 5, 5, 5, 5, 5], {5: BOX})
    assert error_kinds(truth, wide, TABLE, (4, 6))[0].tolist() == [MISSED] + [CORRECT] * 5


def test_crowds_are_never_wrong() -> None:
    truth = scene([1] * 6, {1: BOX}, crowds=(1,))
    prediction = scene([0, 0, 3, 3, 4, 4], {3: DISC, 4: GROUND})
    assert (error_kinds(truth, prediction, TABLE, (4, 6)) == CORRECT).all()


def test_errors_are_colored(tmp_path) -> None:
    ids = np.tile(np.array([1, 1, 2, 2]), (4, 1))
    Image.fromarray(id2rgb(ids)).save(tmp_path / "ids.png")
    annotation = {
        "pan_seg_file_name": str(tmp_path / "ids.png"),
        "segments_info": [{"id": 1, "category_id": BOX}, {"id": 2, "category_id": GROUND}],
    }
    result = {"panoptic_seg": (torch.full((4, 4), 9), [{"id": 9, "category_id": GROUND}])}
    image = np.full((4, 4, 3), 100, dtype=np.uint8)
    picture = draw_errors(image, annotation, result, TABLE)
    assert picture.shape == (384, 384, 3)
    expected = 0.3 * 100 + 0.7 * np.array(ERROR_ENTRIES[MISSED - 1][1])
    np.testing.assert_allclose(picture[200, 50], expected, atol=2)
    assert (picture[200, 350] == 100).all()
