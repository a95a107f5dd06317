"""Maps a dataset dict to the tensors that the panoptic model takes, with Detectron2's transforms.

H0, W0: size of the image on disk; H, W: size after the transforms; S: listed segments; T: targets.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.projects.point_rend.color_augmentation import ColorAugSSDTransform
from detectron2.structures import Boxes, Instances

from ..errors import UserError
from .copy_paste import SegmentedImage, paste_things
from .images import MAX_PIXELS, ImageArray, read_image
from .segment_maps import IntArray, read_segment_map, runs, segment_extents
from .validation import (
    check_image_size,
    check_png_size,
    check_repeated_ids,
    check_segment_ids,
    raise_first_error,
)

ImageSize = tuple[int, int]  # height, width

IMAGE_FORMATS = ("RGB", "BGR")


class PanopticDatasetMapper:
    """Reads and augments an image and, in training, builds its targets.

    One mapper serves panoptic data sets (dicts with segments_info and pan_seg_file_name) and data
    sets of boxes (dicts with annotations).

    A call returns a dict with

    - image: uint8 (3, H, W), channels in the order of INPUT.FORMAT;
    - file_name, image_id, and the height and width of the image on disk;

    and in training also

    - instances: gt_classes int64 (T,), contiguous ids, and gt_boxes float32 (T, 4), xyxy in pixels
      of the augmented image. They are things and stuff alike, without crowds and without segments
      that a crop removed. T may be 0;
    - segment_map (panoptic data sets only): int16 (H, W), the instance of each pixel, or -1 where
      the pixel is void or belongs to a crowd.

    The dataset dict is not changed. `UserError` names the file that cannot be read, or that
    disagrees with the JSON.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: list[T.Augmentation],
        image_format: str,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Create the mapper.

        Args:
            is_train: whether to build targets.
            augmentations: Detectron2 augmentations, applied in this order.
            image_format: "RGB" or "BGR".
            max_pixels: see `read_image`.

        Raises:
            UserError: another image format.
        """
        check_image_format(image_format)
        self.is_train = is_train
        self.max_pixels = max_pixels
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return constructor arguments from the INPUT section."""
        return {
            "is_train": is_train,
            "augmentations": build_augmentations(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "max_pixels": cfg.INPUT.MAX_PIXELS,
        }

    def __call__(
        self, dataset_dict: dict[str, Any], source: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Read and transform one image; random numbers come from numpy's global generator.

        Args:
            dataset_dict: the image.
            source: in training, an image whose things are pasted into it (INPUT.COPY_PASTE).
        """
        image, (height, width), transforms = self._read(dataset_dict)
        result = {key: dataset_dict[key] for key in ("file_name", "image_id")}
        result |= {"height": height, "width": width}
        if self.is_train and _is_panoptic(dataset_dict):
            segmented = _segmented_image(dataset_dict, image, (height, width), transforms)
            if source is not None:
                segmented = paste_things(segmented, self._read_segmented(source))
            image = segmented.image
            result["instances"], result["segment_map"] = panoptic_instances(
                segmented.segment_map, segmented.segments_info
            )
        elif self.is_train:
            new_height, new_width = image.shape[:2]
            result["instances"] = _boxes_of(dataset_dict, transforms, (new_height, new_width))
        return {**result, "image": _to_tensor(image)}

    def map_image(self, image_bgr: ImageArray) -> dict[str, Any]:
        """Transform an image that is already in memory, without targets.

        Args:
            image_bgr: (H0, W0, 3) uint8.

        Returns:
            ``image``, ``height`` and ``width``, as for a file with the same pixels.
        """
        height, width = image_bgr.shape[:2]
        image = image_bgr[:, :, ::-1] if self.image_format == "RGB" else image_bgr
        augmented = T.AugInput(np.ascontiguousarray(image))
        self.augmentations(augmented)
        return {"image": _to_tensor(augmented.image), "height": height, "width": width}

    def _read(self, dataset_dict: dict[str, Any]) -> tuple[ImageArray, ImageSize, T.TransformList]:
        """Return an augmented image (H, W, 3), its size on disk and the transforms drawn."""
        file_name = dataset_dict["file_name"]
        image = read_image(file_name, self.image_format, max_pixels=self.max_pixels)
        height, width = image.shape[:2]
        stated = (dataset_dict.get("height", height), dataset_dict.get("width", width))
        raise_first_error(check_image_size(file_name, (height, width), stated))
        augmented = T.AugInput(image)
        try:
            transforms = self.augmentations(augmented)
        except UserError as error:
            raise UserError(f"image {file_name}: {error}") from error
        return augmented.image, (height, width), transforms

    def _read_segmented(self, dataset_dict: dict[str, Any]) -> SegmentedImage:
        image, size, transforms = self._read(dataset_dict)
        return _segmented_image(dataset_dict, image, size, transforms)


def _to_tensor(image: ImageArray) -> torch.Tensor:
    """Return an image (H, W, 3) as (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def check_image_format(image_format: str) -> None:
    """Raise UserError unless INPUT.FORMAT is one of ``IMAGE_FORMATS``."""
    if image_format not in IMAGE_FORMATS:
        raise UserError(
            f"INPUT.FORMAT is {image_format!r}: choose one of {', '.join(IMAGE_FORMATS)}"
        )


# ---------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------

# The segment map of the targets is int16.
_MAX_SEGMENTS = 2**15 - 1


def _is_panoptic(dataset_dict: dict[str, Any]) -> bool:
    return "segments_info" in dataset_dict and "pan_seg_file_name" in dataset_dict


def _boxes_of(
    dataset_dict: dict[str, Any], transforms: T.TransformList, new_size: ImageSize
) -> Instances:
    if "annotations" not in dataset_dict:
        raise UserError(
            f"image {dataset_dict['file_name']} has neither segments nor boxes: "
            "its data set cannot be trained on"
        )
    return box_instances(dataset_dict["annotations"], transforms, new_size)


def _segmented_image(
    dataset_dict: dict[str, Any], image: ImageArray, size: ImageSize, transforms: T.TransformList
) -> SegmentedImage:
    """Join an augmented image with its segments, which are read and transformed like it.

    Args:
        dataset_dict: of a panoptic data set.
        image: (H, W, 3), augmented.
        size: (H0, W0).
        transforms: those applied to the image.
    """
    png_name, segments_info = dataset_dict["pan_seg_file_name"], dataset_dict["segments_info"]
    ids = read_segment_map(png_name)
    height, width = ids.shape
    raise_first_error(check_png_size(png_name, (height, width), size))
    numbered = number_segments(ids, segments_info, png_name=png_name)
    return SegmentedImage(image, transform_segment_map(numbered, transforms), segments_info)


def number_segments(
    segment_map: IntArray, segments_info: Sequence[Mapping[str, Any]], *, png_name: str
) -> IntArray:
    """Replace segment ids by k + 1 for ``segments_info[k]``, and void and crowds by 0.

    The cost grows with the number of runs, not with H0 W0 S.

    Args:
        segment_map: (H0, W0) int32 ids as in the panoptic PNG.
        segments_info: S dicts with ``id``, all different, and ``iscrowd``.
        png_name: names the PNG in errors.

    Returns:
        (H0, W0) uint8, or uint16 for more than 255 segments.

    Raises:
        UserError: the map has an id that is not listed, or lacks one that is.
    """
    if len(segments_info) > _MAX_SEGMENTS:
        raise UserError(
            f"{png_name}: {len(segments_info)} segments; at most {_MAX_SEGMENTS} are possible"
        )
    # Void is listed first, so that it becomes number 0.
    ids = np.array([0] + [segment["id"] for segment in segments_info], dtype=np.int32)
    numbers = np.arange(len(ids)).astype(np.uint8 if len(ids) <= 256 else np.uint16)
    numbers[1:][[bool(segment.get("iscrowd", 0)) for segment in segments_info]] = 0
    order = np.argsort(ids)
    sorted_ids = ids[order]

    starts, lengths = runs(segment_map)
    run_ids = segment_map.ravel()[starts]
    position = np.minimum(np.searchsorted(sorted_ids, run_ids), len(ids) - 1)
    # Search all runs at once; the cause is determined only on failure.
    has_pixels = np.zeros(len(ids), dtype=bool)
    has_pixels[position] = True
    if (~has_pixels & (sorted_ids != 0)).any() or (sorted_ids[position] != run_ids).any():
        listed = ids[1:].tolist()
        raise_first_error(check_repeated_ids(listed, png_name))
        raise_first_error(check_segment_ids(segment_extents(segment_map), listed, png_name))
    result: IntArray = np.repeat(numbers[order][position], lengths).reshape(segment_map.shape)
    return result


def transform_segment_map(segment_map: IntArray, transforms: T.TransformList) -> IntArray:
    """Transform a segment map like its image, by nearest neighbor.

    Detectron2 resizes uint8 with Pillow, like images, but other types with a routine whose pixel
    grid is shifted by half a pixel. A uint16 map is therefore transformed as two uint8 channels.

    Args:
        segment_map: (H0, W0) uint8 or uint16.
        transforms: applied to the image.

    Returns:
        (H, W) of the same type.
    """
    if segment_map.dtype == np.uint8:
        moved: IntArray = transforms.apply_segmentation(segment_map)
        return moved
    channels = np.stack(
        [segment_map & 255, segment_map >> 8], axis=-1, dtype=np.uint8, casting="unsafe"
    )
    moved = transforms.apply_segmentation(channels).astype(segment_map.dtype)
    return moved[..., 0] | moved[..., 1] << 8


def panoptic_instances(
    segment_map: IntArray, segments_info: Sequence[Mapping[str, Any]]
) -> tuple[Instances, torch.Tensor]:
    """Build targets of the segments that are still visible, things and stuff alike.

    Args:
        segment_map: (H, W), k + 1 for `segments_info[k]`, 0 outside all segments.
        segments_info: S dicts with category_id (contiguous).

    Returns:
        - T instances in the order of `segments_info`: gt_classes int64 (T,) and gt_boxes float32
          (T, 4), xyxy in pixels, tight around the visible pixels with the right and bottom edge
          one past the last pixel.
        - The segment map of the targets, int16 (H, W): the instance of each pixel, or -1. It is
          not a field of the instances because Detectron2 requires one entry per instance in each.
    """
    extents = segment_extents(segment_map)  # in the order of the numbers
    visible = [number - 1 for number in extents]
    boxes = np.array([extent.bbox_xywh for extent in extents.values()], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    index_of = np.full(len(segments_info) + 1, -1, dtype=np.int16)
    index_of[1:][visible] = np.arange(len(visible))

    instances = Instances(segment_map.shape)
    instances.gt_classes = torch.tensor(
        [segments_info[position]["category_id"] for position in visible], dtype=torch.int64
    )
    instances.gt_boxes = Boxes(torch.from_numpy(boxes))
    return instances, torch.from_numpy(np.take(index_of, segment_map))


def box_instances(
    annotations: list[dict[str, Any]], transforms: T.TransformList, image_size: tuple[int, int]
) -> Instances:
    """Build targets from annotated boxes, without crowds and without boxes that a crop removed.

    Args:
        annotations: dicts with bbox, bbox_mode, category_id (contiguous) and optionally iscrowd;
            not changed. Polygons, masks and keypoints are ignored.
        transforms: applied to the image.
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


# ---------------------------------------------------------------------------
# Augmentations
# ---------------------------------------------------------------------------


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Build the augmentations of the INPUT section.

    Training: with INPUT.RESIZE_OR_CROP half of the images are first resized to one of its
    MIN_SIZES and cropped; each side of the crop is drawn from CROP_RANGE and clipped to the image.
    Then all images are resized (MIN_SIZE_TRAIN, MAX_SIZE_TRAIN, MIN_SIZE_TRAIN_SAMPLING) and
    flipped (RANDOM_FLIP). These are the two branches of DETR's recipe, which both end in that
    resize. DETR flips first, which gives the same distribution. INPUT.LARGE_SCALE_JITTER replaces
    resizing and cropping, after the flip, and INPUT.COLOR_JITTER comes first. Detectron2's
    INPUT.CROP is applied before everything else.

    Evaluation: the resize of MIN_SIZE_TEST and MAX_SIZE_TEST; a MIN_SIZE_TEST of 0 keeps the size.

    Raises:
        UserError: an unknown flip or an unusable crop range.
    """
    _check_flip(cfg.INPUT.RANDOM_FLIP)
    augmentations: list[T.Augmentation] = [
        BoundedResize(augmentation, cfg.INPUT.MAX_PIXELS)
        if isinstance(augmentation, T.ResizeShortestEdge)
        else augmentation
        for augmentation in detection_utils.build_augmentation(cfg, is_train)
    ]
    if is_train and cfg.INPUT.LARGE_SCALE_JITTER.ENABLED:
        # Flips come first, so that images are padded at the right and at the bottom, as in a batch.
        augmentations = [*_flips(augmentations), *_large_scale_jitter(cfg)]
    if is_train and cfg.INPUT.RESIZE_OR_CROP.ENABLED:
        augmentations.insert(0, _resized_crop(cfg))
    if is_train and cfg.INPUT.CROP.ENABLED:
        augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    if is_train and cfg.INPUT.COLOR_JITTER:
        augmentations.insert(0, ColorAugSSDTransform(img_format=cfg.INPUT.FORMAT))
    return augmentations


class BoundedResize(T.Augmentation):
    """A resize whose result has at least one pixel a side, and at most a number of pixels.

    The short side of a thin image would otherwise vanish, or its long side grow without limit.

    Args:
        resize: an augmentation that resizes.
        max_pixels: INPUT.MAX_PIXELS.
    """

    def __init__(self, resize: T.Augmentation, max_pixels: int) -> None:
        super().__init__()
        self.resize = resize
        self.max_pixels = max_pixels

    def get_transform(self, image: ImageArray) -> T.Transform:
        """The transform of one image (H, W, 3).

        Raises:
            UserError: the result would have too many pixels.
        """
        transform = self.resize.get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            height, width = max(1, transform.new_h), max(1, transform.new_w)
            if height * width > self.max_pixels:
                raise UserError(
                    f"{transform.w} x {transform.h} pixels would be resized to {width} x {height}, "
                    f"more than INPUT.MAX_PIXELS {self.max_pixels}: crop it"
                )
            return _Resize(transform.h, transform.w, height, width, transform.interp)
        return transform


class _Resize(T.ResizeTransform):
    """Detectron2's resize without the slow copy that Pillow makes of a crop."""

    def apply_image(self, img: ImageArray, interp: int | None = None) -> ImageArray:
        resized: ImageArray = super().apply_image(np.ascontiguousarray(img), interp)
        return resized


def _large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    node = cfg.INPUT.LARGE_SCALE_JITTER
    if cfg.INPUT.RESIZE_OR_CROP.ENABLED:
        raise UserError(
            "INPUT.LARGE_SCALE_JITTER and INPUT.RESIZE_OR_CROP are both enabled: choose one"
        )
    scales = list(node.SCALE_RANGE)
    if len(scales) != 2 or not 0 < scales[0] <= scales[1]:
        raise UserError(
            f"INPUT.LARGE_SCALE_JITTER.SCALE_RANGE is {scales}: give the smallest and the largest "
            "factor, such as [0.1, 2.0]"
        )
    if node.SIZE < 1:
        raise UserError(f"INPUT.LARGE_SCALE_JITTER.SIZE is {node.SIZE}; it counts pixels, from 1")
    return [
        BoundedResize(
            T.ResizeScale(scales[0], scales[1], node.SIZE, node.SIZE), cfg.INPUT.MAX_PIXELS
        ),
        # Void, which is 0 in the segment map, where the image does not cover the square.
        T.FixedSizeCrop((node.SIZE, node.SIZE), seg_pad_value=0),
    ]


def _flips(augmentations: list[T.Augmentation]) -> list[T.Augmentation]:
    return [
        augmentation for augmentation in augmentations if isinstance(augmentation, T.RandomFlip)
    ]


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
    resize = BoundedResize(
        T.ResizeShortestEdge(list(node.MIN_SIZES), sample_style="choice"), cfg.INPUT.MAX_PIXELS
    )
    crop = T.RandomCrop("absolute_range", tuple(node.CROP_RANGE))
    return T.RandomApply(T.AugmentationList([resize, crop]), prob=0.5)


def _check_flip(flip: str) -> None:
    choices = ("horizontal", "vertical", "none")
    if flip not in choices:
        raise UserError(f"INPUT.RANDOM_FLIP is {flip!r}: choose one of {', '.join(choices)}")
