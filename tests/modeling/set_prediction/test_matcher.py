import itertools

import pytest
import torch

from batchformer_panoptic.errors import NonFiniteError
from batchformer_panoptic.layers import generalized_box_iou
from batchformer_panoptic.modeling.set_prediction.matcher import (
    BoxGIoUCost,
    BoxL1Cost,
    ClassCost,
    HungarianMatcher,
)
from batchformer_panoptic.modeling.set_prediction.predictions import Predictions
from batchformer_panoptic.modeling.set_prediction.scoring import FocalScoring, SoftmaxScoring
from batchformer_panoptic.modeling.set_prediction.targets import ImageTarget, TargetBatch

NUM_CLASSES = 3


def match(scoring, logits, boxes, targets):
    matcher = HungarianMatcher(
        [ClassCost(scoring, weight=1.0), BoxL1Cost(weight=5.0), BoxGIoUCost(weight=2.0)]
    )
    return matcher(Predictions(logits, boxes), TargetBatch(targets))


def make_target(count: int, seed: int = 0) -> ImageTarget:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 4, generator=generator) * 0.4 + 0.2
    return ImageTarget(torch.randint(NUM_CLASSES, (count,), generator=generator), boxes)


def make_predictions(scoring, num_layers, num_images, num_queries):
    logits = torch.randn(num_layers, num_images, num_queries, scoring.num_outputs)
    return logits, torch.rand(num_layers, num_images, num_queries, 4) * 0.4 + 0.2


def pair_cost(scoring, logits, box, label, target_box):
    """Cost of one query and one object from the published formulas."""
    if isinstance(scoring, SoftmaxScoring):
        cost_class = -logits.softmax(0)[label]
    else:
        p = logits.sigmoid()[label]
        cost_class = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
    giou = generalized_box_iou(box, target_box)
    return (cost_class + 5 * (box - target_box).abs().sum() - 2 * giou).item()


def brute_force(scoring, logits, boxes, target):
    """Cheapest assignment by trying every injection of objects into queries."""
    num_queries, count = len(logits), len(target)
    cost = [
        [
            pair_cost(scoring, logits[q], boxes[q], target.labels[t], target.boxes_cxcywh[t])
            for t in range(count)
        ]
        for q in range(num_queries)
    ]
    options = itertools.permutations(range(num_queries), count)
    best = min(options, key=lambda qs: sum(cost[q][t] for t, q in enumerate(qs)))
    return sorted((q, t) for t, q in enumerate(best))


@pytest.mark.parametrize("scoring", [SoftmaxScoring(NUM_CLASSES), FocalScoring(NUM_CLASSES)])
def test_equals_brute_force_in_every_layer_and_image(scoring):
    targets = [make_target(3, 1), make_target(0), make_target(2, 2)]
    logits, boxes = make_predictions(scoring, 2, 3, 5)
    matching = match(scoring, logits, boxes, targets)
    first = [0, 3, 3]
    for layer, image in itertools.product(range(2), range(3)):
        here = (matching.layer == layer) & (matching.image == image)
        pairs = zip(
            matching.query[here].tolist(), matching.local_target[here].tolist(), strict=True
        )
        assert sorted(pairs) == brute_force(
            scoring, logits[layer, image], boxes[layer, image], targets[image]
        )
        assert torch.equal(matching.global_target[here], matching.local_target[here] + first[image])


def test_of_layer_takes_that_layer():
    scoring = SoftmaxScoring(NUM_CLASSES)
    targets = [make_target(3), make_target(1)]
    logits, boxes = make_predictions(scoring, 3, 2, 5)
    matching = match(scoring, logits, boxes, targets)
    last = matching.of_layer(-1)
    assert last.layer.tolist() == [2] * 4
    assert torch.equal(last.query, matching.query[matching.layer == 2])
    single = match(scoring, logits[2:], boxes[2:], targets)
    assert torch.equal(last.query, single.query)
    assert torch.equal(last.local_target, single.local_target)


def test_more_objects_than_queries_match_every_query_once():
    scoring = SoftmaxScoring(NUM_CLASSES)
    logits, boxes = make_predictions(scoring, 1, 1, 3)
    matching = match(scoring, logits, boxes, [make_target(5)])
    assert matching.query.tolist() == [0, 1, 2]
    assert len(set(matching.local_target.tolist())) == 3


def test_no_objects_at_all():
    scoring = SoftmaxScoring(NUM_CLASSES)
    logits, boxes = make_predictions(scoring, 2, 2, 3)
    matching = match(scoring, logits, boxes, [make_target(0)] * 2)
    assert matching.query.shape == (0,)
    assert matching.of_layer(-1).layer_starts == (0, 0)


def test_non_finite_cost_names_image_and_term():
    scoring = SoftmaxScoring(NUM_CLASSES)
    logits, boxes = make_predictions(scoring, 1, 2, 3)
    logits[0, 1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"cost is not finite \(terms: class\)") as caught:
        match(scoring, logits, boxes, [make_target(2), make_target(2)])
    assert caught.value.entries == (1,)


def test_non_finite_values_of_an_image_without_objects_cost_nothing():
    scoring = SoftmaxScoring(NUM_CLASSES)
    logits, boxes = make_predictions(scoring, 1, 2, 3)
    logits[0, 1] = float("nan")
    matching = match(scoring, logits, boxes, [make_target(2), make_target(0)])
    assert matching.image.tolist() == [0, 0]
