"""Evaluation of a batch in a second thread, while the model predicts the next one."""

import concurrent.futures
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator


class OverlappedEvaluator(DatasetEvaluator):
    """An evaluator with the same results, whose `process` returns before it is done.

    Batches are processed one after the other, in their order. At most one is on its way, so that no
    more than two batches of predictions are held. Segment maps and instances are copied from a GPU
    first, which leaves its memory to the model. A second thread is sufficient because decoding,
    numpy and PyTorch release Python's lock.

    Args:
        evaluator: called in the second thread for `process` only.
    """

    def __init__(self, evaluator: DatasetEvaluator) -> None:
        self.evaluator = evaluator
        self._thread: ThreadPoolExecutor | None = None
        self._on_its_way: Future[None] | None = None

    def reset(self) -> None:
        """Forget all batches, and the error of one that was not asked for."""
        if self._on_its_way is not None:
            concurrent.futures.wait([self._on_its_way])
            self._on_its_way = None
        self.evaluator.reset()

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Start to process a batch; raise the error of the batch before it."""
        self._finish()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "evaluator")
        self._on_its_way = self._thread.submit(self._process, inputs, list(map(_on_host, outputs)))

    # Gradients are a setting of a thread.
    @torch.no_grad()
    def _process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        self.evaluator.process(inputs, outputs)

    def _finish(self) -> None:
        last, self._on_its_way = self._on_its_way, None
        if last is not None:
            last.result()

    def evaluate(self) -> Any:
        """Finish the last batch and return the results; raise its error, if there is one.

        The thread ends, so that loaders can start their worker processes.
        """
        self._finish()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        return self.evaluator.evaluate()


def _on_host(output: Mapping[str, Any]) -> dict[str, Any]:
    copied = dict(output)
    if "instances" in copied:
        copied["instances"] = copied["instances"].to("cpu")
    if "panoptic_seg" in copied:
        segment_map, segments = copied["panoptic_seg"]
        copied["panoptic_seg"] = (segment_map.cpu(), segments)
    return copied
