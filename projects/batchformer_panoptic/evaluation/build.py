"""Builds the evaluators for the format of a data set."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from ..data.io import read_json
from ..errors import UserError
from .coco_ap import ThingAPEvaluator, build_box_evaluator
from .panoptic_evaluator import RESULTS_NAME as PANOPTIC_RESULTS
from .panoptic_evaluator import PanopticEvaluator
from .semantic_evaluator import SemanticEvaluator
from .top_k import RESULTS_NAME as TOP_K_RESULTS
from .top_k import TopKEvaluator

logger = logging.getLogger(__name__)


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """Build the evaluators that fit a registered data set and the model's outputs.

    Args:
        cfg: ``MODEL.MASK_ON`` (whether the model predicts masks), and
            ``MODEL.PANOPTIC.INSTANCES_TEST`` and ``SEMANTIC_TEST`` (whether it also returns
            instances and class scores of pixels) are read.
        dataset_name: a registered data set; its metadata ``evaluator_type`` selects the evaluators:
            "coco_panoptic_seg" (panoptic quality, AP for things and mean IoU; AP of boxes only
            without masks), "coco" (AP) or "classification" (top-1 and top-5).
        output_dir: folder for result files and annotations made for the evaluation.

    Raises:
        UserError: the data set has another evaluator type, or its annotation is unusable.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in EVALUATOR_FACTORIES:
        known = ", ".join(sorted(EVALUATOR_FACTORIES))
        raise UserError(
            f"the data set {dataset_name} has the evaluator_type {evaluator_type!r}; known are: "
            f"{known}"
        )
    return EVALUATOR_FACTORIES[evaluator_type](cfg, dataset_name, output_dir)


def main_metric(cfg: CfgNode, dataset_name: str) -> str:
    """Return "task/metric" of the main result by which models are compared; higher is better."""
    if MetadataCatalog.get(dataset_name).get("evaluator_type") == "classification":
        return "classification/top1"
    return "panoptic_seg/PQ" if cfg.MODEL.MASK_ON else "bbox/AP"


def per_class_values(cfg: CfgNode, results: Mapping[str, Any]) -> dict[str, float]:
    """Return the main metric of each class in percent, on the first data set of DATASETS.TEST.

    Args:
        cfg: of a run that has just evaluated.
        results: of this evaluation, as Detectron2's trainer returns them. AP is read from them, the
            other metrics from the result files.
    """
    name = cfg.DATASETS.TEST[0]
    task, _, metric = main_metric(cfg, name).partition("/")
    folder = Path(cfg.OUTPUT_DIR) / "inference" / name
    if metric == "AP":
        of_task = results.get(name, results).get(task, {})
        return {k.removeprefix("AP-"): v for k, v in of_task.items() if k.startswith("AP-")}
    path = folder / (PANOPTIC_RESULTS if metric == "PQ" else TOP_K_RESULTS)
    rows = read_json(path)["per_class"] if path.is_file() else []
    if metric == "PQ":
        return {row["name"]: 100 * row["pq"] for row in rows if row["pq"] is not None}
    return {
        row["name"]: 100 * row["num_top1"] / row["num_images"] for row in rows if row["num_images"]
    }


def _panoptic_evaluators(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    evaluators: list[DatasetEvaluator] = []
    if cfg.MODEL.MASK_ON:
        evaluators.append(PanopticEvaluator(dataset_name, output_dir))
    if cfg.MODEL.MASK_ON and cfg.MODEL.PANOPTIC.SEMANTIC_TEST:
        evaluators.append(SemanticEvaluator(dataset_name))
    if cfg.MODEL.MASK_ON and not cfg.MODEL.PANOPTIC.INSTANCES_TEST:
        logger.info("MODEL.PANOPTIC.INSTANCES_TEST is False: AP is not measured")
    elif MetadataCatalog.get(dataset_name).thing_dataset_id_to_contiguous_id:
        evaluators.append(
            ThingAPEvaluator(dataset_name, output_dir, _tasks(cfg), cfg.TEST.DETECTIONS_PER_IMAGE)
        )
    else:
        logger.info("%s has no thing classes: AP is not measured", dataset_name)
    return DatasetEvaluators(evaluators)


def _instance_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    return build_box_evaluator(dataset_name, output_dir, _tasks(cfg), cfg.TEST.DETECTIONS_PER_IMAGE)


def _top_k_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    return TopKEvaluator(dataset_name, output_dir)


def _tasks(cfg: CfgNode) -> tuple[str, ...]:
    return ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)


EVALUATOR_FACTORIES: dict[str, Callable[[CfgNode, str, str], DatasetEvaluator]] = {
    "coco_panoptic_seg": _panoptic_evaluators,
    "coco": _instance_evaluator,
    "classification": _top_k_evaluator,
}
