"""The panoptic evaluator against panopticapi and Detectron2, in one and several processes."""

import contextlib
import copy
import gc
import io
import json
import logging
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from detectron2.engine.hooks import EvalHook
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import COCOPanopticEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils.events import EventStorage
from panopticapi.evaluation import pq_compute

from batchformer_panoptic.data.segment_maps import read_segment_map
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation import PanopticEvaluator, PanopticQuality, Segments
from batchformer_panoptic.evaluation import panoptic_evaluator as module
from batchformer_panoptic.evaluation.panoptic_quality import count_image
from helpers.panoptic_sets import (
    CATEGORIES,
    PanopticImage,
    model_inputs,
    model_output,
    quality_from_json,
    random_set,
    registered,
    resize_png,
    without_crowd,
    write_panoptic,
)

ROLES = ("first", "worst", "best")


def _evaluate(evaluator, inputs, outputs):
    """Run through Detectron2's own loop, two images at a time."""
    batches = [inputs[i : i + 2] for i in range(0, len(inputs), 2)]
    remaining = list(outputs)

    def model(batch):
        return [remaining.pop(0) for _ in batch]

    return inference_on_dataset(model, batches, evaluator)


def _outputs(images: list[PanopticImage]):
    return [model_output(image) for image in images]


@pytest.mark.parametrize("seed", range(4))
def test_results_equal_panopticapi_on_files(tmp_path, seed):
    truths, predictions = random_set(seed, num_images=5)
    prediction_json = write_panoptic(tmp_path / "predicted", predictions, CATEGORIES)
    with registered("pq_set", tmp_path / "truth", truths) as name:
        evaluator = PanopticEvaluator(name, str(tmp_path / "out"))
        results = _evaluate(evaluator, model_inputs(5), _outputs(predictions))
    with contextlib.redirect_stdout(io.StringIO()):
        expected = pq_compute(str(tmp_path / "truth.json"), str(prediction_json))
    quality = quality_from_json(json.loads((tmp_path / "out/panoptic_results.json").read_text()))
    groups = {"All": quality.all, "Things": quality.things, "Stuff": quality.stuff}
    suffixes = {"All": "", "Things": "_th", "Stuff": "_st"}
    for group, value in groups.items():
        for key in ("pq", "sq", "rq"):
            assert getattr(value, key) == pytest.approx(expected[group][key], abs=1e-12)
            metric = results["panoptic_seg"][key.upper() + suffixes[group]]
            assert metric == pytest.approx(100 * expected[group][key], abs=1e-10)
        assert value.num_classes == expected[group]["n"]
    for row in quality.per_class[:-1]:
        assert row.pq == pytest.approx(expected["per_class"][row.category_id]["pq"], abs=1e-12)
        assert row.sq == pytest.approx(expected["per_class"][row.category_id]["sq"], abs=1e-12)
    assert quality.per_class[-1].name == "never seen"
    assert quality.per_class[-1].pq is None


def test_a_png_of_another_size_than_the_image_is_one_line(tmp_path):
    truths, predictions = random_set(0, num_images=1)
    with registered("pq_set", tmp_path / "truth", truths) as name:
        resize_png(tmp_path / "truth" / "000100.png")
        expected = r"truth\.json: .*000100\.png is 5x7, but its image is 56x40$"
        with pytest.raises(UserError, match=expected):
            PanopticEvaluator(name).process(model_inputs(1), _outputs(predictions))


def test_results_equal_detectron2_evaluator(tmp_path):
    truths, predictions = random_set(6, num_images=3)
    with registered("pq_set", tmp_path / "truth", truths) as name:
        ours = _evaluate(PanopticEvaluator(name), model_inputs(3), _outputs(predictions))
        inputs = [{**row, "file_name": f"{row['image_id']:06d}.jpg"} for row in model_inputs(3)]
        theirs = _evaluate(
            COCOPanopticEvaluator(name, str(tmp_path / "d2")), inputs, _outputs(predictions)
        )
    assert ours["panoptic_seg"] == pytest.approx(theirs["panoptic_seg"], abs=1e-10)


