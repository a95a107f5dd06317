"""The panoptic evaluator in two real processes, and the files it writes."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from panopticapi.evaluation import pq_compute

from batchformer_panoptic.engine.processes import launch_processes
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation import PanopticEvaluator
from helpers.panoptic_sets import (
    CATEGORIES,
    model_inputs,
    model_output,
    random_set,
    registered,
    write_panoptic,
)

NUM_IMAGES = 5


def _evaluate_a_share(folder: Path) -> None:
    """Evaluate every other image; the second process repeats the first image at its end."""
    torch.set_num_threads(1)
    rank = comm.get_rank()
    truths, predictions = random_set(20, num_images=NUM_IMAGES)
    mine = [*range(rank, NUM_IMAGES, 2), *([0] if rank else [])]
    inputs = model_inputs(NUM_IMAGES)
    with registered("pq_set", folder / f"truth_{rank}", truths) as name:
        evaluator = PanopticEvaluator(name)
        for index in mine:
            evaluator.process([inputs[index]], [model_output(predictions[index])])
        results = evaluator.evaluate()
    (folder / f"results_{rank}.json").write_text(json.dumps(results))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_panopticapi_numbers(tmp_path):
    launch_processes(_evaluate_a_share, 2, args=(tmp_path,))
    truths, predictions = random_set(20, num_images=NUM_IMAGES)
    truth_json = write_panoptic(tmp_path / "truth", truths, CATEGORIES)
    prediction_json = write_panoptic(tmp_path / "predicted", predictions, CATEGORIES)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = pq_compute(str(truth_json), str(prediction_json))
    assert json.loads((tmp_path / "results_1.json").read_text()) == {}
    metrics = json.loads((tmp_path / "results_0.json").read_text())["panoptic_seg"]
    for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for key in ("pq", "sq", "rq"):
            found = metrics[key.upper() + suffix] / 100
            assert found == pytest.approx(expected[group][key], abs=1e-12)


@pytest.mark.parametrize("has_folder", [False, True])
def test_nothing_but_results_and_examples_is_written(tmp_path, monkeypatch, has_folder):
    truths, predictions = random_set(21, num_images=2)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out"
    outputs = [model_output(prediction) for prediction in predictions]
    with registered("pq_set", tmp_path / "truth", truths) as name:
        before = set(tmp_path.rglob("*"))
        evaluator = PanopticEvaluator(name, str(folder) if has_folder else None)
        evaluator.process(model_inputs(2), outputs)
        assert evaluator.evaluate()
        written = set(tmp_path.rglob("*")) - before
    names = {path.relative_to(folder).as_posix() for path in written - {folder}}
    roles = enumerate(("first", "first", "worst", "worst"))
    pictures = {f"examples/{number:02d}_{role}.png" for number, role in roles}
    assert names == ({"panoptic_results.json", "examples"} | pictures if has_folder else set())


def test_an_area_that_gives_panopticapi_an_iou_above_1_is_refused(tmp_path):
    truths, _ = random_set(22, num_images=1)
    image = truths[0]
    image.segments_info = [{**info, "iscrowd": 0} for info in image.segments_info]
    outputs = [model_output(image)]
    prediction_json = write_panoptic(tmp_path / "predicted", [image], CATEGORIES)
    image.segments_info = [
        {**info, "area": max(1, info["area"] // 2)} for info in image.segments_info
    ]
    with registered("pq_set", tmp_path / "truth", truths) as name:
        with contextlib.redirect_stdout(io.StringIO()):
            published = pq_compute(str(tmp_path / "truth.json"), str(prediction_json))
        assert published["All"]["pq"] > 1
        with pytest.raises(
            UserError, match=r"the PNG has .* pixels; panopticapi divides by the stated area"
        ):
            PanopticEvaluator(name).process(model_inputs(1), outputs)
