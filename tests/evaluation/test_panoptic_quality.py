"""Panoptic quality of single images against panopticapi and hand-made counts."""

import contextlib
import io
from collections import Counter

import numpy as np
import pytest
from panopticapi.evaluation import PQStat, pq_compute_single_core

from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation.panoptic_quality import (
    PanopticError,
    Segments,
    count_image,
    image_pq_counts,
)
from helpers.panoptic_sets import (
    CATEGORIES,
    MAX_ID,
    PanopticImage,
    describe,
    random_set,
    write_panoptic,
)


def _counts(truth: PanopticImage, prediction: PanopticImage) -> PQStat:
    return image_pq_counts(
        prediction.segment_map,
        Segments.from_segments_info(prediction.segments_info),
        truth.segment_map,
        Segments.from_segments_info(truth.segments_info),
        image_name="street.png",
    )


def _published_counts(folder, truth: PanopticImage, prediction: PanopticImage) -> PQStat:
    write_panoptic(folder / "truth", [truth], CATEGORIES)
    write_panoptic(folder / "prediction", [prediction], CATEGORIES)
    annotation, predicted = (
        {"image_id": 100, "file_name": "000100.png", "segments_info": image.segments_info}
        for image in (truth, prediction)
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return pq_compute_single_core(
            0,
            [(annotation, predicted)],
            str(folder / "truth"),
            str(folder / "prediction"),
            {category["id"]: category for category in CATEGORIES},
        )


def _as_rows(counts: PQStat) -> dict[int, tuple[int, int, int, float]]:
    return {
        key: (value.tp, value.fp, value.fn, pytest.approx(value.iou, abs=1e-12))
        for key, value in counts.pq_per_cat.items()
        if value.tp + value.fp + value.fn
    }


def _image(rows: list[str], *segments: tuple[int, int, int]) -> PanopticImage:
    """A segment map from digits, with (id, category, iscrowd) per segment."""
    segment_map = np.array([[int(digit) for digit in row] for row in rows])
    infos = [
        {"id": i, "category_id": c, "iscrowd": crowd, "area": int((segment_map == i).sum())}
        for i, c, crowd in segments
    ]
    return PanopticImage(segment_map, infos)


@pytest.mark.parametrize("seed", range(25))
def test_counts_of_one_image_equal_panopticapi(tmp_path, seed):
    truths, predictions = random_set(seed, num_images=1)
    expected = _published_counts(tmp_path, truths[0], predictions[0])
    assert _as_rows(_counts(truths[0], predictions[0])) == _as_rows(expected)


def test_random_images_cover_every_kind_of_count():
    total = PQStat()
    crowd_segments = 0
    for seed in range(25):
        truths, predictions = random_set(seed, num_images=1)
        total += _counts(truths[0], predictions[0])
        crowd_segments += sum(info["iscrowd"] for info in truths[0].segments_info)
    values = list(total.pq_per_cat.values())
    assert all(value.tp > 5 and value.fp > 5 and value.fn > 5 for value in values)
    assert crowd_segments > 20


def test_id_zero_of_a_prediction_may_be_a_segment(tmp_path):
    truth = _image(["5500", "5500"], (5, 3, 0))
    prediction = _image(["0011", "0011"], (0, 3, 0), (1, 7, 0))
    expected = _published_counts(tmp_path, truth, prediction)
    assert _as_rows(_counts(truth, prediction)) == _as_rows(expected)
    assert _counts(truth, prediction)[3].tp == 1


def test_void_is_left_out_of_the_union_and_forgives_predictions():
    truth = _image(["5500000"], (5, 3, 0))
    prediction = _image(["1111222"], (1, 3, 0), (2, 3, 0))
    assert _as_rows(_counts(truth, prediction)) == {3: (1, 0, 0, 1.0)}


def test_half_on_void_is_not_forgiven():
    truth = _image(["0055"], (5, 3, 0))
    prediction = _image(["1111"], (1, 7, 0))
    assert _as_rows(_counts(truth, prediction)) == {3: (0, 0, 1, 0.0), 7: (0, 1, 0, 0.0)}


@pytest.mark.parametrize(("crowd_category", "false_positives"), [(3, 0), (90, 1)])
def test_crowd_forgives_its_own_category_only(crowd_category, false_positives):
    truth = _image(["6665"], (6, crowd_category, 1), (5, 7, 0))
    prediction = _image(["1112"], (1, 3, 0), (2, 7, 0))
    counts = _counts(truth, prediction)
    assert (counts[3].tp, counts[3].fp, counts[3].fn) == (0, false_positives, 0)
    assert counts[crowd_category].fn == 0


def test_an_iou_of_one_half_is_no_match():
    truth = _image(["5566"], (5, 3, 0), (6, 7, 0))
    prediction = _image(["1000"], (1, 3, 0))
    assert _as_rows(_counts(truth, prediction)) == {3: (0, 1, 1, 0.0), 7: (0, 0, 1, 0.0)}


def test_nothing_predicted_and_nothing_annotated():
    empty = _image(["000"])
    assert _as_rows(_counts(empty, empty)) == {}
    truth = _image(["550"], (5, 3, 0))
    assert _as_rows(_counts(truth, empty)) == {3: (0, 0, 1, 0.0)}
    assert _as_rows(_counts(empty, truth)) == {}


@pytest.mark.parametrize("error", [-1, 1])
def test_a_wrong_area_is_refused_with_image_and_segment(error):
    truth = _image(["5566"], (5, 3, 0), (6, 7, 0))
    truth.segments_info[1]["area"] += error
    with pytest.raises(
        UserError, match=r"^street\.png, segment 6: area is [13], but the PNG has 2 pixels"
    ):
        _counts(truth, _image(["1100"], (1, 3, 0)))


def test_an_area_that_is_not_stated_is_counted():
    truth = _image(["5566"], (5, 3, 0), (6, 7, 0))
    del truth.segments_info[0]["area"]
    assert _counts(truth, _image(["1100"], (1, 3, 0)))[3].iou == 1.0


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (
            [(5, 3, 0)],
            r"street\.png, segment 6: not listed in segments_info \(pixels: 2\)",
        ),
        ([(5, 3, 0), (6, 7, 0), (6, 7, 0)], "2 entries of segments_info have the id 6"),
        ([(5, 3, 0), (6, 7, 0), (0, 7, 0)], "the id 0"),
        ([(5, 3, 0), (6, 7, 0), (8, 7, 0)], "segment 8: area is 1, but the PNG has 0 pixels"),
    ],
)
def test_ground_truth_that_contradicts_itself_is_refused(segments, message):
    truth = _image(["5566"], *segments)
    truth.segments_info[-1]["area"] += segments[-1][0] == 8
    with pytest.raises(UserError, match=message):
        _counts(truth, _image(["1100"], (1, 3, 0)))


