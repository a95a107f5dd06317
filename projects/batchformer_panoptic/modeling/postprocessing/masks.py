"""Masks, boxes and segment maps at the size of the output image.

Shapes: K queries of one image, (h, w) the mask head's map, (H, W) the output image.
"""

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layers import cxcywh_to_xyxy


class ImageMasks:
    """Mask logits of some queries of one image, and the sizes needed to resize them.

    Merge rules resize at different points, so the caller chooses.

    Attributes:
        logits: (K, h, w) from the mask head.
        padded_size: (height, width) to which the images of the batch were padded.
        image_size: (height, width) of the network's input before padding.
        output_size: (height, width) of the result.
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

    def __getitem__(self, index: Tensor | slice) -> "ImageMasks":
        """The masks of some queries: ``index`` is (K,) bool or int64 positions, or a slice."""
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
        """(K, *image_size) float32 logits at the size of the network's input, without padding.

        The maps cover the padded batch, so they are resized to its size and then cropped.
        """
        masks = _resize(self.logits.float()[:, None], self.padded_size)[:, 0]
        return masks[..., : self.image_size[0], : self.image_size[1]]

    def at_output_size(self) -> Tensor:
        """(K, *output_size) float32 logits; computed once, then shared with selections."""
        if self._at_output is None:
            self._at_output = _resize(self.at_image_size()[:, None], self.output_size)[:, 0]
        return self._at_output


# Masks at the output size at a time while a semantic map is made from them.
_MASKS_AT_ONCE = 16


def semantic_map(masks: ImageMasks, probabilities: Tensor) -> Tensor:
    """Scores of the classes at each pixel (``semantic_inference`` of facebookresearch/Mask2Former).

    A score is the sum over the queries of class probability times mask probability. Only a few
    masks exist at the output size at a time.

    Args:
        masks: the masks of Q queries.
        probabilities: (Q, C) class probabilities, without "no object".

    Returns:
        (C, *output_size) float32, not negative; may exceed 1.
    """
    weights = probabilities.float().T
    scores = weights.new_zeros(len(weights), *masks.output_size)
    for start in range(0, len(masks), _MASKS_AT_ONCE):
        part = slice(start, start + _MASKS_AT_ONCE)
        within = masks[part].at_output_size().sigmoid()
        with torch.autocast(within.device.type, enabled=False):
            scores.flatten(1).addmm_(weights[:, part], within.flatten(1))
    return scores


def mask_scores(masks: Tensor) -> Tensor:
    """(K, H, W) mask logits -> (K,) mean probability within each mask, 0 for an empty mask."""
    means = masks.new_zeros(len(masks))
    for start in range(0, len(masks), _MASKS_AT_ONCE):
        part = slice(start, start + _MASKS_AT_ONCE)
        logits = masks[part].flatten(1)
        inside = logits > 0
        means[part] = (logits.sigmoid() * inside).sum(1) / (inside.sum(1) + 1e-6)
    return means


def mask_boxes(masks: Tensor) -> Tensor:
    """(K, H, W) bool masks -> (K, 4) float32 tight boxes xyxy in pixels; zeros for empty masks.

    Detectron2's ``BitMasks.get_bounding_boxes`` returns its boxes on the CPU, and waits for the
    device twice for each mask.
    """
    edges = []
    for occupied in (masks.any(1), masks.any(2)):  # columns, rows
        occupied = occupied.int()
        first, last = occupied.argmax(1), occupied.flip(1).argmax(1)
        edges.append(torch.stack([first, occupied.shape[1] - last], dim=1))
    boxes = torch.stack(edges, dim=2).flatten(1)  # x0, y0, x1, y1
    return boxes.float() * masks.flatten(1).any(1)[:, None]


def boxes_to_pixels(boxes_cxcywh: Tensor, output_size: tuple[int, int]) -> Tensor:
    """(..., 4) cxcywh in 0 to 1 -> (..., 4) xyxy in pixels of (height, width), clipped."""
    height, width = output_size
    scale = torch.tensor([width, height, width, height], dtype=boxes_cxcywh.dtype)
    scale = scale.to(boxes_cxcywh.device, non_blocking=True)
    return cxcywh_to_xyxy(boxes_cxcywh).clamp(0, 1) * scale


def resize_map(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a segment map by the nearest neighbour, exactly as Pillow does.

    The published panoptic code resizes its segment maps with Pillow. PyTorch's "nearest-exact"
    follows the same rule but rounds differently where a sampling point falls between two pixels.

    Args:
        values: (H, W) of any type.
        size: (height, width) of the result.
    """
    rows = _nearest(values.shape[0], size[0]).to(values.device, non_blocking=True)
    columns = _nearest(values.shape[1], size[1]).to(values.device, non_blocking=True)
    return values[rows[:, None], columns]


def _nearest(length: int, new_length: int) -> Tensor:
    """(new_length,) int64 source positions along one axis."""
    if length == new_length:
        return torch.arange(length)
    # Pillow accumulates the step along the axis, rounding errors included.
    step = length / new_length
    points = accumulate([step] * (new_length - 1), initial=0.5 * step)
    return torch.tensor([min(int(point), length - 1) for point in points])


def _resize(masks: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
