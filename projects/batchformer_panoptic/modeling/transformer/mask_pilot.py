"""Mask-piloted training (MP-Former, Zhang et al. 2023): extra queries that are given true masks.

In training, groups of pilot queries join the matching queries of a decoder with masked attention.
Each stands for one object. Its content is the embedding of the object's class, and in every layer
it attends within the object's mask; some classes and mask cells are wrong on purpose. It is
supervised with its object, without matching. Matching queries do not attend to pilot queries, and
evaluation has none. Published: IDEA-Research/MP-Former.

Shapes: B images, B' = streams * B, L predictions, Q matching queries, G groups of N pilot queries,
P = G * N, S tokens of one level, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...batchformer import StreamState
from ..set_prediction.matcher import Matching, fixed_matching
from ..set_prediction.predictions import Predictions, QueryMasks
from ..set_prediction.targets import BatchMasks, ImageTarget, TargetBatch

# Full-size masks that exist at a time while they are resized.
_MASKS_AT_ONCE = 16


@dataclass(frozen=True)
class PilotLayout:
    """The object of each pilot query; the same in all groups.

    Attributes:
        num_groups: groups G.
        group_size: queries N of a group. Those past an image's objects are padding.
        objects: for each image, (n <= N,) int64 numbers of its objects, on the CPU.
    """

    num_groups: int
    group_size: int
    objects: tuple[Tensor, ...]

    @property
    def num_objects(self) -> int:
        """Objects of all images that a group stands for."""
        return sum(len(x) for x in self.objects)

    def by_group(self, predictions: Predictions) -> Predictions:
        """Predictions of (L, B', P) queries -> (L * G, B', N), the groups of a layer adjacent.

        A group is then supervised like the queries of a layer: one query for each object.

        Raises:
            ValueError: masks are not products of queries and pixels.
        """
        masks = predictions.masks
        if not isinstance(masks, QueryMasks):
            raise ValueError("mask-piloted training needs masks that are QueryMasks")
        embeddings = self._split(masks.embeddings)
        return Predictions(
            self._split(predictions.logits), masks=replace(masks, embeddings=embeddings)
        )

    def matching(self, predictions: Predictions, targets: TargetBatch) -> Matching:
        """Pairs of the queries of :meth:`by_group` and their objects; padding has none.

        Args:
            predictions: of :meth:`by_group`.
            targets: of all B' entries.
        """
        num_streams = len(targets) // len(self.objects)
        pairs = [(torch.arange(len(x)).numpy(), x.numpy()) for x in self.objects * num_streams]
        logits = predictions.logits
        return fixed_matching(pairs, targets.counts, len(logits), logits.device)

    def _split(self, values: Tensor) -> Tensor:
        groups = values.unflatten(2, (self.num_groups, self.group_size))
        return groups.movedim(2, 1).flatten(0, 1)


class PilotOutput(NamedTuple):
    """Pilot queries in the output of a transformer.

    Attributes:
        hidden_states: (L, B', P, C) normalised states.
        mask_embeddings: (L, B', P, C_m).
        layout: the objects they stand for.
    """

    hidden_states: Tensor
    mask_embeddings: Tensor
    layout: PilotLayout

    def from_layer(self, first: int) -> "PilotOutput":
        """The same queries with the decoder layers from ``first`` on."""
        return self._replace(
            hidden_states=self.hidden_states[first:], mask_embeddings=self.mask_embeddings[first:]
        )


@dataclass(frozen=True)
class PilotQueries:
    """Pilot queries in the input of a decoder.

    Attributes:
        layout: the objects they stand for.
        content: (B', P, C).
        is_object: (B, N) bool, False at padding.
        masks: for each level, (B, N, S) bool: the tokens that the objects cover.
        mask_noise: see :class:`MaskPilot`.
        streams: the streams along B'.
    """

    layout: PilotLayout
    content: Tensor
    is_object: Tensor
    masks: tuple[Tensor, ...]
    mask_noise: float
    streams: StreamState

    def visible_tokens(self, level: int) -> Tensor:
        """(B', P, S) bool, True where a query may attend; noise is drawn with every call.

        Streams share it. A query whose mask is empty may attend to all tokens.
        """
        masks = self.masks[level][:, None].expand(-1, self.layout.num_groups, -1, -1)
        if self.mask_noise > 0:
            # As many cells flip as make up this share of the object, whatever its size; spread
            # over the whole image, so that a mask gains cells as well as loses some.
            share = self.mask_noise * masks.float().mean(-1, keepdim=True)
            masks = masks ^ (torch.rand(masks.shape, device=masks.device) < share)
        masks = masks.flatten(1, 2)
        return self.streams.expand(masks | ~masks.any(-1, keepdim=True))

    def visible_queries(self, num_matching: int) -> Tensor:
        """(B', Q + P, Q + P) bool for self-attention: rows attend to columns, matching first.

        All queries attend to matching queries, and pilot queries also to the objects of their own
        group.
        """
        groups, size = self.layout.num_groups, self.layout.group_size
        own = torch.eye(groups, dtype=torch.bool, device=self.is_object.device)
        own = own.repeat_interleave(size, 0).repeat_interleave(size, 1)
        pilot = own & self.is_object.repeat(1, groups)[:, None]
        visible = F.pad(pilot, (num_matching, 0, num_matching, 0), value=False)
        visible[:, :, :num_matching] = True
        return self.streams.expand(visible)


class MaskPilot(nn.Module):
    """Makes pilot queries from the objects of a batch.

    Args:
        num_classes: classes of objects.
        embed_dim: channels C.
        num_queries: upper bound of P. As many groups are made as fit; of an image with more
            objects, a random subset forms the only group.
        label_noise: probability that the class is replaced by a random one, 0 to 1.
        mask_noise: expected number of cells that are flipped in a mask, as a share of the cells
            that the object covers, 0 to 1.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int,
        num_queries: int,
        label_noise: float,
        mask_noise: float,
    ) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.label_noise = label_noise
        self.mask_noise = mask_noise
        self.label_embed = nn.Embedding(num_classes, embed_dim)

    def forward(
        self,
        targets: Sequence[ImageTarget],
        streams: StreamState,
        level_sizes: Sequence[tuple[int, int]],
        padded_size: tuple[int, int],
    ) -> PilotQueries:
        """Make pilot queries, at least one of each image, which is padding without objects.

        Args:
            targets: of the B images, with masks.
            streams: of the decoder's input.
            level_sizes: (height, width) of each level.
            padded_size: (height, width) in pixels that each level covers.
        """
        layout = self._layout([len(target) for target in targets])
        device = targets[0].labels.device
        image, slot, local = _slots(layout).to(device, non_blocking=True)
        shape = (len(targets), layout.group_size)
        labels = image.new_zeros(shape)
        labels[image, slot] = torch.cat(
            [
                target.labels[objects.to(device, non_blocking=True)]
                for target, objects in zip(targets, layout.objects, strict=True)
            ]
        )
        covered = _covered_cells(targets, image, local, level_sizes, padded_size)
        masks = []
        for cells in covered:
            masks.append(cells.new_zeros(*shape, cells.shape[-1]))
            masks[-1][image, slot] = cells
        content = self.label_embed(self._noised(labels.repeat(1, layout.num_groups)))
        counts = torch.tensor([len(x) for x in layout.objects])
        is_object = torch.arange(layout.group_size) < counts[:, None]
        return PilotQueries(
            layout,
            streams.expand(content),
            is_object.to(device, non_blocking=True),
            tuple(masks),
            self.mask_noise,
            streams,
        )

    def _layout(self, counts: Sequence[int]) -> PilotLayout:
        # A batch without objects has padding, so that every parameter still gets a gradient, as
        # distributed training needs.
        size = min(max(1, *counts), self.num_queries)
        objects = (
            torch.arange(n) if n <= size else torch.randperm(n)[:size].sort().values for n in counts
        )
        return PilotLayout(self.num_queries // size, size, tuple(objects))

    def _noised(self, labels: Tensor) -> Tensor:
        if self.label_noise == 0:
            return labels
        others = torch.randint_like(labels, self.label_embed.num_embeddings)
        is_wrong = torch.rand(labels.shape, device=labels.device) < self.label_noise
        return torch.where(is_wrong, others, labels)


def _slots(layout: PilotLayout) -> Tensor:
    """(3, K) int64: images, positions in a group and numbers of all K piloted objects."""
    image = [torch.full_like(x, i) for i, x in enumerate(layout.objects)]
    slot = [torch.arange(len(x)) for x in layout.objects]
    return torch.stack([torch.cat(image), torch.cat(slot), torch.cat(layout.objects)])


def _covered_cells(
    targets: Sequence[ImageTarget],
    image: Tensor,
    local: Tensor,
    level_sizes: Sequence[tuple[int, int]],
    padded_size: tuple[int, int],
) -> list[Tensor]:
    """For each level, (K, S) bool: the cells that contain at least one pixel of an object."""
    masks = BatchMasks(targets, padded_size)
    levels: list[list[Tensor]] = [[] for _ in level_sizes]
    for images, objects in zip(
        image.split(_MASKS_AT_ONCE), local.split(_MASKS_AT_ONCE), strict=True
    ):
        pixels = masks.gather(images, objects)[:, None].float()
        for parts, size in zip(levels, level_sizes, strict=True):
            parts.append(F.interpolate(pixels, size=size, mode="area").flatten(1) > 0)
    return [torch.cat(parts) for parts in levels]
