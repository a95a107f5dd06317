"""Where a panoptic prediction differs from the annotation.

H, W: size of the image.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.class_table import ClassTable, Color
from ..data.images import ImageArray
from .drawing import automatic_scale, enlarge, muted, owners
from .scene import Scene, nearest, scene_of_annotation, scene_of_result

CORRECT, MISSED, INVENTED, WRONG_CLASS, WRONG_OBJECT = range(5)
# Name and color of the kinds from MISSED on.
ERROR_ENTRIES: tuple[tuple[str, Color], ...] = (
    ("missed", (0, 114, 178)),
    ("invented", (230, 60, 20)),
    ("wrong class", (240, 200, 0)),
    ("right class, wrong object", (170, 60, 200)),
)
_OPACITY = 0.7
_MATCH_IOU = 0.5  # as in panoptic quality


def error_kinds(
    truth: Scene, prediction: Scene, table: ClassTable, size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """Classify each pixel by the annotated and the predicted segment there.

    * MISSED: an annotated thing is predicted as stuff or void, or annotated stuff as void.
    * INVENTED: annotated stuff is predicted as a thing.
    * WRONG_CLASS: both are things, or both are stuff, of different classes.
    * WRONG_OBJECT: both are things of one class, but these two do not match (IoU at most 0.5).
    * CORRECT: everything else. Annotated void and crowds count as correct, as in panoptic quality.

    Args:
        truth: panoptic.
        prediction: panoptic.
        table: the classes of both.
        size: (H, W) of both.

    Returns:
        (H, W) uint8.
    """
    num_true, num_pred = len(truth.regions) + 1, len(prediction.regions) + 1
    true_index = owners(truth.regions, size) + 1  # 0: void
    pairs = true_index * num_pred + owners(prediction.regions, size) + 1
    shared = np.bincount(pairs.ravel(), minlength=num_true * num_pred).reshape(num_true, num_pred)
    # As in panoptic quality, pixels of a prediction on void do not count.
    union = shared.sum(axis=1)[:, None] + shared[1:].sum(axis=0) - shared
    matched = shared > _MATCH_IOU * union
    kinds = np.full((num_true, num_pred), CORRECT, dtype=np.uint8)
    for row, annotated in enumerate(truth.regions, 1):
        if annotated.crowd:
            continue
        kinds[row, 0] = MISSED
        for column, predicted in enumerate(prediction.regions, 1):
            kinds[row, column] = _kind(
                annotated.class_id, predicted.class_id, table, bool(matched[row, column])
            )
    return kinds.ravel()[pairs]


def _kind(true_class: int, pred_class: int, table: ClassTable, matched: bool) -> int:
    is_thing = table.is_thing[true_class], table.is_thing[pred_class]
    if is_thing == (True, False):
        return MISSED
    if is_thing == (False, True):
        return INVENTED
    if true_class != pred_class:
        return WRONG_CLASS
    return CORRECT if matched or not is_thing[0] else WRONG_OBJECT


def draw_errors(
    image_rgb: ImageArray, dataset_dict: dict[str, Any], result: dict[str, Any], table: ClassTable
) -> ImageArray:
    """Color the pixels where a prediction differs from the annotation; see `error_kinds`.

    Args:
        image_rgb: (H, W, 3) uint8.
        dataset_dict: a panoptic annotation.
        result: of the model, with ``panoptic_seg``.
        table: the classes of both.

    Returns:
        uint8 RGB, in the size of `draw_result`.
    """
    height, width = image_rgb.shape[:2]
    scenes = scene_of_annotation(dataset_dict), scene_of_result(result)
    factor = automatic_scale(image_rgb)
    size = round(factor * height), round(factor * width)
    picture = muted(enlarge(image_rgb, size))
    kinds = nearest(error_kinds(*scenes, table, (height, width)), size)
    for kind, (_, color) in enumerate(ERROR_ENTRIES, MISSED):
        where = kinds == kind
        picture[where] = (1 - _OPACITY) * picture[where] + _OPACITY * np.array(color)
    return picture
