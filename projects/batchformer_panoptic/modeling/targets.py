"""What the criterion is given for each image: classes, boxes and, for panoptic, masks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers import xyxy_to_cxcywh


@dataclass(frozen=True)
class SegmentMap:
    """Masks that do not overlap, as one map: lossless, and free of charge for 1000 segments.

    Attributes:
        index_map: (H, W) int, k at the pixels of target k, negative elsewhere.
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
    maps = [t.masks.index_map for t in targets if isinstance(t.masks, SegmentMap)]
    if len(maps) == len(targets):
        return _pad_and_stack(maps, value=-1)[image_index] == local_index[:, None, None]
    dense = [t.masks.masks for t in targets if isinstance(t.masks, DenseMasks)]
    assert len(dense) == len(targets), "the targets of a batch carry masks of one kind"
    height = max(m.shape[-2] for m in dense)
    width = max(m.shape[-1] for m in dense)
    padded = torch.cat([_pad_to(m, height, width, value=0) for m in dense])
    counts = torch.tensor([len(m) for m in dense], device=padded.device)
    first = counts.cumsum(0) - counts
    return padded[first[image_index] + local_index]


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


def _pad_and_stack(maps: list[Tensor], value: int) -> Tensor:
    height = max(m.shape[-2] for m in maps)
    width = max(m.shape[-1] for m in maps)
    return torch.stack([_pad_to(m, height, width, value) for m in maps])


def _pad_to(x: Tensor, height: int, width: int, value: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value)
