"""Masks, targets, costs and losses at points, against dense masks and loops."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from batchformer_panoptic.modeling.set_prediction.matcher import HungarianMatcher
from batchformer_panoptic.modeling.set_prediction.point_losses import (
    PointMaskCost,
    PointMaskLoss,
    random_points,
)
from batchformer_panoptic.modeling.set_prediction.predictions import (
    Predictions,
    QueryMasks,
    sample_at,
)
from batchformer_panoptic.modeling.set_prediction.targets import (
    ImageTarget,
    SegmentMap,
    TargetBatch,
)
from helpers.commands import load_script
from helpers.dense_masks import DenseMasks

SIZES = [(40, 60), (56, 48)]
PADDED = (64, 64)
LAYERS, QUERIES, CHANNELS = 3, 5, 8


def make_targets(counts, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [
        ImageTarget(
            torch.zeros(count, dtype=torch.int64),
            None,
            SegmentMap(torch.randint(-1, max(count, 1), size, generator=generator)),
        )
        for count, size in zip(counts, sizes, strict=True)
    ]


def dense(targets, size=PADDED):
    """(T, H, W) float masks of each image, padded."""
    return [
        F.pad(
            (target.masks.segment_map == torch.arange(len(target))[:, None, None]).float(),
            (0, size[1] - target.masks.size[1], 0, size[0] - target.masks.size[0]),
        )
        for target in targets
    ]


def make_masks(entries=2, size=(16, 16)):
    return QueryMasks(
        torch.randn(LAYERS, entries, QUERIES, CHANNELS),
        torch.randn(entries, CHANNELS, *size),
        PADDED,
    )


def edge_points():
    """All pairs of coordinates at and near the borders of images, padding and pixels."""
    x = torch.tensor([0.0, 1e-6, 0.5 / 64, 1 / 64, 48 / 64, 56 / 64, 60.5 / 64, 1 - 1e-6, 1.0])
    return torch.cartesian_prod(x, x)


@pytest.mark.parametrize("kind", ["segment_map", "dense"])
def test_targets_at_points_are_those_of_grid_sample(kind):
    targets = make_targets([4, 3])
    image, local = torch.tensor([1, 0, 0, 1, 0]), torch.tensor([0, 3, 0, 2, 0])
    points = torch.cat([torch.rand(5, 200, 2), edge_points().expand(5, -1, -1)], dim=1)
    wanted = torch.stack([dense(targets)[i][k] for i, k in zip(image, local, strict=True)])
    expected = sample_at(wanted[:, None], points)[:, 0]
    if kind == "dense":
        pairs = zip(targets, dense(targets), strict=True)
        targets = [replace(target, masks=DenseMasks(maps.bool())) for target, maps in pairs]
    found = TargetBatch(targets).masks.at_points(image, local, points, PADDED)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert 0 < found.mean() < 1


def test_streams_share_their_targets():
    targets = make_targets([4, 3])
    batch = TargetBatch([*targets, *targets])
    points = torch.rand(1, 50, 2).expand(2, -1, -1)
    first, second = batch.masks.at_points(
        torch.tensor([1, 3]), torch.tensor([2, 2]), points, PADDED
    )
    assert torch.equal(first, second)


def test_chosen_masks_are_products_of_embeddings_and_features():
    masks = make_masks()
    everything = torch.einsum("lbqc,bchw->lbqhw", masks.embeddings, masks.features)
    layer, image, query = torch.tensor([[2, 0, 1, 2], [1, 0, 1, 0], [4, 0, 2, 3]])
    torch.testing.assert_close(masks(layer, image, query), everything[layer, image, query])
    torch.testing.assert_close(masks(-1, image, query), everything[-1, image, query])
    assert torch.equal(masks(layer, image, query, [2, 2]), masks(layer, image, query))
    none = torch.zeros(0, dtype=torch.int64)
    assert masks(none, none, none).shape == (0, 16, 16)


@pytest.mark.parametrize(("count", "sampled"), [(3, "features"), (700, "masks")])
def test_masks_at_points_are_samples_of_masks(count, sampled, monkeypatch):
    masks, points = make_masks(), torch.rand(2, count, 2)
    everything = torch.einsum("bqc,bchw->bqhw", masks.embeddings[1], masks.features)
    expected = sample_at(everything, points)
    channels = {"features": masks.features.shape[1], "masks": masks.embeddings.shape[2]}
    seen = []

    def spy(maps, at):
        seen.append(maps.shape[1])
        return sample_at(maps, at)

    monkeypatch.setattr("batchformer_panoptic.modeling.set_prediction.predictions.sample_at", spy)
    torch.testing.assert_close(masks.at_points(1, points), expected)
    assert channels["features"] != channels["masks"]
    assert seen == [channels[sampled]]


def test_points_are_not_rounded_to_the_precision_of_the_maps():
    ramp = torch.arange(256.0).expand(1, 1, 256, 256).bfloat16()
    points = torch.rand(1, 500, 2) * 0.9 + 0.05
    samples = sample_at(ramp, points)
    assert samples.dtype == torch.float32
    torch.testing.assert_close(samples[0, 0], points[0, :, 0] * 256 - 0.5, rtol=0, atol=1e-3)


def test_cost_is_that_of_a_loop(monkeypatch):
    targets, masks, points = make_targets([4, 0]), make_masks(), torch.rand(LAYERS, 2, 90, 2)
    module = "batchformer_panoptic.modeling.set_prediction.point_losses.random_points"
    monkeypatch.setattr(module, lambda shape, device: points)
    cost = PointMaskCost(mask_weight=2.0, dice_weight=3.0, num_points=90)
    logits = torch.zeros(LAYERS, 2, QUERIES, 4)
    found = cost(Predictions(logits, None, masks), TargetBatch(targets))
    assert found.shape == (LAYERS, 2, QUERIES, 4)
    wanted = sample_at(dense(targets)[0][None], points[:, 0].reshape(1, -1, 2))
    wanted = wanted[0].unflatten(1, (LAYERS, 90))
    for layer in range(LAYERS):
        mask = torch.einsum("qc,chw->qhw", masks.embeddings[layer, 0], masks.features[0])
        sampled = sample_at(mask[None], points[layer, :1])[0]
        for query in range(QUERIES):
            p = sampled[query].sigmoid()
            for k in range(4):
                t = wanted[k, layer]
                ce = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
                dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
                assert found[layer, 0, query, k].item() == pytest.approx(
                    (2 * ce + 3 * dice).item(), rel=1e-4
                )


def matched(counts, queries=QUERIES, num_points=50):
    masks = QueryMasks(
        torch.randn(LAYERS, 2, queries, CHANNELS, requires_grad=True),
        torch.randn(2, CHANNELS, 16, 16, requires_grad=True),
        PADDED,
    )
    predictions = Predictions(torch.zeros(LAYERS, 2, queries, 4), None, masks)
    batch = TargetBatch(make_targets(counts))
    cost = PointMaskCost(mask_weight=5.0, dice_weight=5.0, num_points=num_points)
    return predictions, batch, HungarianMatcher([cost])(predictions, batch)


def test_cost_keeps_the_digits_of_float32_in_half_precision():
    """Mask costs of nearly equal queries differ in the fourth digit, which bfloat16 has not."""
    masks = make_masks()
    wanted = TargetBatch(make_targets([3, 2]))
    costs = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        logits = torch.zeros(LAYERS, 2, QUERIES, 4, dtype=dtype)
        term = PointMaskCost(num_points=200, mask_weight=5.0, dice_weight=5.0)
        costs.append(term(Predictions(logits, masks=masks), wanted))
    assert costs[1].dtype == torch.float32
    assert torch.equal(*costs)


@pytest.mark.parametrize("counts", [[0, 0], [3, 0], [9, 2], [40, 300]])
def test_losses_are_finite_for_any_number_of_objects(counts, monkeypatch):
    predictions, batch, matching = matched(counts)
    counted, bincount = [], torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda *a, **k: counted.append(a) or bincount(*a, **k))
    assert len(matching.query) == LAYERS * sum(min(QUERIES, count) for count in counts)
    loss = PointMaskLoss(mask_weight=5.0, dice_weight=5.0, num_points=50)
    losses = loss(predictions, batch, matching, torch.tensor(max(sum(counts), 1.0)))
    assert set(losses) == {"loss_mask", "loss_dice"}
    for value in losses.values():
        assert value.shape == (LAYERS, 2)
        assert value.isfinite().all()
        assert (value[:, [count == 0 for count in counts]] == 0).all()
    assert len(counted) == 0, "the number of masks of an entry is known without the device"
    sum(value.sum() for value in losses.values()).backward()
    for leaf in (predictions.masks.embeddings, predictions.masks.features):
        assert leaf.grad.isfinite().all()


def test_random_points_cover_the_image():
    points = random_points((2, 3, 500), torch.device("cpu"))
    assert points.shape == (2, 3, 500, 2)
    assert 0 <= points.min() < 0.01
    assert 0.99 < points.max() <= 1


def test_memory_grows_with_points_and_not_with_pixels():
    """A float32 mask for each pair would be 16 times as large for twice the side."""
    peak_bytes = load_script("benchmarks/measure.py").peak_bytes
    count, peaks = 20, {}
    for side in (128, 512):
        for num_points in (1000, 4000):
            predictions, _, matching = matched([count, count], queries=count)
            targets = make_targets([count, count], [(side, side)] * 2)
            loss = PointMaskLoss(mask_weight=5.0, dice_weight=5.0, num_points=num_points)
            step = (predictions, TargetBatch(targets), matching, torch.tensor(40.0))

            def run(loss=loss, step=step):
                sum(value.sum() for value in loss(*step).values()).backward()

            peaks[side, num_points] = peak_bytes(run)
    assert peaks[128, 4000] > 2.5 * peaks[128, 1000]
    maps = 2 * 512**2 * 8  # the segment maps themselves, padded and stacked
    assert peaks[512, 4000] < 1.1 * peaks[128, 4000] + maps
