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
GOOD, BAD = [{"batch": "good"}], [{"batch": "bad"}]
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
        if outputs == BAD:
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

    def model(batch: int) -> Any:
        if batch == 1:  # only now may batch 0 be evaluated
            recorder.go_on.set()
        return GOOD

    evaluator = OverlappedEvaluator(recorder)
    assert inference_on_dataset(model, range(5), evaluator) == [0, 1, 2, 3, 4]
    assert recorder.has_gradients == [False] * 5
    assert inference_on_dataset(model, range(3), evaluator) == [0, 1, 2]


class OnGpu:
    """Stands for a tensor or for instances: a copy on the host is the thread that made it."""

    def to(self, device: str) -> threading.Thread:
        assert device == "cpu"
        return threading.current_thread()

    def cpu(self) -> threading.Thread:
        return self.to("cpu")


def test_the_first_thread_copies_from_the_gpu() -> None:
    seen: list[Any] = []

    class Keeper(DatasetEvaluator):
        def process(self, inputs: Any, outputs: Any) -> None:
            seen.extend(outputs)

    evaluator = OverlappedEvaluator(Keeper())
    segments = [{"id": 1}]
    evaluator.process([{}], [{"panoptic_seg": (OnGpu(), segments), "instances": OnGpu(), "x": 5}])
    evaluator.evaluate()
    here = threading.main_thread()
    assert seen == [{"panoptic_seg": (here, segments), "instances": here, "x": 5}]


def test_one_batch_at_most_is_on_its_way() -> None:
    recorder = Recorder()
    evaluator = OverlappedEvaluator(recorder)
    evaluator.process(0, GOOD)
    second = threading.Thread(target=evaluator.process, args=(1, GOOD))
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
    evaluator.process(0, GOOD)
    assert threading.active_count() == before + 1
    evaluator.evaluate()
    assert threading.active_count() == before


def test_an_error_surfaces_with_the_next_batch_or_at_the_end() -> None:
    recorder = Recorder()
    recorder.go_on.set()
    evaluator = OverlappedEvaluator(recorder)
    evaluator.process(0, BAD)
    with pytest.raises(UserError, match="batch 0 is bad"):
        evaluator.process(1, GOOD)
    evaluator.process(2, BAD)
    with pytest.raises(UserError, match="batch 2 is bad"):
        evaluator.evaluate()
    evaluator.process(3, BAD)
    evaluator.reset()
    evaluator.process(4, GOOD)
    assert evaluator.evaluate() == [4]