@pytest.mark.parametrize(
    ("rows", "segments", "message"),
    [
        (["1122"], [(1, 3, 0)], "segment 2 has pixels"),
        (["1100"], [(1, 3, 0), (2, 3, 0)], r"\[2\] of image street\.png have no pixels"),
        (["110"], [(1, 3, 0)], r"size \(1, 3\)"),
    ],
)
def test_predictions_that_contradict_themselves_are_refused(rows, segments, message):
    with pytest.raises(ValueError, match=message):
        _counts(_image(["5555"], (5, 3, 0)), _image(rows, *segments))


def test_negative_ids_of_a_prediction_are_refused():
    prediction = _image(["1111"], (1, 3, 0))
    prediction.segment_map[0, 0] = -1
    with pytest.raises(ValueError, match=r"the prediction for image street\.png is inconsistent"):
        _counts(_image(["5555"], (5, 3, 0)), prediction)


def _speckled(seed: int, num_segments: int) -> tuple[PanopticImage, PanopticImage]:
    """Every pixel is a run; each segment is found again, partly, with another id."""
    rng = np.random.default_rng(seed)
    ids = np.concatenate(([0], rng.choice(MAX_ID, num_segments, replace=False) + 1))
    other_ids = np.concatenate(([0], rng.choice(MAX_ID, num_segments, replace=False) + 1))
    regions = rng.integers(0, num_segments + 1, (30, 41))
    moved = rng.random(regions.shape) < rng.choice([0.1, 0.4], num_segments + 1)[regions]
    found = np.where(moved, rng.integers(0, num_segments + 1, regions.shape), regions)
    truth = describe(ids[regions], rng, [3, 7, 90, 200], crowd_share=0.25)
    prediction = describe(other_ids[found], rng, [3, 7, 90, 200], crowd_share=0.0)
    classes = {info["id"]: info["category_id"] for info in truth.segments_info}
    id_of = dict(zip(other_ids.tolist(), ids.tolist(), strict=True))
    for info in prediction.segments_info:
        if rng.random() < 0.8:
            info["category_id"] = classes.get(id_of[info["id"]], 3)
    return truth, prediction


