"""From one dataset dict to the tensors that the model takes."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from PIL import Image

from ..errors import UserError
from .augmentation import build_augmentations
from .targets import box_instances, number_segments, panoptic_instances, transform_numbers

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

        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        result["image"] = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if self.is_train:
            new_height, new_width = augmented.image.shape[:2]
            size = (result["height"], result["width"])
            result |= _targets(dataset_dict, size, (new_height, new_width), transforms)
        return result


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
        reason = " ".join(str(error).split())
        raise UserError(f"{role} {path} cannot be read: {reason}") from error
    return image