def test_perfect_prediction_scores_100(tmp_path):
    truths, _ = random_set(7, num_images=3)
    perfect = _outputs([without_crowd(truth) for truth in truths])
    with registered("pq_set", tmp_path / "truth", truths) as name:
        results = _evaluate(PanopticEvaluator(name), model_inputs(3), perfect)
    assert set(results["panoptic_seg"]) == {
        metric + suffix for metric in ("PQ", "SQ", "RQ") for suffix in ("", "_th", "_st")
    }
    assert list(results["panoptic_seg"].values()) == [100.0] * 9


@pytest.mark.parametrize(
    ("category_ids", "missing", "suffix", "label"),
    [((3, 90), "stuff", "_st", "Stuff"), ((7, 200), "things", "_th", "Things")],
)
def test_a_group_without_classes_is_not_available(
    tmp_path, caplog, category_ids, missing, suffix, label
):
    truths, predictions = random_set(8, num_images=2, category_ids=category_ids)
    with registered("pq_set", tmp_path / "truth", truths) as name, caplog.at_level(logging.INFO):
        evaluator = PanopticEvaluator(name, str(tmp_path))
        results = _evaluate(evaluator, model_inputs(2), _outputs(predictions))
        print_csv_format(results)
    assert not [metric for metric in results["panoptic_seg"] if metric.endswith(suffix)]
    assert len(results["panoptic_seg"]) == 6
    assert json.loads((tmp_path / "panoptic_results.json").read_text())[missing] is None
    row = next(line for line in caplog.text.splitlines() if line.startswith(f"| {label}"))
    assert row.split("|")[2:5] == pytest.approx([row.split("|")[2]] * 3)
    assert row.count("n/a") == 3


def test_results_pass_detectron2_evaluation_hook(tmp_path):
    truths, predictions = random_set(8, num_images=2, category_ids=(3, 90))
    with registered("pq_set", tmp_path / "truth", truths) as name:
        results = _evaluate(PanopticEvaluator(name), model_inputs(2), _outputs(predictions))
    trainer = TrainerBase()
    hook = EvalHook(1, lambda: results)
    hook.trainer = trainer
    with EventStorage() as trainer.storage:
        hook._do_eval()
        stored = {key: value for key, (value, _) in trainer.storage.latest().items()}
    assert stored == {f"panoptic_seg/{k}": v for k, v in results["panoptic_seg"].items()}


def test_model_output_is_not_modified(tmp_path):
    truths, predictions = random_set(9, num_images=2)
    outputs = _outputs(predictions)
    before = copy.deepcopy(outputs)
    with registered("pq_set", tmp_path / "truth", truths) as name:
        evaluator = PanopticEvaluator(name, str(tmp_path / "o"))
        evaluator.process(model_inputs(2), outputs)
        evaluator.evaluate()
    for output, copied in zip(outputs, before, strict=True):
        assert torch.equal(output["panoptic_seg"][0], copied["panoptic_seg"][0])
        assert output["panoptic_seg"][1] == copied["panoptic_seg"][1]


def _evaluate_in_processes(monkeypatch, name, shares, predictions, output_dir=None):
    """Gather the parts of several processes, each with its share of image numbers."""
    gathered = []

    def gather(part):
        gathered.append(pickle.loads(pickle.dumps(part)))
        return list(gathered)

    monkeypatch.setattr(module.comm, "gather", gather)
    outputs, inputs = _outputs(predictions), model_inputs(len(predictions))
    for rank, share in enumerate(shares):
        is_last = rank == len(shares) - 1
        monkeypatch.setattr(module.comm, "is_main_process", lambda is_last=is_last: is_last)
        evaluator = PanopticEvaluator(name, output_dir)
        evaluator.process([inputs[i] for i in share], [outputs[i] for i in share])
        results = evaluator.evaluate()
        assert bool(results) == is_last
    return results


