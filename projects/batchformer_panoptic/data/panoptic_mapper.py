"""From one dataset dict to the tensors that the model takes.

The published augmentations, put together from Detectron2's.

Training targets: segments of a panoptic PNG, or annotated boxes, as Detectron2's Instances.

H0, W0: size of the image on disk; H, W: size after the transforms; S: listed segments.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from PIL import Image
from scipy import ndimage

from ..errors import UserError, one_line


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Augmentations of the INPUT section.

    Training: with INPUT.RESIZE_OR_CROP half of the images are first resized to one of its
    MIN_SIZES and cropped, both sides drawn from CROP_RANGE and no longer than the image. Then all
    images are resized as MIN_SIZE_TRAIN, MAX_SIZE_TRAIN and MIN_SIZE_TRAIN_SAMPLING say and
    flipped as RANDOM_FLIP says. These are the two branches of DETR's recipe, which both end in
    that resize; the flip, which DETR does first, commutes with the rest in distribution.
    Detectron2's INPUT.CROP is honoured too, before everything else.

    Evaluation: the resize of MIN_SIZE_TEST and MAX_SIZE_TEST; a MIN_SIZE_TEST of 0 keeps the size.

    Raises:
        UserError: a crop range or a flip that does not exist.
    """
    _check_flip(cfg.INPUT.RANDOM_FLIP)
    augmentations: list[T.Augmentation] = detection_utils.build_augmentation(cfg, is_train)
    if is_train and cfg.INPUT.RESIZE_OR_CROP.ENABLED:
        augmentations.insert(0, _resized_crop(cfg))
    if is_train and cfg.INPUT.CROP.ENABLED:
        augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    return augmentations


def _resized_crop(cfg: CfgNode) -> T.Augmentation:
    node = cfg.INPUT.RESIZE_OR_CROP
    if len(node.CROP_RANGE) != 2 or not 0 < node.CROP_RANGE[0] <= node.CROP_RANGE[1]:
        raise UserError(
            f"INPUT.RESIZE_OR_CROP.CROP_RANGE is {list(node.CROP_RANGE)}: "
            "give the smallest and the largest side of a crop in pixels, such as [384, 600]"
        )
    if not node.MIN_SIZES or min(node.MIN_SIZES) < 1:
        raise UserError(
            f"INPUT.RESIZE_OR_CROP.MIN_SIZES is {list(node.MIN_SIZES)}: "
            "give lengths of the short side in pixels, such as [400, 500, 600]"
        )
    resize = T.ResizeShortestEdge(list(node.MIN_SIZES), sample_style="choice")
    crop = T.RandomCrop("absolute_range", tuple(node.CROP_RANGE))
    return T.RandomApply(T.AugmentationList([resize, crop]), prob=0.5)


def _check_flip(flip: str) -> None:
    choices = ("horizontal", "vertical", "none")
    if flip not in choices:
        raise UserError(f"INPUT.RANDOM_FLIP is {flip!r}: choose one of {', '.join(choices)}")


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


ImageSize = tuple[int, int]  # height, width

IMAGE_FORMATS = ("RGB", "BGR")


