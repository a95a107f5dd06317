"""Targets of set prediction: classes and, where the model predicts them, boxes and masks.

Shapes: B' = streams * B batch entries, T objects of one image, K chosen objects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...layers import xyxy_to_cxcywh

# Pixels of the masks that are made, or whose losses are computed, together. On a CPU, tensors of
# this size stay in the cache; a GPU needs more work per kernel launch.
PIXELS_AT_ONCE = {"cpu": 1 << 20}
_PIXELS_AT_ONCE_ELSEWHERE = 1 << 24
# Full-size maps that are copied at a time, whatever their size, while masks are made from them.
_MASKS_AT_ONCE = 16

PointLookup = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(K,) int64 positions, (K,) int64 objects and (K, P, 2) points (x, y) in pixels -> (K, P)."""

MaskLookup = Callable[[Tensor, Tensor], Tensor]
"""(K,) int64 positions of an image's masks and (K,) int64 objects -> (K, H, W) bool."""


class ObjectMasks(Protocol):
    """The masks of the objects of one image, in pixels of the image before padding."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""

    @staticmethod
    def lookup(masks: Sequence[Any], size: tuple[int, int]) -> MaskLookup:
        """Prepare the masks of several images of one kind, padded to ``size`` with False."""

    @staticmethod
    def point_lookup(masks: Sequence[Any], size: tuple[int, int]) -> PointLookup:
        """Prepare the same masks for bilinear sampling at points."""


@dataclass(frozen=True)
class SegmentMap:
    """Masks that do not overlap, stored as one map regardless of their number.

    Attributes:
        segment_map: (H, W) int of a signed type: k at the pixels of object k, negative elsewhere.
    """

    segment_map: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        height, width = self.segment_map.shape
        return height, width

    @staticmethod
    def lookup(masks: Sequence["SegmentMap"], size: tuple[int, int]) -> MaskLookup:
        """See :class:`ObjectMasks`."""
        maps = pad_and_stack([m.segment_map for m in masks], size, value=-1)
        return lambda position, index: _compare(maps, position, index)

    @staticmethod
    def point_lookup(masks: Sequence["SegmentMap"], size: tuple[int, int]) -> PointLookup:
        """See :class:`ObjectMasks`; memory grows with the points and not with the pixels."""
        maps = pad_and_stack([m.segment_map for m in masks], size, value=-1)
        return lambda position, index, points: _sample(maps, position, index, points)


@dataclass(frozen=True)
class ImageTarget:
    """The objects of one image.

    Attributes:
        labels: (T,) int64, contiguous class ids.
        boxes_cxcywh: (T, 4) float32, normalised by the image's size before padding, or None for
            models without boxes.
        masks: the objects' masks, or None for models without masks.
    """

    labels: Tensor
    boxes_cxcywh: Tensor | None = None
    masks: ObjectMasks | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]


def to_targets(
    batched_inputs: Sequence[dict[str, Any]],
    device: torch.device,
    *,
    padded_size: tuple[int, int] | None = None,
    with_boxes: bool = True,
    with_masks: bool,
) -> list[ImageTarget]:
    """Read the targets of images from input dicts in Detectron2's format.

    All labels, boxes and maps are put together on the host, and cross to the device in one copy of
    each.

    Args:
        batched_inputs: ``instances`` with ``gt_classes``; with ``gt_boxes`` for boxes; and
            ``segment_map`` (H, W) for masks.
        device: where the targets are moved to.
        padded_size: (height, width) that maps are padded to; by default the largest of the batch.
        with_boxes: whether boxes are read.
        with_masks: whether masks are read.

    Returns:
        One target for each image: views of the tensors of the batch.
    """
    instances = [inputs["instances"] for inputs in batched_inputs]
    counts = [len(of_image) for of_image in instances]
    labels = torch.cat([of_image.gt_classes for of_image in instances])
    targets = [ImageTarget(x) for x in labels.to(device, non_blocking=True).split(counts)]
    if with_boxes:
        sizes = np.array([of_image.image_size[::-1] * 2 for of_image in instances], np.float32)
        boxes = torch.cat([of_image.gt_boxes.tensor for of_image in instances])
        scale = torch.from_numpy(sizes.repeat(counts, 0)).to(boxes.device)
        boxes = xyxy_to_cxcywh(boxes / scale).to(device, non_blocking=True)
        targets = [
            replace(target, boxes_cxcywh=x)
            for target, x in zip(targets, boxes.split(counts), strict=True)
        ]
    if with_masks:
        maps = [inputs["segment_map"] for inputs in batched_inputs]
        stacked = to_device(pad_and_stack(maps, padded_size, value=-1), device)
        targets = [
            replace(target, masks=SegmentMap(x)) for target, x in zip(targets, stacked, strict=True)
        ]
    return targets


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a large tensor to a device; to a GPU from pinned memory, so that nothing waits."""
    if device.type == "cuda" and not host.is_cuda:
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class TargetBatch:
    """The targets of all B' entries of a batch, in the forms that costs and losses read.

    Args:
        targets: one target per entry.
        padded_size: (height, width) of the padded images, which masks cover as well; by default
            the largest of the batch.

    Attributes:
        counts: objects of each entry.
    """

    def __init__(
        self, targets: Sequence[ImageTarget], padded_size: tuple[int, int] | None = None
    ) -> None:
        self.targets = tuple(targets)
        self._padded_size = padded_size
        self.counts = [len(target) for target in self.targets]

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def labels(self) -> Tensor:
        """(sum of counts,) int64: the classes of all objects, entry after entry."""
        return torch.cat([target.labels for target in self.targets])

    @cached_property
    def boxes_cxcywh(self) -> Tensor:
        """(sum of counts, 4) float32: the boxes of all objects, entry after entry."""
        return torch.cat(self._boxes())

    @cached_property
    def padded_labels(self) -> Tensor:
        """(B', largest count) int64, meaningless past an entry's own objects."""
        return self.labels[self._padded_index]

    @cached_property
    def padded_boxes_cxcywh(self) -> Tensor:
        """(B', largest count, 4) float32, meaningless past an entry's own objects."""
        return self.boxes_cxcywh[self._padded_index]

    @cached_property
    def _padded_index(self) -> Tensor:
        """(B', largest count) int64 positions in all objects, those of others past the own ones."""
        ends = np.cumsum(self.counts)
        index = (ends - self.counts)[:, None] + np.arange(max(self.counts, default=0))
        host = torch.from_numpy(index.clip(max=max(sum(self.counts) - 1, 0)))
        return host.to(self.targets[0].labels.device, non_blocking=True)

    @cached_property
    def masks(self) -> "BatchMasks":
        """The masks of all objects."""
        return BatchMasks(self.targets, self._padded_size)

    def of_one_class(self) -> "TargetBatch":
        """The same objects with class 0, which is how proposals are supervised."""
        return TargetBatch([replace(t, labels=torch.zeros_like(t.labels)) for t in self.targets])

    def _boxes(self) -> list[Tensor]:
        boxes = [target.boxes_cxcywh for target in self.targets if target.boxes_cxcywh is not None]
        assert len(boxes) == len(self.targets), "a target has no boxes"
        return boxes