@pytest.mark.parametrize("num_recent", [1, 16])
@pytest.mark.parametrize(
    "shares",
    [
        [[0, 1, 2], [3, 4]],
        [[0, 2, 4], [1, 3, 0]],  # padded to equal shares, the repetition last
        [[0, 1, 0, 2, 2, 3, 4], []],
    ],
)
def test_processes_together_equal_one(tmp_path, monkeypatch, shares, num_recent):
    truths, predictions = random_set(10, num_images=5)
    monkeypatch.setattr(module, "_NUM_RECENT", num_recent)
    with registered("pq_set", tmp_path / "truth", truths) as name:
        expected = _evaluate(PanopticEvaluator(name), model_inputs(5), _outputs(predictions))
        together = _evaluate_in_processes(monkeypatch, name, shares, predictions)
    assert together["panoptic_seg"] == pytest.approx(expected["panoptic_seg"], abs=1e-10)


@pytest.mark.parametrize("shares", [[range(12)], [range(0, 12, 2), [*range(1, 12, 2), 0]]])
def test_examples_are_the_first_worst_and_best_images(tmp_path, monkeypatch, shares):
    truths, predictions = random_set(20, num_images=12)
    with registered("pq_set", tmp_path / "truth", truths) as name:
        _evaluate_in_processes(monkeypatch, name, shares, predictions, str(tmp_path / "out"))
    pqs = {
        100 + index: count_image(
            prediction.segment_map,
            Segments.from_segments_info(prediction.segments_info),
            truth.segment_map,
            Segments.from_segments_info(truth.segments_info),
            image_name="",
        ).mean_pq()
        for index, (truth, prediction) in enumerate(zip(truths, predictions, strict=True))
    }
    order = sorted(pqs, key=pqs.__getitem__)
    rows = json.loads((tmp_path / "out/panoptic_results.json").read_text())["examples"]
    found = {role: [row["image_id"] for row in rows if row["role"] == role] for role in ROLES}
    assert found == {
        "first": [100, 101, 102, 103],
        "worst": order[:4],
        "best": order[:-5:-1],
    }
    for row in rows:
        assert row["pq"] == pqs[row["image_id"]]
        prediction = predictions[row["image_id"] - 100]
        written = read_segment_map(tmp_path / "out" / row["png"])
        assert (written == prediction.segment_map).all()
        classes = {info["id"]: info["category_id"] for info in row["segments_info"]}
        assert classes == {info["id"]: info["category_id"] for info in prediction.segments_info}


def test_processes_that_evaluate_the_same_images_are_refused(tmp_path, monkeypatch):
    truths, predictions = random_set(11, num_images=3)
    monkeypatch.setattr(module, "_NUM_RECENT", 1)
    with (
        registered("pq_set", tmp_path / "truth", truths) as name,
        pytest.raises(UserError, match="same 2 images, such as 100"),
    ):
        _evaluate_in_processes(monkeypatch, name, [[0, 1, 2], [0, 1, 2]], predictions)


@pytest.mark.parametrize("num_recent", [0, 16])
def test_a_second_evaluation_starts_from_nothing(tmp_path, monkeypatch, num_recent):
    monkeypatch.setattr(module, "_NUM_RECENT", num_recent)
    truths, predictions = random_set(12, num_images=2)
    with registered("pq_set", tmp_path / "truth", truths) as name:
        evaluator = PanopticEvaluator(name)
        first = _evaluate(evaluator, model_inputs(2), _outputs(predictions))
        again = _evaluate(evaluator, model_inputs(2), _outputs(predictions))
        best = [without_crowd(truth) for truth in truths]
        perfect = _evaluate(evaluator, model_inputs(2), _outputs(best))
    assert first == again
    assert perfect["panoptic_seg"]["PQ"] == 100.0


