"""Boxes, masks and maps of segments at the size that is wanted: pure functions of tensors.

Shapes: K queries of one image, (h, w) the mask head's map, (H, W) the output image.
"""

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layers import cxcywh_to_xyxy


class ImageMasks:
    """Mask logits of some queries of one image, and the sizes that lead to the output.

    Merges differ in where they resize, so they get this and ask for what they need.

    Attributes:
        logits: (K, h, w) as the mask head returned them.
        padded_size: (height, width) that the images of the batch were padded to.
        image_size: (height, width) of the image as the network saw it, before padding.
        output_size: (height, width) wanted.
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        padded_size: tuple[int, int],
        image_size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> None:
        self.logits = logits
        self.padded_size = padded_size
        self.image_size = image_size
        self.output_size = output_size
        self._at_output: Tensor | None = None

    def __len__(self) -> int:
        """Number of queries K."""
        return len(self.logits)

    def __getitem__(self, index: Tensor) -> "ImageMasks":
        """The masks of some queries: ``index`` is (K,) bool or int64 positions."""
        chosen = ImageMasks(
            self.logits[index],
            padded_size=self.padded_size,
            image_size=self.image_size,
            output_size=self.output_size,
        )
        if self._at_output is not None:
            chosen._at_output = self._at_output[index]
        return chosen

    def at_image_size(self) -> Tensor:
        """(K, *image_size) float32 logits: what the network saw, without the batch padding.

        The map covers the padded batch, so it is brought to that size first and then cropped.
        """
        masks = _resize(self.logits.float()[:, None], self.padded_size)[:, 0]
        return masks[..., : self.image_size[0], : self.image_size[1]]

    def at_output_size(self) -> Tensor:
        """(K, *output_size) float32 logits; computed once, then shared with selections."""
        if self._at_output is None:
            self._at_output = _resize(self.at_image_size()[:, None], self.output_size)[:, 0]
        return self._at_output


def boxes_to_pixels(boxes_cxcywh: Tensor, output_size: tuple[int, int]) -> Tensor:
    """(..., 4) cxcywh in 0 to 1 -> (..., 4) xyxy in pixels of (height, width), clipped."""
    height, width = output_size
    scale = torch.tensor([width, height, width, height], dtype=boxes_cxcywh.dtype)
    scale = scale.to(boxes_cxcywh.device, non_blocking=True)
    return cxcywh_to_xyxy(boxes_cxcywh).clamp(0, 1) * scale


def resize_map(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map of numbers by the nearest neighbour, to the pixel as Pillow does.

    Published panoptic code resizes its maps of ids with Pillow. PyTorch's "nearest-exact" means the
    same but rounds otherwise where a sampling point falls between two pixels.

    Args:
        values: (H, W) of any type.
        size: (height, width) wanted.
    """
    rows = _nearest(values.shape[0], size[0]).to(values.device, non_blocking=True)
    columns = _nearest(values.shape[1], size[1]).to(values.device, non_blocking=True)
    return values[rows[:, None], columns]


def _nearest(length: int, new_length: int) -> Tensor:
    """(new_length,) int64 positions to read from, for one axis."""
    if length == new_length:
        return torch.arange(length)
    # Pillow walks along the axis in steps of this length, and its rounding errors add up.
    step = length / new_length
    points = accumulate([step] * (new_length - 1), initial=0.5 * step)
    return torch.tensor([min(int(point), length - 1) for point in points])


def _resize(masks: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
