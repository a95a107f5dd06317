"""Targets whose masks may overlap, as golden files record them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from batchformer_panoptic.modeling.set_prediction.predictions import sample_at
from batchformer_panoptic.modeling.set_prediction.targets import MaskLookup, PointLookup


@dataclass(frozen=True)
class DenseMasks:
    """One bool mask (T, H, W) per object; an ``ObjectMasks``."""

    masks: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.masks.shape[-2], self.masks.shape[-1]

    @staticmethod
    def lookup(masks: Sequence["DenseMasks"], size: tuple[int, int]) -> MaskLookup:
        padded = [F.pad(m.masks, (0, size[1] - m.size[1], 0, size[0] - m.size[0])) for m in masks]
        together = torch.cat(padded)
        lengths = [0, *(len(m) for m in padded)]
        first = torch.tensor(lengths, device=together.device).cumsum(0)
        return lambda position, index: together[first[position] + index]

    @staticmethod
    def point_lookup(masks: Sequence["DenseMasks"], size: tuple[int, int]) -> PointLookup:
        gather = DenseMasks.lookup(masks, size)

        def sample(position: Tensor, index: Tensor, points: Tensor) -> Tensor:
            maps = gather(position, index)[:, None].float()
            scale = points.new_tensor([size[1], size[0]])
            return sample_at(maps, points / scale)[:, 0]

        return sample
