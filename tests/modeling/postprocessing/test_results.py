"""The detections of an image against the published post-processing, written as loops."""

import pytest
import torch
from torch import Tensor

from batchformer_panoptic.modeling.postprocessing.results import (
    ChosenQueries,
    best_detections,
    on_host,
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
