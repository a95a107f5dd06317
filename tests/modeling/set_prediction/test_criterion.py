import math

import pytest
import torch
from torch.nn import functional as F

from batchformer_panoptic.layers import generalized_box_iou
from batchformer_panoptic.modeling.set_prediction.criterion import (
    BoxGIoULoss,
    BoxL1Loss,
    ClassLoss,
    MaskLoss,
    SetCriterion,
    count_objects,
    matching_metrics,
)
from batchformer_panoptic.modeling.set_prediction.mask_losses import (
    mask_dice_loss,
    pixel_class_loss,
)
from batchformer_panoptic.modeling.set_prediction.matcher import (
    BoxGIoUCost,
    BoxL1Cost,
    ClassCost,
    HungarianMatcher,
)
from batchformer_panoptic.modeling.set_prediction.predictions import Predictions
from batchformer_panoptic.modeling.set_prediction.scoring import FocalScoring, SoftmaxScoring
from batchformer_panoptic.modeling.set_prediction.targets import (
    ImageTarget,
    SegmentMap,
    TargetBatch,
    class_maps,
)
from helpers.dense_masks import DenseMasks

NUM_CLASSES = 3
SCORINGS = [SoftmaxScoring(NUM_CLASSES, no_object_weight=0.1), FocalScoring(NUM_CLASSES)]


def make_targets(counts, seed=0, size=(8, 12)):
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        index_map = torch.randint(-1, max(count, 1), size, generator=generator, dtype=torch.int16)
        targets.append(
            ImageTarget(
                torch.randint(NUM_CLASSES, (count,), generator=generator),
                torch.rand(count, 4, generator=generator) * 0.4 + 0.2,
                SegmentMap(index_map),
            )
        )
    return targets


def make_matcher(scoring):
    return HungarianMatcher(
        [ClassCost(scoring, weight=1.0), BoxL1Cost(weight=5.0), BoxGIoUCost(weight=2.0)]
    )


def box_losses(scoring, logits, boxes, targets):
    predictions, batch = Predictions(logits, boxes), TargetBatch(targets)
    matching = make_matcher(scoring)(predictions, batch)
    count = count_objects(targets, logits.device)
    terms = [ClassLoss(scoring, weight=1.0), BoxL1Loss(weight=5.0), BoxGIoULoss(weight=2.0)]
    return SetCriterion(terms)(predictions, batch, matching, count), matching


def mask_losses(mask_logits, targets, num_objects, *, num_layers=1, **options):
    """Losses of chosen masks, and their pairs; predictions of classes and boxes are random."""
    chosen = []

    def select(layer, image, query):
        chosen.append((layer, image, query))
        return mask_logits

    shape = (num_layers, len(targets), 5)
    predictions = Predictions(torch.randn(*shape, 4), torch.rand(*shape, 4), select)
    batch = TargetBatch(targets)
    matching = make_matcher(SCORINGS[0])(predictions, batch)
    criterion = SetCriterion([MaskLoss(focal_weight=1.0, dice_weight=1.0, **options)])
    losses = criterion(predictions, batch, matching, torch.tensor(num_objects))
    pairs = matching if options.get("all_layers") else matching.of_layer(-1)
    (indices,) = chosen
    for ours, theirs in zip(indices, (pairs.layer, pairs.image, pairs.query), strict=True):
        assert torch.equal(ours, theirs)
    return losses, pairs


