"""Copy-paste augmentation (Ghiasi et al. 2021, arXiv 2012.07177): things moved between images."""

from typing import Any, NamedTuple

import numpy as np

from .images import ImageArray
from .segment_maps import IntArray


class SegmentedImage(NamedTuple):
    """An image and its segments, both after the transforms.

    Attributes:
        image: (H, W, 3) uint8.
        segment_map: (H, W) uint8 or uint16, k + 1 for ``segments_info[k]``, 0 outside all.
        segments_info: dicts with ``category_id`` and ``isthing``, not all of them visible.
    """

    image: ImageArray
    segment_map: IntArray
    segments_info: list[dict[str, Any]]


def paste_things(target: SegmentedImage, source: SegmentedImage) -> SegmentedImage:
    """Paste a random part of the visible things of one image into another, pixel by pixel.

    Every thing is drawn with probability 1/2, as numpy's global generator decides. It covers what
    is below it; a segment that disappears altogether keeps its entry in `segments_info` and has no
    pixels left. Stuff, void and crowds are never pasted. Edges are not blended, since the paper
    found no gain in that.

    Args:
        target: image that things are pasted into; not changed.
        source: image of the same size that they come from; not changed.

    Raises:
        ValueError: the sizes differ.
    """
    if target.segment_map.shape != source.segment_map.shape:
        raise ValueError(f"sizes {target.segment_map.shape} and {source.segment_map.shape} differ")
    is_thing = np.array([False, *(bool(info["isthing"]) for info in source.segments_info)])
    visible = np.bincount(source.segment_map.ravel(), minlength=len(is_thing)) > 0
    chosen = np.flatnonzero(is_thing & visible & (np.random.random(len(is_thing)) < 0.5))
    if not len(chosen):
        return target

    # Number of each pasted segment in the result, 0 for all that stay behind.
    new_numbers = np.zeros(len(is_thing), dtype=np.uint16)
    new_numbers[chosen] = len(target.segments_info) + 1 + np.arange(len(chosen))
    pasted = new_numbers[source.segment_map]
    segment_map: IntArray = np.where(pasted > 0, pasted, target.segment_map)
    infos = [*target.segments_info, *(source.segments_info[number - 1] for number in chosen)]
    if len(infos) <= np.iinfo(np.uint8).max:
        segment_map = segment_map.astype(np.uint8)
    image = np.where((pasted > 0)[..., None], source.image, target.image)
    return SegmentedImage(image, segment_map, infos)
