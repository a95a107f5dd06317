"""Training targets: segments of a panoptic PNG, or annotated boxes, as Detectron2's Instances.

H0, W0: size of the image on disk; H, W: size after the transforms; S: listed segments.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from scipy import ndimage

from ..errors import UserError

IntMap = npt.NDArray[np.integer[Any]]

# The segment map is int16.
_MAX_SEGMENTS = 2**15 - 1


def number_segments(png: npt.NDArray[np.uint8], segments_info: list[dict[str, Any]]) -> IntMap:
    """Replace the ids of a panoptic PNG by numbers: k + 1 for `segments_info[k]`.

    One search for all runs of equal pixels together: the cost grows with the outlines that there
    are to see, not with H0 W0 S.

    Args:
        png: (H0, W0, 3) uint8, id = red + 256 * green + 65536 * blue, 0 = void.
        segments_info: S dicts with id and iscrowd.

    Returns:
        (H0, W0) uint8, or uint16 if there are more than 255 segments; 0 where the pixel is void or
        belongs to a crowd.

    Raises:
        UserError: the PNG has an id that is not listed, or lacks one that is.
    """
    if len(segments_info) > _MAX_SEGMENTS:
        raise UserError(f"{len(segments_info)} segments; no more than {_MAX_SEGMENTS} are possible")
    # Void takes part as number 0 with id 0.
    ids = np.array([0] + [segment["id"] for segment in segments_info], dtype=np.int32)
    numbers = np.arange(len(ids)).astype(np.uint8 if len(ids) <= 256 else np.uint16)
    numbers[1:][[bool(segment.get("iscrowd", 0)) for segment in segments_info]] = 0
    order = np.argsort(ids)
    sorted_ids = ids[order]

    run_ids, lengths = _runs(_joined(png, np.int32))
    position = np.minimum(np.searchsorted(sorted_ids, run_ids), len(ids) - 1)
    unlisted = run_ids[sorted_ids[position] != run_ids]
    if unlisted.size:
        raise UserError(f"the PNG has segment id {unlisted[0]}, which the JSON does not list")
    counts = np.bincount(position, minlength=len(ids))
    absent = sorted_ids[(counts == 0) & (sorted_ids != 0)]
    if absent.size:
        raise UserError(f"the JSON lists segment id {absent[0]}, which the PNG does not have")
    result: IntMap = np.repeat(numbers[order][position], lengths).reshape(png.shape[:2])
    return result


def transform_numbers(numbers: IntMap, transforms: T.TransformList) -> IntMap:
    """Move a map of `number_segments` like its image, without interpolation.

    Images are resized by Pillow, which takes uint8 only; Detectron2 moves other types with a
    routine whose nearest pixel lies half a pixel elsewhere. So the map travels as uint8: in one
    channel where that is enough, else in two.

    Args:
        numbers: (H0, W0), 0 or more.
        transforms: what was done to the image.

    Returns:
        (H, W) of the same meaning.
    """
    if numbers.dtype == np.uint8:
        moved: IntMap = transforms.apply_segmentation(numbers)
    else:
        channels = np.stack(
            [numbers & 255, numbers >> 8], axis=-1, dtype=np.uint8, casting="unsafe"
        )
        moved = _joined(transforms.apply_segmentation(channels), numbers.dtype)
    return moved


def panoptic_instances(
    numbers: IntMap, segments_info: list[dict[str, Any]]
) -> tuple[Instances, torch.Tensor]:
    """Targets of the segments that are still visible, things and stuff alike.

    Args:
        numbers: (H, W), k + 1 for `segments_info[k]`, 0 where there is no segment.
        segments_info: S dicts with category_id (contiguous).

    Returns:
        - T instances in the order of `segments_info`: gt_classes int64 (T,) and gt_boxes float32
          (T, 4), xyxy in pixels, tight around the visible pixels with the right and bottom edge
          one past the last pixel.
        - The segment map, int16 (H, W): the instance of each pixel, or -1. It is no field of the
          instances, because Detectron2 wants every field to be as long as there are instances.
    """
    # One pass over the pixels finds all boxes; a segment without pixels has None.
    found = ndimage.find_objects(numbers, max_label=len(segments_info))
    visible = [position for position, slices in enumerate(found) if slices is not None]
    boxes = np.array(
        [
            (columns.start, rows.start, columns.stop, rows.stop)
            for rows, columns in filter(None, found)
        ],
        dtype=np.float32,
    ).reshape(-1, 4)
    index_of = np.full(len(segments_info) + 1, -1, dtype=np.int16)
    index_of[1:][visible] = np.arange(len(visible))

    instances = Instances(numbers.shape)
    instances.gt_classes = torch.tensor(
        [segments_info[position]["category_id"] for position in visible], dtype=torch.int64
    )
    instances.gt_boxes = Boxes(torch.from_numpy(boxes))
    return instances, torch.from_numpy(index_of[numbers])


def box_instances(
    annotations: list[dict[str, Any]], transforms: T.TransformList, image_size: tuple[int, int]
) -> Instances:
    """Targets from annotated boxes; crowds and boxes that a crop has removed are left out.

    Args:
        annotations: dicts with bbox, bbox_mode, category_id (contiguous) and perhaps iscrowd; not
            changed. Polygons, masks and keypoints are not looked at.
        transforms: what was done to the image.
        image_size: (H, W).

    Returns:
        T instances: gt_classes int64 (T,) and gt_boxes float32 (T, 4), xyxy in pixels.
    """
    moved = [
        detection_utils.transform_instance_annotations(
            {key: annotation[key] for key in ("bbox", "bbox_mode", "category_id")},
            transforms,
            image_size,
        )
        for annotation in annotations
        if not annotation.get("iscrowd", 0)
    ]
    instances = detection_utils.annotations_to_instances(moved, image_size)
    return detection_utils.filter_empty_instances(instances)


def _joined(channels: npt.NDArray[np.uint8], dtype: npt.DTypeLike) -> IntMap:
    """(H, W, C) bytes -> (H, W) numbers, the first channel being the least byte.

    For a panoptic PNG what panopticapi's `rgb2id` computes, in a fifth of its memory.
    """
    numbers: IntMap = channels[..., -1].astype(dtype)
    for index in reversed(range(channels.shape[-1] - 1)):
        np.left_shift(numbers, 8, out=numbers)
        np.bitwise_or(numbers, channels[..., index], out=numbers)
    return numbers


def _runs(values: IntMap) -> tuple[IntMap, IntMap]:
    """Value and length of each run of equal values, read row by row."""
    flat = values.ravel()
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([np.zeros(min(1, flat.size), dtype=starts.dtype), starts])
    return flat[starts], np.diff(starts, append=flat.size)
