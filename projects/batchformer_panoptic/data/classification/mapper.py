"""From one dataset dict of an image folder to what a classifier takes."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode, configurable
from PIL import Image
from torch import Tensor

from ..dataset_mapper import check_image_format, read_image_file
from .augmentation import PixelErasing, build_image_transform


class ClassificationMapper:
    """Reads the image and augments it.

    Calling it returns a dict with

    - image: (3, S, S) in 0 to 255, channels in the order of INPUT.FORMAT; uint8, or float32 in
      training with random erasing, whose noise is not cut to that range;
    - file_name, image_id, and label where the dataset dict has one.

    The dataset dict is left as it is. `UserError` names a file that cannot be read.
    """

    @configurable
    def __init__(
        self,
        *,
        transform: Callable[[Image.Image], Tensor],
        erasing: Callable[[Tensor], Tensor] | None = None,
        image_format: str = "RGB",
    ) -> None:
        """Take the parts.

        Args:
            transform: RGB picture -> uint8 (3, S, S) tensor, RGB.
            erasing: applied last, to channels in the order of the format.
            image_format: "RGB" or "BGR".

        Raises:
            UserError: another image format.
        """
        check_image_format(image_format)
        self.transform = transform
        self.erasing = erasing
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Constructor arguments from INPUT and the pixel statistics of MODEL."""
        probability = float(cfg.INPUT.CLASSIFICATION.RANDOM_ERASING)
        erasing = None
        if is_train and probability > 0:
            erasing = PixelErasing(probability, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
        return {
            "transform": build_image_transform(cfg, is_train),
            "erasing": erasing,
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read and transform one image; the randomness is that of random, numpy and torch."""
        picture = Image.fromarray(read_image_file(dataset_dict["file_name"], "RGB", "image"))
        image = self.transform(picture)
        if self.image_format == "BGR":
            image = image.flip(0)
        if self.erasing is not None:
            image = self.erasing(image)
        kept = ("file_name", "image_id", "label")
        return {"image": image} | {key: dataset_dict[key] for key in kept if key in dataset_dict}