def slow_box_losses(scoring, logits, boxes, targets, matching, layer):
    """The published losses of one layer with plain loops."""
    num_objects = max(sum(len(t) for t in targets), 1)
    ce = weight_sum = l1 = giou = 0.0
    for image, target in enumerate(targets):
        here = (matching.layer == layer) & (matching.image == image)
        pairs = dict(
            zip(matching.query[here].tolist(), matching.local_target[here].tolist(), strict=True)
        )
        for q in range(logits.shape[2]):
            label = int(target.labels[pairs[q]]) if q in pairs else NUM_CLASSES
            x = logits[layer, image, q]
            if isinstance(scoring, SoftmaxScoring):
                weight = 0.1 if label == NUM_CLASSES else 1.0
                ce += -weight * x.log_softmax(0)[label].item()
                weight_sum += weight
            else:
                for k in range(NUM_CLASSES):
                    p = x.sigmoid()[k].item()
                    positive = k == label
                    pt, alpha = (p, 0.25) if positive else (1 - p, 0.75)
                    ce += -alpha * (1 - pt) ** 2 * math.log(pt)
            if q in pairs:
                box, wanted = boxes[layer, image, q], target.boxes_cxcywh[pairs[q]]
                l1 += (box - wanted).abs().sum().item()
                giou += 1 - generalized_box_iou(box, wanted).item()
    ce /= weight_sum if isinstance(scoring, SoftmaxScoring) else num_objects
    return {"ce": ce, "bbox": 5 * l1 / num_objects, "giou": 2 * giou / num_objects}


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("counts", [[3, 2], [3, 0], [0, 0]])
def test_box_losses_equal_the_loops(scoring, counts):
    targets = make_targets(counts)
    logits = torch.randn(2, 2, 5, scoring.num_outputs)
    boxes = torch.rand(2, 2, 5, 4) * 0.4 + 0.2
    losses, matching = box_losses(scoring, logits, boxes, targets)
    assert set(losses) == {f"loss_{t}{s}" for t in ("ce", "bbox", "giou") for s in ("", "_0")}
    for layer, suffix in ((0, "_0"), (1, "")):
        slow = slow_box_losses(scoring, logits, boxes, targets, matching, layer)
        for term, value in slow.items():
            assert losses[f"loss_{term}{suffix}"].sum().item() == pytest.approx(value, rel=1e-5)


def test_contributions_belong_to_their_image():
    scoring = SCORINGS[0]
    targets = make_targets([2, 3])
    logits, boxes = torch.randn(1, 2, 5, 4), torch.rand(1, 2, 5, 4) * 0.4 + 0.2
    before, _ = box_losses(scoring, logits, boxes, targets)
    boxes[0, 1] = (boxes[0, 1] + 0.05).clamp(max=1)
    after, _ = box_losses(scoring, logits, boxes, targets)
    assert before["loss_bbox"][0] == after["loss_bbox"][0]
    assert before["loss_bbox"][1] != after["loss_bbox"][1]


def test_a_batch_twice_costs_what_it_costs_once():
    """The normaliser counts both streams: the total is a mean over streams, not a sum."""
    scoring = SCORINGS[0]
    targets = make_targets([2, 3])
    logits, boxes = torch.randn(1, 2, 5, 4), torch.rand(1, 2, 5, 4) * 0.4 + 0.2
    once, _ = box_losses(scoring, logits, boxes, targets)
    twice, _ = box_losses(
        scoring, torch.cat([logits] * 2, 1), torch.cat([boxes] * 2, 1), targets * 2
    )
    for name in once:
        torch.testing.assert_close(twice[name].sum(), once[name].sum())


def test_target_order_does_not_matter():
    scoring = SCORINGS[0]
    (target,) = make_targets([4])
    order = torch.tensor([2, 0, 3, 1])
    shuffled = ImageTarget(target.labels[order], target.boxes_cxcywh[order])
    logits, boxes = torch.randn(2, 1, 6, 4), torch.rand(2, 1, 6, 4) * 0.4 + 0.2
    a, _ = box_losses(scoring, logits, boxes, [target])
    b, _ = box_losses(scoring, logits, boxes, [shuffled])
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_perfect_boxes_cost_nothing():
    (target,) = make_targets([3])
    logits = torch.full((1, 1, 3, 4), -10.0)
    logits[0, 0, torch.arange(3), target.labels] = 10.0
    losses, _ = box_losses(SCORINGS[0], logits, target.boxes_cxcywh[None, None], [target])
    for name, value in losses.items():
        assert value.item() == pytest.approx(0, abs=1e-5), name


