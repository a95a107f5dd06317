"""Box and mask AP for the things of a panoptic data set, by Detectron2's COCO evaluator."""

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from .panoptic_ground_truth import PanopticGroundTruth
from .thing_annotations import cached_thing_annotations

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")


class ThingAPEvaluator(DatasetEvaluator):
    """COCO AP of predicted instances against the things of a panoptic data set.

    The truth is the data set's own instances JSON (metadata ``json_file``) where that file exists,
    as in the published evaluation on COCO, and is otherwise made from the panoptic annotation.
    Detectron2's evaluator wants classes without gaps; predicted classes are renumbered among the
    things for it, and predicted stuff is left out. Model outputs are not modified.
    """

    def __init__(self, dataset_name: str, output_dir: str, tasks: Sequence[str] = TASKS) -> None:
        """Prepare the annotations.

        Args:
            dataset_name: a registered panoptic data set with one id space for things and stuff and
                at least one thing class.
            output_dir: for the annotations made, the predictions and Detectron2's result files.
            tasks: "bbox" and, if the model predicts masks, "segm".
        """
        metadata = MetadataCatalog.get(dataset_name)
        truth = PanopticGroundTruth(metadata)
        if not truth.thing_ids:
            raise UserError(f"the data set {dataset_name} has no thing classes to measure AP of")
        json_file = _existing_instances_json(metadata.get("json_file"), truth)
        if json_file is None:
            json_file = _shared_thing_annotations(truth, output_dir)
        self._image_ids = list(truth.images)
        self._thing_class = _renumbering(truth)
        self._evaluator = _coco_evaluator(truth, json_file, output_dir, tuple(tasks))

    def reset(self) -> None:
        """Forget all images."""
        self._evaluator.reset()

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Keep the things of a batch as run-length codes.

        Args:
            inputs: the model's inputs, of which ``image_id`` is read.
            outputs: the model's outputs, of which ``instances`` is read: ``pred_boxes``,
                ``scores``, contiguous ``pred_classes``, and ``pred_masks`` for the task "segm".
        """
        things = [
            {"instances": _things_only(output["instances"], self._thing_class)}
            for output in outputs
        ]
        self._evaluator.process(inputs, things)

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Run the COCO evaluation; every process has to call it.

        Returns:
            ``{"bbox": {"AP", "AP50", ...}, "segm": {...}}`` in percent on the main process,
            empty elsewhere. Detectron2 gives NaN for what has no truth or no prediction at all.
        """
        return OrderedDict(self._evaluator.evaluate(img_ids=self._image_ids) or {})


def _shared_thing_annotations(truth: PanopticGroundTruth, output_dir: str) -> str:
    """Let the main process write the annotations, and the others find them."""
    if comm.is_main_process():
        cached_thing_annotations(truth, output_dir)
    comm.synchronize()
    return cached_thing_annotations(truth, output_dir)


def _existing_instances_json(path: str | None, truth: PanopticGroundTruth) -> str | None:
    """Accept the instances JSON of the metadata if it exists and has the same things."""
    if not path or not os.path.isfile(PathManager.get_local_path(path)):
        return None
    with PathManager.open(path) as file:
        categories = json.load(file)["categories"]
    if sorted(category["id"] for category in categories) != truth.thing_ids:
        raise UserError(
            f"the categories of {path} are not the things of {truth.json_file}; register the data "
            "set without an instances JSON, AP then uses the panoptic annotation"
        )
    logger.info("AP of things is measured on the instance annotations %s", path)
    return path


def _renumbering(truth: PanopticGroundTruth) -> torch.Tensor:
    """Map contiguous class ids to positions among the things, -1 for stuff; (classes,) int64."""
    thing_class = torch.full((max(truth.dataset_ids) + 1,), -1, dtype=torch.int64)
    position = {dataset_id: index for index, dataset_id in enumerate(truth.thing_ids)}
    for contiguous_id, dataset_id in truth.dataset_ids.items():
        thing_class[contiguous_id] = position.get(dataset_id, -1)
    return thing_class


def _things_only(instances: Instances, thing_class: torch.Tensor) -> Instances:
    """Copy ``instances`` to the CPU, without stuff and with classes numbered among the things."""
    things = instances.to("cpu")  # always a new object
    classes = thing_class[things.pred_classes]
    is_thing = classes >= 0
    if not is_thing.all():
        things = things[is_thing]
    things.pred_classes = classes[is_thing]
    return things


def _coco_evaluator(
    truth: PanopticGroundTruth, json_file: str, output_dir: str, tasks: tuple[str, ...]
) -> COCOEvaluator:
    """Build Detectron2's evaluator, which takes all it needs from the catalog by name."""
    name = f"{truth.name} (things)"
    metadata = MetadataCatalog.get(name)
    metadata.set(
        json_file=json_file,
        thing_classes=[truth.categories[key]["name"] for key in truth.thing_ids],
        thing_dataset_id_to_contiguous_id={key: i for i, key in enumerate(truth.thing_ids)},
    )
    try:
        return COCOEvaluator(
            name, tasks=tasks, distributed=True, output_dir=output_dir, use_fast_impl=False
        )
    finally:
        MetadataCatalog.pop(name)  # the evaluator holds the metadata; the catalog is the user's
