"""Panoptic inference of a batch in tensor operations only, as an exported graph needs it.

The rules are those of ``modeling/postprocessing/panoptic.py``, which decides for each query on the
host. Here a query without a use keeps its place, and is marked.

Shapes: B images, P places for kept queries, (h, w) the mask head's map, (H, W) the largest output.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop
from torch.nn import functional as F

from ..errors import UserError
from ..modeling.postprocessing.panoptic import (
    Merge,
    PanopticOptions,
    merge_mask2former,
    merge_strongest,
)


class KeptQueries(NamedTuple):
    """The kept queries of a batch, those of each image in ascending order.

    Attributes:
        valid: (B, P) bool, False for places without a query.
        scores: (B, P).
        labels: (B, P) int64 contiguous class ids.
        is_thing: (B, P) bool.
    """

    valid: Tensor
    scores: Tensor
    labels: Tensor
    is_thing: Tensor


class SegmentBatch(NamedTuple):
    """Segment maps of a batch, and their segments.

    Attributes:
        segment_map: (B, H, W) int32 ids from 1; 0 is void, and the rest of a smaller image.
        labels: (B, P) int64 contiguous class ids; the segment with id i is at place i - 1.
        scores: (B, P) float32, 0 to 1.
        areas: (B, P) int64 pixels; 0 for places without a segment.
    """

    segment_map: Tensor
    labels: Tensor
    scores: Tensor
    areas: Tensor


def keep_queries(
    used: Tensor, scores: Tensor, labels: Tensor, thing_class_ids: Sequence[int]
) -> tuple[Tensor, KeptQueries]:
    """Move the queries with a use to the front.

    Args:
        used: (B, Q) bool.
        scores: (B, Q).
        labels: (B, Q) int64.
        thing_class_ids: classes whose queries are separate segments.

    Returns:
        (B, P) int64 positions of the queries, and the queries. P is the largest number of an image,
        and at least 1.
    """
    places = used.sum(1).max().clamp(min=1).item()
    num_queries = used.shape[1]
    torch._check(places >= 1)
    torch._check(places <= num_queries)
    # The first used query ranks highest.
    rank = torch.arange(num_queries, 0, -1, device=used.device) * used
    query = rank.topk(num_queries, dim=1).indices[:, :places]
    labels = labels.gather(1, query)
    things = torch.tensor(sorted(thing_class_ids), dtype=torch.int64, device=used.device)
    is_thing = (labels[..., None] == things).any(-1)
    kept = KeptQueries(used.gather(1, query), scores.gather(1, query), labels, is_thing)
    return query, kept


def enlarge(
    masks: Tensor, padded_size: tuple[int, int], image_sizes: Tensor, output_sizes: Tensor
) -> Tensor:
    """Masks at the output sizes, as ``ImageMasks.at_output_size`` computes them for one image.

    Both bilinear interpolations, to the padded size and from the image to the output, are matrices
    of each axis.

    Args:
        masks: (B, P, h, w) logits over the padded size.
        padded_size: (height, width) of the padded batch.
        image_sizes: (B, 2) int64, (height, width) without padding.
        output_sizes: (B, 2) int64.

    Returns:
        (B, P, H, W) for the largest height and width; meaningless outside an image.
    """
    rows, columns = (
        _interpolation(image_sizes[:, axis], output_sizes[:, axis], padded_size[axis])
        @ _enlargement(masks.shape[2 + axis], padded_size[axis], masks)
        for axis in (0, 1)
    )
    return rows[:, None] @ masks @ columns[:, None].transpose(2, 3)


def pixels_of_images(sizes: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """(B, H, W) bool, True for the pixels of each image: (B, 2) sizes in a padded (H, W)."""
    rows, columns = (torch.arange(length, device=sizes.device) for length in padded_size)
    return (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]


def merge_batch(
    logits: Tensor,
    inside: Tensor,
    kept: KeptQueries,
    *,
    merge: Merge,
    options: PanopticOptions,
) -> SegmentBatch:
    """Panoptic inference.

    Args:
        logits: (B, P, H, W) mask logits at the output size.
        inside: (B, H, W) bool, the pixels of each image.
        kept: the queries.
        merge: the rule.
        options: thresholds; ``score_threshold`` has been applied.

    Raises:
        UserError: there is no such form of the rule.
    """
    check_merge(merge)
    if options.duplicate_iou < 1:
        kept = kept._replace(valid=_without_duplicates(logits, inside, kept, options.duplicate_iou))
    rule = _strongest if merge is merge_strongest else _mask2former
    return _numbered(rule(logits, inside, kept, options))


def check_merge(merge: Merge) -> None:
    """Raise UserError for a rule that has no form in tensor operations."""
    if merge not in (merge_strongest, merge_mask2former):
        raise UserError(
            "MODEL.PANOPTIC.MERGE_TEST published cannot be exported: set it to strongest"
        )


# --- sizes ---------------------------------------------------------------------------------------


def _steps(lengths: Tensor) -> Tensor:
    """0, 1, ... up to the largest of some lengths, exclusive."""
    longest = lengths.max().item()
    torch._check(longest >= 1)
    return torch.arange(longest, device=lengths.device)


def _enlargement(length: int, new_length: int, like: Tensor) -> Tensor:
    """(new_length, length) weights of the bilinear interpolation of an axis."""
    steps = torch.arange(new_length, dtype=like.dtype, device=like.device)
    old_length = torch.full((), length, dtype=like.dtype, device=like.device)
    return _weights(steps, old_length / new_length, old_length - 1, length)


def _interpolation(lengths: Tensor, new_lengths: Tensor, num_cells: int) -> Tensor:
    """(B, n, num_cells) weights from the first ``lengths`` cells of an axis to ``new_lengths``."""
    steps = _steps(new_lengths).float()
    scale = lengths.float() / new_lengths
    return _weights(steps, scale[:, None], lengths.float()[:, None] - 1, num_cells)


def _weights(steps: Tensor, scale: Tensor, last: Tensor, num_cells: int) -> Tensor:
    """(..., n, num_cells): each step reads the two cells around its place, up to the last one."""
    place = torch.minimum(((steps + 0.5) * scale - 0.5).clamp(min=0), last)
    cells = torch.arange(num_cells, dtype=steps.dtype, device=steps.device)
    return (1 - (place[..., None] - cells).abs()).clamp(min=0)


# --- rules ---------------------------------------------------------------------------------------


class _Assignment(NamedTuple):
    """The result of a rule: ``found`` (B, H, W) is 1 + the place of the owner, or 0 for void.

    ``first`` (B, P) is the place that stands for the segment of each query, and ``alive`` (B, P)
    tells for which of them there is a segment. ``kept`` are the queries whose scores count.
    """

    found: Tensor
    alive: Tensor
    first: Tensor
    kept: KeptQueries


def _first_of_segment(kept: KeptQueries) -> Tensor:
    """(B, P) int64: the first query of the segment of each query, which stands for the segment."""
    stuff = kept.valid & ~kept.is_thing
    same = kept.labels[:, :, None] == kept.labels[:, None]
    same = same & stuff[:, :, None] & stuff[:, None]
    places = torch.arange(kept.labels.shape[1], device=same.device)
    same = same | (places[:, None] == places)
    return same.int().argmax(-1)


def _without_duplicates(
    logits: Tensor, inside: Tensor, kept: KeptQueries, max_iou: float
) -> Tensor:
    """(B, P) bool: the queries without things that overlap a better one that stays."""
    covered = ((logits > 0) & inside[:, None]).flatten(2).float()
    overlap = covered @ covered.transpose(1, 2)
    area = overlap.diagonal(dim1=1, dim2=2)
    iou = overlap / (area[:, :, None] + area[:, None] - overlap).clamp(min=1)
    things = kept.valid & kept.is_thing
    places = torch.arange(area.shape[1], device=area.device)
    scores = kept.scores
    better = scores[:, None] > scores[:, :, None]
    better = better | ((scores[:, None] == scores[:, :, None]) & (places < places[:, None]))
    rivals = (iou > max_iou) & things[:, :, None] & things[:, None] & better

    # Whether a query stays depends on better ones only, so that repeating ends with the result of
    # going through them in order.
    def step(stays: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        new = kept.valid & ~(rivals & stays[:, None]).any(-1)
        return new, (new != stays).any()[None]

    start = (kept.valid.clone(), kept.valid.new_ones(1))
    stays, _ = while_loop(lambda stays, changed: changed.any(), step, start)
    return stays


def _strongest(
    logits: Tensor, inside: Tensor, kept: KeptQueries, options: PanopticOptions
) -> _Assignment:
    """``merge_strongest``."""
    first = _first_of_segment(kept)
    alive = kept.valid & (first == torch.arange(first.shape[1], device=first.device))

    def step(alive: Tensor, _: Tensor, __: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        visible = alive.gather(1, first)[:, :, None, None]
        best, query = logits.masked_fill(~visible, -torch.inf).max(1)
        owned = inside & (best > -torch.inf)
        if options.mask_threshold > 0:
            owned = owned & (best.sigmoid() >= options.mask_threshold)
        found = (first.gather(1, query.flatten(1)).view_as(query) + 1) * owned
        small = alive & (_areas(found, alive) <= options.min_area)
        return alive & ~small, small.any()[None], found

    start = (alive, alive.new_ones(1), torch.zeros_like(inside, dtype=torch.int64))
    alive, _, found = while_loop(lambda alive, changed, found: changed.any(), step, start)
    return _Assignment(found, alive, first, kept)


def _mask2former(
    logits: Tensor, inside: Tensor, kept: KeptQueries, options: PanopticOptions
) -> _Assignment:
    """``merge_mask2former``."""
    probabilities = logits.sigmoid()
    claims = (probabilities >= 0.5) & inside[:, None]
    weighted = probabilities * kept.scores[:, :, None, None]
    winner = weighted.masked_fill(~kept.valid[:, :, None, None], -1).argmax(1)
    claimed = claims.gather(1, winner[:, None])[:, 0] & kept.valid.any(1)[:, None, None]
    query = (winner + 1) * claimed
    won = _areas((winner + 1) * inside, kept.valid)
    own = claims.flatten(2).sum(2)
    share = won.double() / own.clamp(min=1).double()
    stays = kept.valid & (_areas(query, kept.valid) > 0) & (share >= options.overlap_threshold)
    kept = kept._replace(valid=stays)
    first = _first_of_segment(kept)
    owner = F.pad((first + 1) * stays, (1, 0))
    found = owner.gather(1, query.flatten(1)).view_as(query)
    alive = stays & (first == torch.arange(first.shape[1], device=first.device))
    return _Assignment(found, alive, first, kept)


def _areas(found: Tensor, alive: Tensor) -> Tensor:
    """(B, P) int64 pixels of each place in a map of 1 + place."""
    counts = found.new_zeros(alive.shape[0], alive.shape[1] + 1)
    return counts.scatter_add(1, found.flatten(1), torch.ones_like(found).flatten(1))[:, 1:]


def _numbered(assignment: _Assignment) -> SegmentBatch:
    """Number the segments from 1 in the order of their places, and move them to the front."""
    found, alive, first, kept = assignment
    places = torch.arange(alive.shape[1], device=alive.device)
    number = F.pad(alive.long().cumsum(1) * alive, (1, 0))
    segment_map = number.gather(1, found.flatten(1)).view_as(found).int()
    of_segment = (first[:, None] == places[:, None]) & kept.valid[:, None]
    scores = (kept.scores[:, None] * of_segment).amax(2)
    order = ((alive.shape[1] - places) * alive).topk(alive.shape[1], dim=1).indices
    there = alive.gather(1, order)
    return SegmentBatch(
        segment_map,
        kept.labels.gather(1, order) * there,
        scores.gather(1, order) * there,
        _areas(found, alive).gather(1, order) * there,
    )