def test_a_subset_is_refused_unless_allowed(tmp_path, caplog):
    truths, predictions = random_set(13, num_images=3)
    with registered("pq_set", tmp_path / "truth", truths) as name:
        evaluator = PanopticEvaluator(name)
        with pytest.raises(UserError, match=r"1 of the 3 images of pq_set were not .* id 102"):
            _evaluate(evaluator, model_inputs(2), _outputs(predictions))
        evaluator = PanopticEvaluator(name, str(tmp_path), allow_subset=True)
        _evaluate(evaluator, model_inputs(2), _outputs(predictions))
    assert "1 of the 3 images" in caplog.text
    content = json.loads((tmp_path / "panoptic_results.json").read_text())
    assert (content["num_images"], content["num_images_of_dataset"]) == (2, 3)


def test_counts_kept_do_not_grow_with_images(tmp_path):
    truths, predictions = random_set(14, num_images=1)
    num_images = 3 * module._NUM_RECENT
    with registered("pq_set", tmp_path / "truth", truths * num_images) as name:
        evaluator = PanopticEvaluator(name)
        evaluator.process(model_inputs(num_images), _outputs(predictions * num_images))
        assert len(evaluator._recent) == module._NUM_RECENT
        one = PanopticEvaluator(name, allow_subset=True)
        one.process(model_inputs(1), _outputs(predictions))
        many, single = evaluator.evaluate(), one.evaluate()
    assert many["panoptic_seg"] == pytest.approx(single["panoptic_seg"], abs=1e-10)


def test_memory_held_is_ids_and_counts(tmp_path):
    truths, predictions = random_set(14, num_images=1)
    num_images = 220
    with registered("pq_set", tmp_path / "truth", truths * num_images) as name:
        evaluator = PanopticEvaluator(name)
        inputs = model_inputs(num_images)
        held = []
        tracemalloc.start()
        try:
            for number in range(num_images):
                evaluator.process([inputs[number]], [model_output(predictions[0])])
                if number in (19, num_images - 1):
                    gc.collect()
                    held.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    # A segment map of these has 9 kB, its segment list 2 kB
    assert held[1] - held[0] < 200 * 500


def test_wrong_predictions_get_a_clear_error(tmp_path):
    truths, predictions = random_set(15, num_images=1)
    output = model_output(predictions[0])
    segment_map, segments_info = output["panoptic_seg"]
    unknown_class = [{**segments_info[0], "category_id": 5}, *segments_info[1:]]
    wrong = [
        (model_inputs(1), {"panoptic_seg": (segment_map, None)}, "label_divisor"),
        (model_inputs(1), {"instances": None}, "a model that predicts masks"),
        (
            model_inputs(1),
            {"panoptic_seg": (segment_map, unknown_class)},
            "class 5, .* classes 0 to 4",
        ),
        ([{"image_id": 7}], output, "image 7 is not annotated"),
    ]
    with registered("pq_set", tmp_path / "truth", truths) as name:
        evaluator = PanopticEvaluator(name)
        for inputs, bad_output, message in wrong:
            with pytest.raises(UserError, match=message):
                evaluator.process(inputs, [bad_output])


def test_a_wrong_area_names_the_image(tmp_path):
    truths, predictions = random_set(16, num_images=1)
    counted = [info for info in truths[0].segments_info if not info["iscrowd"]]
    counted[0]["area"] -= 1
    with registered("pq_set", tmp_path / "truth", truths) as name:
        evaluator = PanopticEvaluator(name)
        with pytest.raises(UserError, match=rf"000100\.png .*segment {counted[0]['id']}: area is"):
            evaluator.process(model_inputs(1), _outputs(predictions))


def test_quality_survives_json():
    rng = np.random.default_rng(0)
    counts = module.PQStat()
    for category in CATEGORIES[:3]:
        counts[category["id"]].tp, counts[category["id"]].fn = 3, 1
        counts[category["id"]].iou = 3 * rng.random()
    quality = PanopticQuality.from_counts(counts, {row["id"]: row for row in CATEGORIES})
    assert quality_from_json(json.loads(json.dumps(quality.to_json()))) == quality
    assert quality.per_class[0].rq == pytest.approx(3 / 3.5)
    assert "n/a" in quality.class_table()
