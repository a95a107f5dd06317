"""Masks, boxes and segment maps at the size of the output image.

Shapes: K queries of one image, (h, w) the mask head's map, (H, W) the output image.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layers import cxcywh_to_xyxy

# Enlarged logits of one image that are kept, in bytes: 100 queries at 640 x 1000 pixels. More are
# computed in bands of rows, small enough for the cache of a processor.
_KEPT_BYTES, _BAND_BYTES = 2**28, 2**24


class ImageMasks:
    """Mask logits of some queries of one image, and the sizes needed to resize them.

    Merge rules resize at different points, so the caller chooses. Photographs are large: rules read
    the logits in `bands`, so that memory does not grow with queries times pixels.

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

    def bands(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the output, from the top, with their (K, rows, width) float32 logits.

        One band with all rows of `at_output_size`, as long as that takes at most 256 MiB. Otherwise
        the bands are computed anew at each call, and their logits differ from those of
        `at_output_size` by rounding (one unit in the last place).
        """
        if self._is_small(self.output_size):
            yield slice(0, self.output_size[0]), self.at_output_size()
            return
        height, width = self.output_size
        for rows in _bands(self.output_size, len(self)):
            taps = _Taps.of(rows, self.image_size[0], height)
            yield rows, taps.interpolate(self._image_rows(taps.source), width)

    def image_bands(self) -> Iterator[tuple[slice, Tensor]]:
        """The same as `bands` for the size of the network's input; see `at_image_size`."""
        if self._is_small(self.padded_size):
            yield slice(0, self.image_size[0]), self.at_image_size()
            return
        for rows in _bands(self.image_size, len(self)):
            yield rows, self._image_rows(rows)

    def _is_small(self, size: tuple[int, int]) -> bool:
        return 4 * len(self) * size[0] * size[1] <= _KEPT_BYTES

    def _image_rows(self, rows: slice) -> Tensor:
        """(K, rows, width) of `at_image_size`."""
        taps = _Taps.of(rows, self.logits.shape[1], self.padded_size[0])
        padded = taps.interpolate(self.logits[:, taps.source].float(), self.padded_size[1])
        return padded[..., : self.image_size[1]]


# Masks at the output size at a time while a semantic map is made from them.
_MASKS_AT_ONCE = 16


def semantic_map(masks: ImageMasks, probabilities: Tensor) -> Tensor:
    """Scores of the classes at each pixel (``semantic_inference`` of facebookresearch/Mask2Former).

    A score is the sum over the queries of class probability times mask probability. Only a few
    masks, or a band of them, exist at the output size at a time.

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
        for rows, logits in masks[part].bands():
            within = logits.sigmoid()
            with torch.autocast(within.device.type, enabled=False):
                scores[:, rows].flatten(1).addmm_(weights[:, part], within.flatten(1))
    return scores


def mask_scores(masks: ImageMasks) -> Tensor:
    """(K,) mean probability within each mask at the output size, 0 for an empty mask."""
    total = masks.logits.new_zeros(len(masks), dtype=torch.float32)
    count = total.long()
    for _, band in masks.bands():
        for start in range(0, len(masks), _MASKS_AT_ONCE):
            part = slice(start, start + _MASKS_AT_ONCE)
            logits = band[part].flatten(1)
            inside = logits > 0
            total[part] += (logits.sigmoid() * inside).sum(1)
            count[part] += inside.sum(1)
    return total / (count + 1e-6)


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


def _bands(size: tuple[int, int], count: int) -> Iterator[slice]:
    """Divide (height, width) into slices of rows, each for ``count`` maps of float32."""
    step = max(1, _BAND_BYTES // (4 * count * size[1]))
    return (slice(top, min(top + step, size[0])) for top in range(0, size[0], step))


class _Taps(NamedTuple):
    """The vertical half of a bilinear interpolation, for some rows of its result.

    It is that of ``F.interpolate``, which cannot start within an image.

    Attributes:
        source: the rows that are read.
        upper: (rows,) int64, the first of the two rows of each, counted from the first of
            ``source``.
        lower: (rows,) int64, the second one.
        weight: (rows, 1) float32, that of the second one.
    """

    source: slice
    upper: Tensor
    lower: Tensor
    weight: Tensor

    @classmethod
    def of(cls, rows: slice, height: int, new_height: int) -> "_Taps":
        """The taps of some rows when ``height`` rows become ``new_height``."""
        # A float32 scale and one rounding at the end, as in PyTorch's kernels.
        scale = (torch.tensor(height, dtype=torch.float32) / new_height).double()
        place = scale * (torch.arange(rows.start, rows.stop).double() + 0.5) - 0.5
        place = place.float().clamp(min=0)
        upper = place.long().clamp(max=height - 1)
        lower = (upper + 1).clamp(max=height - 1)
        first = int(upper[0])
        weight = (place - upper).clamp(max=1)[:, None]
        return cls(slice(first, int(lower[-1]) + 1), upper - first, lower - first, weight)

    def interpolate(self, values: Tensor, width: int) -> Tensor:
        """(K, source, w) float32 -> (K, rows, width)."""
        wide = _resize(values[:, None], (values.shape[1], width))[:, 0]
        if not self.weight.any():  # nothing between two rows, as for an unchanged height
            return wide[:, self.upper.to(values.device, non_blocking=True)]
        upper, lower, weight = (
            index.to(values.device, non_blocking=True)
            for index in (self.upper, self.lower, self.weight)
        )
        return wide[:, upper].mul_(1 - weight).addcmul_(wide[:, lower], weight)


def _resize(masks: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
