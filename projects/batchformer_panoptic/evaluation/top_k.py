"""Top-1 and top-5 accuracy of image classification."""

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..data.io import write_json
from ..errors import NonFiniteError, UserError

logger = logging.getLogger(__name__)

RESULTS_NAME = "classification_results.json"


class TopKEvaluator(DatasetEvaluator):
    """Share of images whose true class has the highest score, or one of the five highest.

    Only the rank of the true class is kept per image: the number of classes with a higher score.
    Among equal scores the lower class id is ranked first; NaN ranks above the true class. Every
    image counts once, even if samplers repeat it.

    With five classes or fewer, "top5" would always be 100 % and is left out.

    A model output must have ``class_logits``: (K,) float scores in the order of the classes.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, *, allow_subset: bool = False
    ) -> None:
        """List the images of the data set and their labels.

        Args:
            dataset_name: a registered image folder.
            output_dir: for ``classification_results.json``; None: no file is written.
            allow_subset: accept that images of the data set are not evaluated.
        """
        self._name = dataset_name
        self._classes: list[str] = list(MetadataCatalog.get(dataset_name).classes)
        self._labels: dict[int, int] = {
            record["image_id"]: record["label"] for record in DatasetCatalog.get(dataset_name)
        }
        self._output_dir = output_dir
        self._allow_subset = allow_subset
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._ranks: dict[int, int] = {}

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Store the ranks of a batch, with one transfer from the device.

        Args:
            inputs: the model's inputs, of which ``image_id`` is read.
            outputs: the model's outputs, of which ``class_logits`` is read.

        Raises:
            UserError: an unusable output, or an image of another data set.
            NonFiniteError: the logit of a true class is NaN.
        """
        image_ids = [image_input["image_id"] for image_input in inputs]
        for image_id, output in zip(image_ids, outputs, strict=True):
            self._check_output(image_id, output)
        logits = torch.stack([output["class_logits"] for output in outputs]).float()
        labels = torch.tensor([self._labels[i] for i in image_ids], device=logits.device)
        ranks = true_class_ranks(logits, labels).tolist()
        spoiled = [i for i, rank in zip(image_ids, ranks, strict=True) if rank == logits.shape[1]]
        if spoiled:
            raise NonFiniteError(
                f"the class logits of images {', '.join(map(str, spoiled))} are NaN: the weights "
                "are damaged, or too large for the precision of the evaluation"
            )
        self._ranks.update(zip(image_ids, ranks, strict=True))

    def _check_output(self, image_id: int, output: Mapping[str, Any]) -> None:
        if image_id not in self._labels:
            raise UserError(
                f"image {image_id} is not in the data set {self._name}; evaluate on the data set "
                "that the images come from"
            )
        if "class_logits" not in output:
            raise UserError(
                f"the model does not classify images, as the data set {self._name} needs: use an "
                "ImageClassifier"
            )
        shape = tuple(output["class_logits"].shape)
        if shape != (len(self._classes),):
            raise UserError(
                f"the scores of image {image_id} have the shape {shape}, but the data set "
                f"{self._name} has {len(self._classes)} classes; evaluate on a data set with the "
                "model's classes"
            )

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Gather all processes, report, and write the file; every process has to call it.

        Returns:
            ``{"classification": {"top1", "top5"}}`` in percent on the main process, "top5" with
            more than five classes; empty elsewhere.

        Raises:
            UserError: images of the data set were not evaluated.
        """
        comm.synchronize()
        parts = comm.gather(self._ranks)
        if not comm.is_main_process():
            return OrderedDict()
        ranks = {image_id: rank for part in parts for image_id, rank in part.items()}
        self._check_complete(ranks)
        metrics = self._metrics(np.array(list(ranks.values())))
        shown = {"top1": "n/a", "top5": "n/a"} | {k: f"{v:.2f}" for k, v in metrics.items()}
        logger.info(
            f"Accuracy on {len(ranks)} images: top-1 {shown['top1']}, top-5 {shown['top5']}"
        )
        self._write_results(ranks, metrics)
        return OrderedDict(classification=metrics)

    def _metrics(self, ranks: np.ndarray) -> dict[str, float]:
        return {
            f"top{k}": 100.0 * float((ranks < k).mean())
            for k in (1, 5)
            if len(self._classes) > k or k == 1
        }

    def _check_complete(self, ranks: Mapping[int, int]) -> None:
        missing = [image_id for image_id in self._labels if image_id not in ranks]
        if not missing:
            return
        message = (
            f"{len(missing)} of the {len(self._labels)} images of {self._name} were not evaluated, "
            f"the first with the id {missing[0]}"
        )
        if not self._allow_subset or not ranks:
            raise UserError(f"{message}; run the model on the whole data set or allow a subset")
        logger.warning(f"{message}: the accuracy is that of a subset")

    def _write_results(self, ranks: Mapping[int, int], metrics: Mapping[str, float]) -> None:
        if self._output_dir is None:
            return
        correct, images = np.zeros((2, len(self._classes)), int)
        for image_id, rank in ranks.items():
            images[self._labels[image_id]] += 1
            correct[self._labels[image_id]] += rank == 0
        content = {
            "dataset": self._name,
            "num_images": len(ranks),
            "num_images_of_dataset": len(self._labels),
            **metrics,
            "per_class": [
                {"name": name, "num_images": int(total), "num_top1": int(right)}
                for name, total, right in zip(self._classes, images, correct, strict=True)
            ],
        }
        write_json(os.path.join(self._output_dir, RESULTS_NAME), content, indent=1)


def true_class_ranks(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count the classes that rank above the true one.

    Args:
        logits: (B, K) float.
        labels: (B,) int64 in [0, K).

    Returns:
        (B,) int64 in [0, K]; K only if scores are NaN.
    """
    true = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    ahead = ~(logits <= true)  # also if one of the two is NaN
    ahead |= (logits == true) & (classes < labels[:, None])
    return ahead.sum(1)