@pytest.mark.parametrize(("seed", "num_segments"), [(0, 1), (1, 2), (2, 14), (3, 40), (4, 300)])
def test_maps_without_runs_equal_panopticapi(tmp_path, seed, num_segments):
    truth, prediction = _speckled(seed, num_segments)
    expected = _published_counts(tmp_path, truth, prediction)
    assert _as_rows(_counts(truth, prediction)) == _as_rows(expected)
    assert sum(value.tp for value in expected.pq_per_cat.values()) >= num_segments // 10


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ids_of_a_prediction_may_be_larger_than_a_png_holds(dtype):
    truth, prediction = random_set(3, num_images=1)
    truth, prediction = truth[0], prediction[0]
    largest = 2**31 - 1
    shifted = PanopticImage(
        (largest - prediction.segment_map).astype(dtype),
        [{**info, "id": largest - info["id"]} for info in prediction.segments_info],
    )
    shifted.segment_map[prediction.segment_map == 0] = 0
    assert _as_rows(_counts(truth, shifted)) == _as_rows(_counts(truth, prediction))


def test_an_image_without_pixels_has_no_counts():
    empty = PanopticImage(np.zeros((0, 5), dtype=np.int64), [])
    assert _as_rows(_counts(empty, empty)) == {}


def test_a_map_that_is_a_view_is_read_in_its_own_order():
    truth, prediction = (images[0] for images in random_set(2, num_images=1))
    turned = PanopticImage(prediction.segment_map.T.copy().T, prediction.segments_info)
    assert not turned.segment_map.flags.c_contiguous
    assert _as_rows(_counts(truth, turned)) == _as_rows(_counts(truth, prediction))


def _errors(truth: PanopticImage, prediction: PanopticImage) -> Counter[PanopticError]:
    return count_image(
        prediction.segment_map,
        Segments.from_segments_info(prediction.segments_info),
        truth.segment_map,
        Segments.from_segments_info(truth.segments_info),
        image_name="street.png",
    ).errors


@pytest.mark.parametrize(
    ("predicted", "segments", "expected"),
    [
        (["1111", "0000"], [(1, 3, 0)], [("missed", 7, None)]),
        (["1111", "2222"], [(1, 3, 0), (2, 90, 0)], [("confused", 7, 90)]),
        # IoU 1/4: the same class is a poor mask, another class two errors.
        (["1111", "2000"], [(1, 3, 0), (2, 7, 0)], [("poor_mask", 7, 7)]),
        (
            ["1111", "2000"],
            [(1, 3, 0), (2, 90, 0)],
            [("missed", 7, None), ("invented", None, 90)],
        ),
        # Two parts of one segment: the larger one is its poor mask.
        (
            ["1111", "2233"],
            [(1, 3, 0), (2, 7, 0), (3, 7, 0)],
            [("poor_mask", 7, 7), ("invented", None, 7)],
        ),
    ],
)
def test_kinds_of_errors(predicted, segments, expected):
    truth = _image(["1111", "2222"], (1, 3, 0), (2, 7, 0))
    errors = _errors(truth, _image(predicted, *segments))
    assert errors == Counter(PanopticError(*error) for error in expected)


def test_the_largest_overlap_is_the_poor_mask():
    truth = _image(["1" * 10 + "2" * 10], (1, 7, 0), (2, 7, 0))
    # IoU of segment 2: 0.43 and 0.25; of segment 1: 0.4.
    prediction = _image(["1111" + "2" * 10 + "0" * 6], (1, 7, 0), (2, 7, 0))
    assert _errors(truth, prediction) == Counter(
        PanopticError(*error)
        for error in (("poor_mask", 7, 7), ("missed", 7, None), ("invented", None, 7))
    )


def test_a_mask_below_a_tenth_is_missed_and_invented():
    truth = _image(["1" * 20], (1, 3, 0))
    errors = _errors(truth, _image(["2" + "0" * 19], (2, 3, 0)))
    assert errors == Counter([PanopticError("missed", 3, None), PanopticError("invented", None, 3)])


@pytest.mark.parametrize("seed", range(10))
def test_errors_add_up_to_the_counts(seed):
    truths, predictions = random_set(seed, num_images=1)
    counts, errors = _counts(truths[0], predictions[0]), _errors(truths[0], predictions[0])
    for key, value in counts.pq_per_cat.items():
        assert value.fn == sum(n for error, n in errors.items() if error.true_class == key)
        assert value.fp == sum(n for error, n in errors.items() if error.predicted_class == key)