def test_mask_losses_equal_the_formulas():
    targets = make_targets([3, 2])
    mask_logits = torch.randn(5, 4, 6)
    losses, matching = mask_losses(mask_logits, targets, 5.0)
    expected = {"loss_mask": torch.zeros(2), "loss_dice": torch.zeros(2)}
    large = F.interpolate(mask_logits[:, None], size=(8, 12), mode="bilinear")[:, 0]
    for x, image, k in zip(large, matching.image, matching.local_target, strict=True):
        wanted = (targets[image].masks.segment_map == k).float()
        p = x.sigmoid()
        pt = torch.where(wanted > 0, p, 1 - p)
        alpha = torch.where(wanted > 0, 0.25, 0.75)
        expected["loss_mask"][image] += (-alpha * (1 - pt) ** 2 * pt.log()).mean() / 5
        dice = 1 - (2 * (p * wanted).sum() + 1) / (p.sum() + wanted.sum() + 1)
        expected["loss_dice"][image] += dice / 5
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_mask_losses_at_the_resolution_of_the_prediction():
    (target,) = make_targets([3])
    mask_logits = torch.randn(3, 4, 6)
    losses, matching = mask_losses(mask_logits, [target], 3.0, resolution="prediction")
    dice = 0.0
    for x, k in zip(mask_logits, matching.local_target, strict=True):
        inside = (target.masks.segment_map == k).float()
        share = inside.view(4, 2, 6, 2).mean(dim=(1, 3))  # of each cell of the 8 x 12 target
        p = x.sigmoid()
        dice += 1 - (2 * (p * share).sum() + 1) / (p.sum() + share.sum() + 1)
    torch.testing.assert_close(losses["loss_dice"], (dice / 3)[None])
    with pytest.raises(ValueError, match="'fine'; known: target, prediction"):
        MaskLoss(focal_weight=1.0, dice_weight=1.0, resolution="fine")


def test_mask_losses_of_every_layer():
    targets = make_targets([2, 1])
    mask_logits = torch.randn(6, 4, 6)  # three pairs in each of two layers
    losses, pairs = mask_losses(mask_logits, targets, 3.0, num_layers=2, all_layers=True)
    assert set(losses) == {"loss_mask", "loss_dice", "loss_mask_0", "loss_dice_0"}
    wanted = TargetBatch(targets).masks.gather(pairs.image, pairs.local_target).flatten(1)
    large = F.interpolate(mask_logits[:, None], size=(8, 12), mode="bilinear").flatten(1)
    each = mask_dice_loss(large, wanted.float()) / 3
    for layer, name in enumerate(("loss_dice_0", "loss_dice")):
        here = pairs.layer == layer
        expected = torch.zeros(2).index_add(0, pairs.image[here], each[here])
        torch.testing.assert_close(losses[name], expected)


def test_losses_of_one_name_are_refused():
    terms = [ClassLoss(SCORINGS[0], weight=1.0)] * 2
    with pytest.raises(ValueError, match="two loss terms are called 'loss_ce'"):
        SetCriterion(terms)


def test_losses_must_be_among_the_names_of_their_term():
    predictions, batch = Predictions(torch.randn(1, 1, 5, 4)), TargetBatch(make_targets([2]))
    term = ClassLoss(SCORINGS[0], weight=1.0)
    matching = HungarianMatcher([ClassCost(SCORINGS[0], weight=1.0)])(predictions, batch)
    term.names = ("loss_class",)
    with pytest.raises(ValueError, match="ClassLoss returns 'loss_ce', not in its names"):
        SetCriterion([term])(predictions, batch, matching, torch.tensor(1.0))


