"""The evaluator in a second thread: equal results, overlap, order, a bound, and errors."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset

from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation import OverlappedEvaluator, PanopticEvaluator
from batchformer_panoptic.evaluation.panoptic_evaluator import RESULTS_NAME
from helpers.panoptic_sets import model_inputs, model_output, random_set, registered

INPUTS = model_inputs(7)
SECONDS = 20.0  # until a thread that waits in vain gives up


class Recorder(DatasetEvaluator):
    """Waits in each batch until ``go_on`` is set, and fails where a batch is "bad"."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.finished: list[Any] = []
        self.has_gradients: list[bool] = []

    def process(self, inputs: Any, outputs: Any) -> None:
        assert self.go_on.wait(SECONDS)
        self.has_gradients.append(torch.is_grad_enabled())
        if outputs == "bad":
            raise UserError(f"batch {inputs} is bad")
        self.finished.append(inputs)

    def reset(self) -> None:
        self.finished = []

    def evaluate(self) -> Any:
        return self.finished


def test_results_and_files_are_those_of_the_evaluator(tmp_path: Path) -> None:
    truths, predictions = random_set(0, num_images=7)
    outputs = {row["image_id"]: model_output(x) for row, x in zip(INPUTS, predictions, strict=True)}
    found = []
    with registered("overlapped", tmp_path / "truth", truths) as name:
        for folder in (tmp_path / "usual", tmp_path / "overlapped"):
            evaluator: DatasetEvaluator = PanopticEvaluator(name, str(folder))
            if folder.name == "overlapped":
                evaluator = OverlappedEvaluator(evaluator)
            results = inference_on_dataset(
                lambda batch: [outputs[row["image_id"]] for row in batch],
                [INPUTS[:3], INPUTS[3:6], INPUTS[6:]],
                evaluator,
            )
            found.append((results, (folder / RESULTS_NAME).read_text()))
    assert "PQ" in found[0][0]["panoptic_seg"]
    assert found[0] == found[1]


def test_the_next_prediction_does_not_wait_for_the_evaluator() -> None:
    recorder = Recorder()

    def model(batch: int) -> str:
        if batch == 1:  # only now may batch 0 be evaluated
            recorder.go_on.set()
        return "good"

    evaluator = OverlappedEvaluator(recorder)
    assert inference_on_dataset(model, range(5), evaluator) == [0, 1, 2, 3, 4]
    assert recorder.has_gradients == [False] * 5
    assert inference_on_dataset(model, range(3), evaluator) == [0, 1, 2]


def test_one_batch_at_most_is_on_its_way() -> None:
    recorder = Recorder()
    evaluator = OverlappedEvaluator(recorder)
    evaluator.process(0, "good")
    second = threading.Thread(target=evaluator.process, args=(1, "good"))
    second.start()
    time.sleep(0.1)
    assert second.is_alive()
    recorder.go_on.set()
    second.join(SECONDS)
    assert not second.is_alive()
    assert evaluator.evaluate() == [0, 1]


def test_the_thread_ends_with_the_evaluation() -> None:
    before = threading.active_count()
    recorder = Recorder()
    recorder.go_on.set()
    evaluator = OverlappedEvaluator(recorder)
    evaluator.process(0, "good")
    assert threading.active_count() == before + 1
    evaluator.evaluate()
    assert threading.active_count() == before


def test_an_error_surfaces_with_the_next_batch_or_at_the_end() -> None:
    recorder = Recorder()
    recorder.go_on.set()
    evaluator = OverlappedEvaluator(recorder)
    evaluator.process(0, "bad")
    with pytest.raises(UserError, match="batch 0 is bad"):
        evaluator.process(1, "good")
    evaluator.process(2, "bad")
    with pytest.raises(UserError, match="batch 2 is bad"):
        evaluator.evaluate()
    evaluator.process(3, "bad")
    evaluator.reset()
    evaluator.process(4, "good")
    assert evaluator.evaluate() == [4]
