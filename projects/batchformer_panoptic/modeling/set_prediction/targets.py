"""What the criterion is given for each image: classes, boxes and, for panoptic, masks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layers import xyxy_to_cxcywh

# Maps that are copied while their masks are made.
_MASKS_AT_ONCE = 16


@dataclass(frozen=True)
class SegmentMap:
    """Masks that do not overlap, as one map: lossless, and free of charge for 1000 segments.

    Attributes:
        index_map: (H, W) int of a signed type that can count the targets, k at the pixels of
            target k, negative elsewhere.
    """

    index_map: Tensor


@dataclass(frozen=True)
class DenseMasks:
    """Masks that may overlap.

    Attributes:
        masks: (T, H, W) bool.
    """

    masks: Tensor


@dataclass(frozen=True)
class ImageTarget:
    """The objects of one image.

    Attributes:
        labels: (T,) int64, contiguous class ids.
        boxes_cxcywh: (T, 4) float32, normalised by the image's size before padding.
        masks: the objects' masks in pixels of the image before padding, or None for boxes alone.
    """

    labels: Tensor
    boxes_cxcywh: Tensor
    masks: SegmentMap | DenseMasks | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]


def to_target(inputs: dict[str, Any], device: torch.device, with_masks: bool) -> ImageTarget:
    """What an input dict in Detectron2's format says of its image.

    Args:
        inputs: ``instances`` with ``gt_classes`` and ``gt_boxes``, and ``segment_map`` for masks.
        device: where the target is to be.
        with_masks: whether masks are wanted.
    """
    instances = inputs["instances"]
    height, width = instances.image_size
    boxes = instances.gt_boxes.tensor
    boxes = xyxy_to_cxcywh(boxes / boxes.new_tensor([width, height, width, height]))
    masks = None
    if with_masks:
        masks = SegmentMap(inputs["segment_map"].to(device, non_blocking=True))
    return ImageTarget(
        instances.gt_classes.to(device, non_blocking=True),
        boxes.to(device, non_blocking=True),
        masks,
    )


def of_one_class(targets: Sequence[ImageTarget]) -> list[ImageTarget]:
    """The same objects, all of class 0: what proposals are matched with."""
    return [replace(target, labels=torch.zeros_like(target.labels)) for target in targets]


class TargetMasks:
    """The masks of a batch, made a few at a time from what is stored once for each image.

    Entries of the batch may share their masks, as those of several streams do.

    Attributes:
        size: the largest height and width of the batch, which masks are padded to.

    Args:
        targets: of all B' entries of the batch, each with masks of the same kind.
    """

    def __init__(self, targets: Sequence[ImageTarget]) -> None:
        kept = list({id(t.masks): t.masks for t in targets}.values())
        self._maps: Tensor | None = None
        maps = [m.index_map for m in kept if isinstance(m, SegmentMap)]
        dense = [m.masks for m in kept if isinstance(m, DenseMasks)]
        assert len(kept) in (len(maps), len(dense)), "the masks of a batch are of one kind"
        stored = maps or dense
        self.size = (max(m.shape[-2] for m in stored), max(m.shape[-1] for m in stored))
        device = stored[0].device
        if maps:
            self._maps = torch.stack([_pad_to(m, *self.size, value=-1) for m in maps])
        else:
            self._dense = torch.cat([_pad_to(m, *self.size, value=0) for m in dense])
        counts = torch.tensor([len(m) for m in dense] or [0])
        position = {id(m): i for i, m in enumerate(kept)}
        entry = torch.tensor([position[id(t.masks)] for t in targets])
        self._entry = entry.to(device, non_blocking=True)
        self._first = (counts.cumsum(0) - counts).to(device, non_blocking=True)

    def gather(self, image_index: Tensor, local_index: Tensor) -> Tensor:
        """(K,) entries of the batch and (K,) objects of theirs -> (K, H, W) bool masks."""
        entry = self._entry[image_index]
        if self._maps is not None:
            return _compare(self._maps, entry, local_index)
        return self._dense[self._first[entry] + local_index]


def gather_masks(
    targets: Sequence[ImageTarget], image_index: Tensor, local_index: Tensor
) -> Tensor:
    """Masks of chosen objects, padded with False to the largest height and width of the batch.

    Args:
        targets: of all B' entries of the batch, each with masks of the same kind.
        image_index: (K,) int64, which entry of ``targets``.
        local_index: (K,) int64, which object of that image.

    Returns:
        (K, H, W) bool.
    """
    return TargetMasks(targets).gather(image_index, local_index)


def gather_mask_shares(
    targets: Sequence[ImageTarget], image_index: Tensor, local_index: Tensor, size: tuple[int, int]
) -> Tensor:
    """The masks of :func:`gather_masks` averaged over the cells of a smaller map.

    Never more than a few masks exist at full size.

    Args:
        targets: see :func:`gather_masks`.
        image_index: (K,) int64.
        local_index: (K,) int64.
        size: (h, w) wanted.

    Returns:
        (K, h, w) float32 in 0 to 1: how much of each cell the mask covers.
    """
    parts = zip(image_index.split(_MASKS_AT_ONCE), local_index.split(_MASKS_AT_ONCE), strict=True)
    masks = TargetMasks(targets)
    shares = [
        F.interpolate(masks.gather(image, local)[:, None].float(), size=size, mode="area")
        for image, local in parts
    ]
    return torch.cat(shares)[:, 0]


def class_maps(targets: Sequence[ImageTarget]) -> Tensor:
    """The class of every pixel, padded to one size.

    Args:
        targets: with masks as a :class:`SegmentMap`.

    Returns:
        (B, H, W) int64 contiguous class ids, -1 at void and padding.
    """
    maps = []
    for target in targets:
        assert isinstance(target.masks, SegmentMap)
        index = target.masks.index_map.long()
        if len(target) > 0:
            index = target.labels[index.clamp(min=0)].masked_fill(index < 0, -1)
        maps.append(index)
    return _pad_and_stack(maps, value=-1)


def _compare(maps: Tensor, image_index: Tensor, local_index: Tensor) -> Tensor:
    """(B', H, W) and K pairs of indices -> (K, H, W) bool, with next to nothing beside it."""
    # In the type of the maps: with two integer types PyTorch copies all of the smaller to int64.
    wanted = local_index.to(maps.dtype)[:, None, None]
    masks = torch.empty((len(image_index), *maps.shape[-2:]), dtype=torch.bool, device=maps.device)
    parts = (x.split(_MASKS_AT_ONCE) for x in (image_index, wanted, masks))
    for images, numbers, out in zip(*parts, strict=True):
        torch.eq(maps[images], numbers, out=out)
    return masks


def _pad_and_stack(maps: list[Tensor], value: int) -> Tensor:
    height = max(m.shape[-2] for m in maps)
    width = max(m.shape[-1] for m in maps)
    return torch.stack([_pad_to(m, height, width, value) for m in maps])


def _pad_to(x: Tensor, height: int, width: int, value: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value)