def test_classes_alone_are_matched_and_trained_without_boxes():
    targets = [ImageTarget(torch.tensor([2, 0])), ImageTarget(torch.tensor([1]))]
    logits = torch.randn(2, 2, 5, 4, requires_grad=True)
    predictions, batch = Predictions(logits), TargetBatch(targets)
    matching = HungarianMatcher([ClassCost(SCORINGS[0], weight=1.0)])(predictions, batch)
    criterion = SetCriterion([ClassLoss(SCORINGS[0], weight=2.0)])
    losses = criterion(predictions, batch, matching, torch.tensor(3.0))
    assert set(losses) == {"loss_ce", "loss_ce_0"}
    torch.stack([value.sum() for value in losses.values()]).sum().backward()
    assert logits.grad.abs().amax() > 0


def test_segment_maps_and_dense_masks_are_the_same_masks():
    maps = make_targets([3, 2]) + make_targets([1], seed=1, size=(10, 5))
    dense = [
        ImageTarget(
            t.labels,
            t.boxes_cxcywh,
            DenseMasks(t.masks.segment_map == torch.arange(len(t))[:, None, None]),
        )
        for t in maps
    ]
    image, local = torch.tensor([0, 2, 1, 0]), torch.tensor([2, 0, 1, 0])
    a, b = (TargetBatch(targets).masks.gather(image, local) for targets in (maps, dense))
    assert a.shape == (4, 10, 12)
    assert a.any(dim=(1, 2)).all()
    assert torch.equal(a, b)


def test_empty_targets_have_finite_losses_and_gradients():
    for scoring in SCORINGS:
        logits = torch.randn(2, 2, 5, scoring.num_outputs, requires_grad=True)
        boxes = torch.rand(2, 2, 5, 4, requires_grad=True)
        losses, _ = box_losses(scoring, logits, boxes, make_targets([0, 0]))
        torch.stack([v.sum() for v in losses.values()]).sum().backward()
        assert logits.grad.isfinite().all()
        assert logits.grad.abs().amax() > 0
        assert torch.equal(boxes.grad, torch.zeros_like(boxes))


def test_metrics_by_hand():
    (target,) = make_targets([2])
    logits = torch.zeros(1, 1, 4, 4)
    logits[..., -1] = 5.0  # everybody says "no object" ...
    logits[0, 0, 0, target.labels[0]] = 10.0  # ... but the first query, which is right
    boxes = torch.cat([target.boxes_cxcywh, torch.zeros(2, 4)])[None, None]
    predictions, batch = Predictions(logits, boxes), TargetBatch([target])
    matching = make_matcher(SCORINGS[0])(predictions, batch)
    metrics = matching_metrics(SCORINGS[0], predictions, batch, matching)
    assert metrics["class_error"].item() == 50.0
    assert metrics["cardinality_error"].item() == 1.0
    assert metrics["kept_queries"].item() == 1.0
    assert metrics["matched_objects"].item() == 2.0
    strict = matching_metrics(SCORINGS[0], predictions, batch, matching, score_threshold=0.9999)
    assert strict["kept_queries"].item() == 0.0


def test_pixel_classes_come_from_labels_and_void_is_left_out():
    index_map = torch.tensor([[0, 1, -1], [1, 1, -1]], dtype=torch.int16)
    target = ImageTarget(torch.tensor([2, 0]), torch.rand(2, 4), SegmentMap(index_map))
    nothing = ImageTarget(
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, 4),
        SegmentMap(-torch.ones_like(index_map)),
    )
    maps = class_maps([target, nothing])
    assert maps.tolist() == [[[2, 0, -1], [0, 0, -1]], [[-1] * 3] * 2]
    logits = torch.randn(2, 3, 2, 3)
    expected = torch.stack(
        [-logits[0, :, y, x].log_softmax(0)[maps[0, y, x]] for y in range(2) for x in range(2)]
    ).mean()
    torch.testing.assert_close(pixel_class_loss([logits, logits], maps), 2 * expected)
    assert pixel_class_loss([logits], torch.full_like(maps, -1)).item() == 0.0
