"""The detections of an image against the published post-processing, written as loops."""

import pytest
import torch
from torch import Tensor

from batchformer_panoptic.modeling.postprocessing.results import (
    ChosenQueries,
    InferenceOptions,
    best_detections,
    needed_masks,
    on_host,
    select_queries,
    to_result,
)
from batchformer_panoptic.modeling.set_prediction.scoring import FocalScoring, SoftmaxScoring

QUERIES, CLASSES = 7, 4

Found = list[tuple[int, int, float]]  # query, class, score


def found(scores: Tensor, class_ids: list[int], **options: float) -> list[Found]:
    detections = best_detections(scores, class_ids, **{"max_detections": 100, **options})
    images = [detections.of_image(i) for i in range(len(scores))]
    return [
        list(zip(d.query.tolist(), d.labels.tolist(), d.scores.tolist(), strict=True))
        for d in images
    ]


def test_focal_queries_may_be_detections_of_several_classes() -> None:
    logits = torch.randn(3, QUERIES, CLASSES)
    scores = FocalScoring(CLASSES).decode(logits).class_scores
    for image, result in zip(logits.sigmoid(), found(scores, list(range(CLASSES))), strict=True):
        pairs = [(q, c, image[q, c].item()) for q in range(QUERIES) for c in range(CLASSES)]
        assert result == sorted(pairs, key=lambda pair: -pair[2])


def test_softmax_queries_are_detections_of_their_best_class() -> None:
    logits = torch.randn(3, QUERIES, CLASSES + 1)
    scores = SoftmaxScoring(CLASSES).decode(logits).class_scores
    probabilities = logits.softmax(-1)[..., :-1]
    for image, result in zip(probabilities, found(scores, list(range(CLASSES))), strict=True):
        best = [(q, image[q].argmax().item(), image[q].max().item()) for q in range(QUERIES)]
        assert result == sorted(best, key=lambda pair: -pair[2])


def test_the_best_are_kept() -> None:
    scores = FocalScoring(CLASSES).decode(torch.randn(2, QUERIES, CLASSES)).class_scores
    everything = found(scores, list(range(CLASSES)))
    assert found(scores, list(range(CLASSES)), max_detections=5) == [r[:5] for r in everything]
    kept = found(scores, list(range(CLASSES)), score_threshold=0.6)
    assert kept == [[pair for pair in r if pair[2] > 0.6] for r in everything]
    assert 0 < len(kept[0]) < QUERIES * CLASSES


def test_stuff_is_no_detection_and_takes_no_place() -> None:
    scores = FocalScoring(CLASSES).decode(torch.randn(2, QUERIES, CLASSES)).class_scores
    everything = found(scores, list(range(CLASSES)))
    things = [[pair for pair in result if pair[1] in (0, 2)][:3] for result in everything]
    assert found(scores, [0, 2], max_detections=3) == things
    assert found(scores, []) == [[], []]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_used_queries(threshold: float) -> None:
    scores = FocalScoring(CLASSES).decode(torch.randn(2, QUERIES, CLASSES) - 1).class_scores
    detections = best_detections(scores, [1, 3], max_detections=6, score_threshold=threshold)
    used = detections.used_queries(QUERIES)
    assert used.shape == (2, QUERIES)
    for image in range(2):
        queries = set(detections.of_image(image).query.tolist())
        assert set(used[image].nonzero()[:, 0].tolist()) == queries


def test_a_query_that_only_knows_stuff_is_not_a_thing_by_its_second_best_class() -> None:
    # As published: the best class of a softmax query is chosen among things and stuff.
    logits = torch.tensor([[[4.0, 1.0, 3.0, 0.0, -2.0]]])
    scores = SoftmaxScoring(CLASSES).decode(logits).class_scores
    assert found(scores, [1, 2, 3]) == [[]]
    assert [pair[:2] for pair in found(scores, [0])[0]] == [(0, 0)]


def test_pairs_of_any_class_take_part_in_the_ranking() -> None:
    """``instance_inference`` of Mask2Former as a loop: the best pairs, then the things."""
    logits = torch.randn(3, QUERIES, CLASSES + 1)
    decoded = SoftmaxScoring(CLASSES).decode(logits)
    detections = best_detections(
        decoded.probabilities, [0, 2], max_detections=9, among_all_classes=True
    )
    for image, scores in enumerate(logits.softmax(-1)[..., :-1]):
        pairs = [(scores[q, c].item(), q, c) for q in range(QUERIES) for c in range(CLASSES)]
        expected = [pair for pair in sorted(pairs, reverse=True)[:9] if pair[2] in (0, 2)]
        mine = detections.of_image(image)
        columns = (mine.scores.tolist(), mine.query.tolist(), mine.labels.tolist())
        assert list(zip(*columns, strict=True)) == expected
        assert 0 < len(expected) < 9


def test_probabilities_are_those_of_the_classes() -> None:
    logits = torch.randn(2, QUERIES, CLASSES + 1)
    probabilities = SoftmaxScoring(CLASSES).decode(logits).probabilities
    assert torch.equal(probabilities, logits.softmax(-1)[..., :-1])
    decoded = FocalScoring(CLASSES).decode(logits[..., :-1])
    assert torch.equal(decoded.probabilities, logits[..., :-1].sigmoid())


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_instances_are_sorted_by_class_score_times_mask_score(threshold: float) -> None:
    options = InferenceOptions(
        (0, 1), instance_scoring="mask2former", instance_score_threshold=threshold
    )
    decoded = SoftmaxScoring(CLASSES).decode(3 * torch.randn(1, QUERIES, CLASSES + 1))
    chosen = select_queries(decoded, options, has_masks=True)
    masks = torch.randn(QUERIES, 8, 8)
    masks[2] = -1.0  # empty
    size = (8, 8)
    result = to_result(
        chosen.of_image(0),
        decoded.scores[0],
        decoded.labels[0],
        None,
        masks[needed_masks(chosen, options)[0]],
        padded_size=size,
        image_size=size,
        output_size=size,
        options=options,
    )
    expected = []
    for query in range(QUERIES):
        inside = masks[query][masks[query] > 0]
        quality = inside.sigmoid().mean().item() if len(inside) else 0.0
        for label in (0, 1):
            score = decoded.probabilities[0, query, label].item() * quality
            if score > threshold:
                expected.append((score, label, len(inside)))
    expected.sort(reverse=True)
    instances = result["instances"]
    assert instances.scores.tolist() == pytest.approx([row[0] for row in expected])
    assert instances.pred_classes.tolist() == [row[1] for row in expected]
    areas = instances.pred_masks.flatten(1).sum(1).tolist()
    assert areas == [row[2] for row in expected]
    assert len(expected) > 1


def test_what_goes_to_the_host_in_one_transfer_arrives_as_it_was() -> None:
    logits = torch.randn(2, 300, 134)
    decoded = SoftmaxScoring(133).decode(logits)
    chosen = ChosenQueries(
        decoded.is_object, best_detections(decoded.class_scores, range(80), max_detections=100)
    )
    found, scores, labels = on_host(chosen, decoded.scores, decoded.labels)
    pairs = [
        (found.panoptic, chosen.panoptic),
        *zip(found.detections, chosen.detections, strict=True),
        (scores, decoded.scores),
        (labels, decoded.labels),
    ]
    assert len(pairs) == 7
    for mine, other in pairs:
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)
