"""Maps a dataset dict of an image folder to the input of a classifier, with timm's transforms.

Images are Pillow images in RGB until the last step, then (3, S, S) tensors in 0 to 255.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from PIL import Image
from torch import Tensor
from torchvision import transforms

from ..errors import UserError
from .images import MAX_PIXELS, read_image
from .panoptic_mapper import check_image_format

TRAIN_CROPS = ("resized", "padded")
INTERPOLATIONS = ("bilinear", "bicubic", "random")


def build_image_transform(cfg: CfgNode, is_train: bool) -> Callable[[Image.Image], Tensor]:
    """Build timm's transform for training or evaluation, without its normalization.

    Training: a crop (``TRAIN_CROP`` "resized": a share ``SCALE`` of the image's area; "padded": the
    whole image, shifted by up to ``PADDING`` pixels), horizontal flip, and ``AUTO_AUGMENT`` or else
    ``COLOR_JITTER``. Evaluation: the short side is resized to the image size divided by
    ``CROP_PCT``, then the center is cropped.

    Args:
        cfg: INPUT.CLASSIFICATION, MODEL.CLASSIFIER.IMAGE_SIZE, INPUT.FORMAT and MODEL.PIXEL_MEAN.
        is_train: training or evaluation.

    Returns:
        A function from an RGB image of any size to uint8 (3, S, S), RGB.

    Raises:
        UserError: timm is not installed or does not support a value.
    """
    node = cfg.INPUT.CLASSIFICATION
    size = int(cfg.MODEL.CLASSIFIER.IMAGE_SIZE)
    _check(node, size)
    create_transform = _timm_data().create_transform
    if not is_train:
        # "random" is for training only.
        interpolation = "bicubic" if node.INTERPOLATION == "random" else node.INTERPOLATION
        evaluation: Callable[[Image.Image], Tensor] = create_transform(
            size, interpolation=interpolation, crop_pct=float(node.CROP_PCT), normalize=False
        )
        return evaluation
    try:
        crop_and_flip, colours, to_tensor = create_transform(
            size,
            is_training=True,
            scale=tuple(node.SCALE),
            ratio=tuple(node.RATIO),
            hflip=float(node.HFLIP),
            color_jitter=float(node.COLOR_JITTER) or None,
            auto_augment=node.AUTO_AUGMENT or None,
            interpolation=node.INTERPOLATION,
            # Fill color of shears and rotations, RGB in 0 to 1.
            mean=tuple(value / 255 for value in rgb_of(cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN)),
            normalize=False,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"timm does not support INPUT.CLASSIFICATION.AUTO_AUGMENT {node.AUTO_AUGMENT!r} "
            f"({type(error).__name__}: {error}): give '' for none or, for example, "
            "rand-m9-mstd0.5-inc1"
        ) from error
    if node.TRAIN_CROP == "padded":
        crop_and_flip = _padded_crop(size, int(node.PADDING), float(node.HFLIP))
    return transforms.Compose([crop_and_flip, colours, to_tensor])


class PixelErasing:
    """Timm's random erasing by noise, for images in 0 to 255.

    Timm erases after normalization, with Gaussian noise of standard deviation 1. Here the model
    normalizes the image, so the noise gets the mean and standard deviation of the data, which
    makes it the same after normalization. It is neither rounded nor clipped to 0 to 255.

    Args:
        probability: of erasing a rectangle of 2 % to a third of the image's area, 0 to 1.
        mean: the mean of each channel, in 0 to 255, in the order of the image's channels.
        std: standard deviation of each channel, likewise.
    """

    def __init__(self, probability: float, mean: Sequence[float], std: Sequence[float]) -> None:
        self._erase = _timm_data().random_erasing.RandomErasing(
            probability, mode="pixel", max_count=1, device="cpu"
        )
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        """Erase in a uint8 (C, H, W) image; always returns float32."""
        normalized: Tensor = self._erase((image - self._mean) / self._std)
        return normalized * self._std + self._mean


def rgb_of(image_format: str, values: Sequence[float]) -> list[float]:
    """Return statistics in the order of INPUT.FORMAT ("RGB" or "BGR") as red, green, blue."""
    return list(values)[::-1] if image_format == "BGR" else list(values)


def _padded_crop(size: int, padding: int, hflip: float) -> Callable[[Image.Image], Image.Image]:
    """Resize the whole image to (size, size), pad it in black by ``padding``, crop (size, size)."""
    steps: list[Any] = [
        transforms.Resize((size, size)),
        transforms.RandomCrop(size, padding=padding),
    ]
    if hflip > 0:
        steps.append(transforms.RandomHorizontalFlip(hflip))
    composed: Callable[[Image.Image], Image.Image] = transforms.Compose(steps)
    return composed


def _check(node: CfgNode, size: int) -> None:
    if size < 1:
        raise UserError(f"MODEL.CLASSIFIER.IMAGE_SIZE is {size}: give the side in pixels")
    for key, known in (("TRAIN_CROP", TRAIN_CROPS), ("INTERPOLATION", INTERPOLATIONS)):
        if node[key] not in known:
            raise UserError(
                f"INPUT.CLASSIFICATION.{key} is {node[key]!r}: choose one of {', '.join(known)}"
            )
    for key in ("HFLIP", "RANDOM_ERASING"):
        if not 0 <= node[key] <= 1:
            raise UserError(f"INPUT.CLASSIFICATION.{key} is {node[key]}: give 0 to 1")
    for key in ("SCALE", "RATIO"):
        if len(node[key]) != 2 or not 0 < node[key][0] <= node[key][1]:
            raise UserError(
                f"INPUT.CLASSIFICATION.{key} is {list(node[key])}: give the minimum and the maximum"
            )
    if not 0 < node.CROP_PCT <= 1:
        raise UserError(
            f"INPUT.CLASSIFICATION.CROP_PCT is {node.CROP_PCT}: give more than 0, at most 1"
        )
    if node.PADDING < 0 or node.COLOR_JITTER < 0:
        raise UserError(
            f"INPUT.CLASSIFICATION.PADDING is {node.PADDING} and COLOR_JITTER {node.COLOR_JITTER}: "
            "give 0 or more"
        )


def _timm_data() -> Any:
    """Return the module timm.data.

    Raises:
        UserError: timm, which is an extra, is not installed.
    """
    try:
        import timm.data.random_erasing  # an extra, which only image classification needs
    except ImportError:
        raise UserError(
            "image classification needs timm: pip install timm, or this project's extra [timm]"
        ) from None
    return timm.data


class ClassificationMapper:
    """Reads and augments an image.

    A call returns a dict with

    - image: (3, S, S) in 0 to 255, channels in the order of INPUT.FORMAT; uint8, or float32 in
      training with random erasing, whose noise is not clipped to that range;
    - file_name, image_id, and label if the dataset dict has one.

    The dataset dict is not changed. `UserError` names a file that cannot be read.
    """

    @configurable
    def __init__(
        self,
        *,
        transform: Callable[[Image.Image], Tensor],
        erasing: Callable[[Tensor], Tensor] | None = None,
        image_format: str = "RGB",
        max_pixels: int = MAX_PIXELS,
        short_side: int = 1,
    ) -> None:
        """Create the mapper.

        Args:
            transform: maps an RGB image to a uint8 (3, S, S) tensor, RGB.
            erasing: applied last, on channels in the order of the format.
            image_format: "RGB" or "BGR".
            max_pixels: see `read_image`; also of the image after its resizing.
            short_side: pixels to which the transform resizes the short side.

        Raises:
            UserError: another image format.
        """
        check_image_format(image_format)
        self.transform = transform
        self.erasing = erasing
        self.image_format = image_format
        self.max_pixels = max_pixels
        self.short_side = short_side

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return constructor arguments from INPUT and the pixel statistics of MODEL."""
        probability = float(cfg.INPUT.CLASSIFICATION.RANDOM_ERASING)
        erasing = None
        if is_train and probability > 0:
            erasing = PixelErasing(probability, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
        return {
            "transform": build_image_transform(cfg, is_train),
            "erasing": erasing,
            "image_format": cfg.INPUT.FORMAT,
            "max_pixels": cfg.INPUT.MAX_PIXELS,
            "short_side": int(cfg.MODEL.CLASSIFIER.IMAGE_SIZE / cfg.INPUT.CLASSIFICATION.CROP_PCT),
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read and transform one image; random numbers come from random, numpy and torch."""
        pixels = read_image(dataset_dict["file_name"], "RGB", max_pixels=self.max_pixels)
        self._check_shape(dataset_dict["file_name"], *pixels.shape[:2])
        picture = Image.fromarray(pixels)
        image = self.transform(picture)
        if self.image_format == "BGR":
            image = image.flip(0)
        if self.erasing is not None:
            image = self.erasing(image)
        kept = ("file_name", "image_id", "label")
        return {"image": image} | {key: dataset_dict[key] for key in kept if key in dataset_dict}

    def _check_shape(self, path: str, height: int, width: int) -> None:
        """Refuse a thin image whose long side would explode when the short one is resized."""
        side = max(1.0, self.short_side / min(height, width))
        if height * width * side**2 > self.max_pixels:
            raise UserError(
                f"image {path}: {width} x {height} pixels with the short side resized to "
                f"{self.short_side} are more than INPUT.MAX_PIXELS {self.max_pixels}: crop it"
            )