class BatchMasks:
    """The masks of a batch, made on demand from what is stored once per image.

    Entries of the batch may share their masks, as the entries of several streams do.

    Attributes:
        size: (height, width) to which masks are padded.

    Args:
        targets: the targets of all B' entries, each with masks, all of one kind.
        padded_size: sets ``size``; by default the largest height and width of the batch.
    """

    def __init__(
        self, targets: Sequence[ImageTarget], padded_size: tuple[int, int] | None = None
    ) -> None:
        masks = [target.masks for target in targets if target.masks is not None]
        assert len(masks) == len(targets), "a target has no masks"
        stored = list({id(m): m for m in masks}.values())
        assert len({type(m) for m in stored}) == 1, "the masks of a batch are of one kind"
        self.size = padded_size or _largest([m.size for m in stored])
        self._stored = stored
        position = {id(m): i for i, m in enumerate(stored)}
        self._position = torch.tensor([position[id(m)] for m in masks])
        self._position = self._position.to(targets[0].labels.device, non_blocking=True)

    def gather(self, image_index: Tensor, local_index: Tensor) -> Tensor:
        """(K, H, W) bool masks of chosen objects, padded with False.

        Args:
            image_index: (K,) int64, entries of the batch.
            local_index: (K,) int64, objects of these entries.
        """
        return self._lookup(self._position[image_index], local_index)

    def at_points(
        self,
        image_index: Tensor,
        local_index: Tensor,
        points: Tensor,
        padded_size: tuple[int, int],
    ) -> Tensor:
        """Bilinear samples of chosen masks, as of ``grid_sample`` with zeros outside.

        Args:
            image_index: (K,) int64, entries of the batch.
            local_index: (K,) int64, objects of these entries.
            points: (K, P, 2) as (x, y) in 0 to 1 over the padded batch.
            padded_size: (height, width) in pixels of the padded batch.

        Returns:
            (K, P) float32 in 0 to 1.
        """
        height, width = padded_size
        scale = points.new_tensor([width, height])
        return self._point_lookup(self._position[image_index], local_index, points * scale)

    @cached_property
    def _lookup(self) -> MaskLookup:
        return type(self._stored[0]).lookup(self._stored, self.size)

    @cached_property
    def _point_lookup(self) -> PointLookup:
        return type(self._stored[0]).point_lookup(self._stored, self.size)

    def gather_shares(
        self, image_index: Tensor, local_index: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """(K, h, w) float32 in 0 to 1: the share of each cell of a small map that a mask covers.

        Only a few masks exist at full size at a time.

        Args:
            image_index: (K,) int64, entries of the batch.
            local_index: (K,) int64, objects of these entries.
            size: (h, w) of the small map.
        """
        step = _masks_at_once(self.size, image_index.device)
        shares = [
            F.interpolate(self.gather(image, local)[:, None].float(), size=size, mode="area")
            for image, local in zip(image_index.split(step), local_index.split(step), strict=True)
        ]
        return torch.cat(shares)[:, 0]


def class_maps(
    targets: Sequence[ImageTarget], padded_size: tuple[int, int] | None = None
) -> Tensor:
    """The class of every pixel, padded to one size.

    Args:
        targets: with masks as a :class:`SegmentMap`.
        padded_size: (height, width) of the result; by default the largest of the batch.

    Returns:
        (B, H, W) int64 contiguous class ids, -1 at void and padding.
    """
    maps = []
    for target in targets:
        assert isinstance(target.masks, SegmentMap)
        maps.append(target.masks.segment_map)
    stacked = pad_and_stack(maps, padded_size, value=-1)
    # The classes of all objects, after that of pixels without one.
    classes = F.pad(torch.cat([target.labels for target in targets]), (1, 0), value=-1)
    firsts = torch.from_numpy(np.cumsum([1, *(len(target) for target in targets[:-1])]))
    firsts = firsts.to(classes.device, non_blocking=True)
    return classes[(stacked + firsts[:, None, None]).masked_fill_(stacked < 0, 0)]


def pixels_at_once(device: torch.device) -> int:
    """Pixels of masks to process together; see ``PIXELS_AT_ONCE``."""
    return PIXELS_AT_ONCE.get(device.type, _PIXELS_AT_ONCE_ELSEWHERE)


def _masks_at_once(size: tuple[int, int], device: torch.device) -> int:
    return max(_MASKS_AT_ONCE, pixels_at_once(device) // (size[0] * size[1]))


def _largest(sizes: Sequence[Sequence[int]]) -> tuple[int, int]:
    return max(size[0] for size in sizes), max(size[1] for size in sizes)


def _compare(maps: Tensor, map_index: Tensor, local_index: Tensor) -> Tensor:
    """(M, H, W) maps and K pairs of indices -> (K, H, W) bool, with little memory besides."""
    # Compared in the type of the maps: with two integer types PyTorch would first copy the
    # smaller one to int64 as a whole.
    wanted = local_index.to(maps.dtype)[:, None, None]
    masks = torch.empty((len(map_index), *maps.shape[-2:]), dtype=torch.bool, device=maps.device)
    step = _masks_at_once((maps.shape[-2], maps.shape[-1]), maps.device)
    parts = (x.split(step) for x in (map_index, wanted, masks))
    for images, numbers, out in zip(*parts, strict=True):
        torch.eq(maps[images], numbers, out=out)
    return masks


def _sample(maps: Tensor, map_index: Tensor, local_index: Tensor, points: Tensor) -> Tensor:
    """(M, H, W) maps, K pairs of indices, (K, P, 2) points in pixels -> (K, P) float32.

    The four pixels around a point are compared with the object's number, and weighted bilinearly.
    """
    height, width = maps.shape[-2:]
    corner = (points - 0.5).floor()
    fraction = points - 0.5 - corner
    columns, rows = corner.long().unbind(-1)
    flat, wanted = maps.flatten(), local_index.to(maps.dtype)[:, None]
    first = (map_index * (height * width))[:, None]
    value = torch.zeros(points.shape[:2], device=points.device)
    for down in (0, 1):
        for right in (0, 1):
            row, column = rows + down, columns + right
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            cell = first + row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            weight_x = fraction[..., 0] if right else 1 - fraction[..., 0]
            weight_y = fraction[..., 1] if down else 1 - fraction[..., 1]
            value = value + ((flat[cell] == wanted) & inside) * (weight_x * weight_y)
    return value


def pad_and_stack(
    maps: Sequence[Tensor], size: tuple[int, int] | None = None, value: int = 0
) -> Tensor:
    """Tensors (..., H_i, W_i) -> (B, ..., H, W), padded with a value to one size.

    Args:
        maps: at least one, of one type.
        size: (H, W); by default the largest height and width.
        value: of the padding, to the right and below.
    """
    height, width = size or _largest([x.shape[-2:] for x in maps])
    if all(x.shape[-2:] == (height, width) for x in maps):
        return maps[0][None] if len(maps) == 1 else torch.stack(list(maps))
    shape = (len(maps), *maps[0].shape[:-2], height, width)
    stacked = maps[0].new_full(shape, value)
    for place, x in zip(stacked, maps, strict=True):
        place[..., : x.shape[-2], : x.shape[-1]] = x
    return stacked