class PanopticDatasetMapper:
    """Reads the image, augments it, and in training builds the targets.

    One mapper for panoptic data sets (dicts with segments_info and pan_seg_file_name) and for data
    sets of boxes (dicts with annotations).

    Calling it returns a dict with

    - image: uint8 (3, H, W), channels in the order of INPUT.FORMAT;
    - file_name, image_id, and the height and width of the image on disk;

    and in training also

    - instances: gt_classes int64 (T,), contiguous ids, and gt_boxes float32 (T, 4), xyxy in pixels
      of the augmented image. Things and stuff alike; crowds, and what a crop has removed, are not
      among them. T may be 0;
    - segment_map (panoptic data sets only): int16 (H, W), the instance of each pixel, or -1 where
      the pixel is void or belongs to a crowd.

    The dataset dict is left as it is. `UserError` names the file that cannot be read and every
    disagreement between image, PNG and JSON.
    """

    @configurable
    def __init__(
        self, *, is_train: bool, augmentations: list[T.Augmentation], image_format: str
    ) -> None:
        """Take the parts.

        Args:
            is_train: whether to build targets.
            augmentations: Detectron2 augmentations, applied in this order.
            image_format: "RGB" or "BGR".

        Raises:
            UserError: another image format.
        """
        check_image_format(image_format)
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Constructor arguments from the INPUT section."""
        return {
            "is_train": is_train,
            "augmentations": build_augmentations(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read and transform one image; the randomness is numpy's global generator."""
        file_name = dataset_dict["file_name"]
        image = read_image_file(file_name, self.image_format, "image")
        result = {key: dataset_dict[key] for key in ("file_name", "image_id")}
        for key, pixels in zip(("height", "width"), image.shape[:2], strict=True):
            if dataset_dict.get(key, pixels) != pixels:
                raise UserError(
                    f"image {file_name} has a {key} of {pixels}, but the JSON says "
                    f"{dataset_dict[key]}: correct the JSON or the image"
                )
            result[key] = pixels

        result["image"], transforms = self._augment(image)
        if self.is_train:
            new_height, new_width = result["image"].shape[1:]
            size = (result["height"], result["width"])
            result |= _targets(dataset_dict, size, (new_height, new_width), transforms)
        return result

    def map_image(self, image_bgr: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """Transform an image that is already in memory, without targets.

        Args:
            image_bgr: (H0, W0, 3) uint8.

        Returns:
            ``image``, ``height`` and ``width``, as for a file with the same pixels.
        """
        height, width = image_bgr.shape[:2]
        image = image_bgr[:, :, ::-1] if self.image_format == "RGB" else image_bgr
        tensor, _ = self._augment(np.ascontiguousarray(image))
        return {"image": tensor, "height": height, "width": width}

    def _augment(self, image: npt.NDArray[np.uint8]) -> tuple[torch.Tensor, T.TransformList]:
        """Return the augmented image, uint8 (3, H, W), and the transforms that were drawn."""
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        channels_first = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        return torch.from_numpy(channels_first), transforms


def _targets(
    dataset_dict: dict[str, Any],
    size: ImageSize,
    new_size: ImageSize,
    transforms: T.TransformList,
) -> dict[str, Any]:
    if "segments_info" in dataset_dict and "pan_seg_file_name" in dataset_dict:
        return _panoptic_targets(dataset_dict, size, transforms)
    if "annotations" in dataset_dict:
        return {"instances": box_instances(dataset_dict["annotations"], transforms, new_size)}
    raise UserError(
        f"image {dataset_dict['file_name']} has neither segments nor boxes: "
        "its data set cannot be trained on"
    )


def _panoptic_targets(
    dataset_dict: dict[str, Any], size: ImageSize, transforms: T.TransformList
) -> dict[str, Any]:
    png_name = dataset_dict["pan_seg_file_name"]
    segments_info = dataset_dict["segments_info"]
    png = read_image_file(png_name, "RGB", "panoptic PNG")
    if png.shape[:2] != size:
        raise UserError(
            f"panoptic PNG {png_name} is {png.shape[1]}x{png.shape[0]}, but image "
            f"{dataset_dict['file_name']} is {size[1]}x{size[0]}"
        )
    try:
        numbers = number_segments(png, segments_info)
    except UserError as error:
        raise UserError(
            f"image {dataset_dict['image_id']!r}, panoptic PNG {png_name}: {error}"
        ) from error
    numbers = transform_numbers(numbers, transforms)
    instances, segment_map = panoptic_instances(numbers, segments_info)
    return {"instances": instances, "segment_map": segment_map}


def check_image_format(image_format: str) -> None:
    """Raise UserError unless INPUT.FORMAT is one of ``IMAGE_FORMATS``."""
    if image_format not in IMAGE_FORMATS:
        raise UserError(
            f"INPUT.FORMAT is {image_format!r}: choose one of {', '.join(IMAGE_FORMATS)}"
        )


def read_image_file(path: str, image_format: str, role: str) -> npt.NDArray[np.uint8]:
    """The file as (H, W, 3) uint8, turned as its EXIF data says.

    Raises:
        UserError: naming the file, if it is missing or no image that Pillow can read.
    """
    try:
        image: npt.NDArray[np.uint8] = detection_utils.read_image(path, format=image_format)
    except FileNotFoundError as error:
        raise UserError(f"{role} {path} does not exist") from error
    # Pillow reports damaged files with all of these.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = one_line(error)
        raise UserError(f"{role} {path} cannot be read: {reason}") from error
    return image
