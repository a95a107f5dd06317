"""What there is to draw on an image, wherever it comes from.

H, W: size of the image that is drawn on.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from detectron2.data import detection_utils
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import GenericMask
from panopticapi.utils import rgb2id
from PIL import Image

from ..errors import UserError

BoolMap = npt.NDArray[np.bool_]
Box = tuple[float, float, float, float]  # xyxy, pixels


class Region(NamedTuple):
    """One segment or object.

    Attributes:
        class_id: contiguous.
        mask: (H, W), or None.
        box: to be drawn, or None.
        score: 0 to 1, or None.
        crowd: many objects annotated as one.
    """

    class_id: int
    mask: BoolMap | None = None
    box: Box | None = None
    score: float | None = None
    crowd: bool = False


class Scene(NamedTuple):
    """All regions of one image.

    Attributes:
        regions: in no particular order.
        is_panoptic: every pixel is meant to be in a region; one that is not is void.
    """

    regions: list[Region]
    is_panoptic: bool


def scene_of_result(result: dict[str, Any]) -> Scene:
    """The model's output for one image: its panoptic map, or else its instances."""
    if "panoptic_seg" not in result:
        return Scene(_instance_regions(result["instances"].to("cpu")), False)
    panoptic_map, segments = result["panoptic_seg"]
    ids = panoptic_map.cpu().numpy()
    return Scene(
        [
            Region(segment["category_id"], ids == segment["id"], score=segment.get("score"))
            for segment in segments
        ],
        True,
    )


def scene_of_annotation(dataset_dict: dict[str, Any]) -> Scene:
    """A dataset dict as Detectron2 and `load_panoptic_json` give it.

    Raises:
        UserError: there is nothing to draw, or the panoptic PNG cannot be read.
    """
    if "pan_seg_file_name" in dataset_dict:
        ids = _read_ids(dataset_dict["pan_seg_file_name"])
        return Scene(
            [
                Region(
                    segment["category_id"],
                    ids == segment["id"],
                    crowd=bool(segment.get("iscrowd", 0)),
                )
                for segment in dataset_dict["segments_info"]
            ],
            True,
        )
    if "annotations" not in dataset_dict:
        raise UserError(f"image {dataset_dict['file_name']} has neither segments nor boxes to draw")
    size = dataset_dict["height"], dataset_dict["width"]
    return Scene([_annotated(item, size) for item in dataset_dict["annotations"]], False)


def scene_of_targets(mapped: dict[str, Any]) -> Scene:
    """What the training mapper returns: the boxes, and the masks where there is a segment map."""
    instances = mapped["instances"]
    segment_map = mapped.get("segment_map")
    numbers = None if segment_map is None else segment_map.numpy()
    regions = [
        Region(class_id, None if numbers is None else numbers == index, box)
        for index, (class_id, box) in enumerate(
            zip(instances.gt_classes.tolist(), _boxes(instances.gt_boxes), strict=True)
        )
    ]
    return Scene(regions, numbers is not None)


def _instance_regions(instances: Instances) -> list[Region]:
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
    rows = zip(
        instances.pred_classes.tolist(),
        _boxes(instances.pred_boxes),
        instances.scores.tolist(),
        strict=True,
    )
    return [
        Region(class_id, None if masks is None else masks[index], box, score)
        for index, (class_id, box, score) in enumerate(rows)
    ]


def _annotated(item: dict[str, Any], size: tuple[int, int]) -> Region:
    mask = None
    if item.get("segmentation"):
        mask = GenericMask(item["segmentation"], *size).mask.astype(bool)
    x0, y0, x1, y1 = BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS)
    crowd = bool(item.get("iscrowd", 0))
    return Region(item["category_id"], mask, (x0, y0, x1, y1), crowd=crowd)


def _boxes(boxes: Any) -> list[Box]:
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tensor.tolist()]


def _read_ids(path: str) -> npt.NDArray[np.integer[Any]]:
    try:
        ids: npt.NDArray[np.integer[Any]] = rgb2id(detection_utils.read_image(path, format="RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"panoptic PNG {path} cannot be read: {reason}") from error
    return ids
