"""COCO AP of boxes against an instances JSON, whatever the JSON leaves out."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..checkpoint import write_atomically
from ..errors import UserError

logger = logging.getLogger(__name__)


def build_box_evaluator(
    dataset_name: str, output_dir: str, tasks: Sequence[str] = ("bbox",)
) -> COCOEvaluator:
    """Build Detectron2's COCO evaluator for a registered data set of boxes.

    Annotations without ``area`` or ``iscrowd``, which stop pycocotools, and annotation ids of 0,
    which it takes for "no match", are common in home-made JSONs. Such a JSON is completed in a copy
    in the output folder: area = width * height of the box, no crowds, ids from 1.

    Args:
        dataset_name: a registered data set with the metadata of ``register_coco_instances``.
        output_dir: for the copy, the predictions and the result files.
        tasks: "bbox", and "segm" for a model that predicts masks.

    Raises:
        UserError: the data set names no JSON, or the file cannot be read.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if not metadata.get("json_file"):
        raise UserError(
            f"the data set {dataset_name} names no 'json_file': register it with "
            "DATASETS.CUSTOM_INSTANCES or Detectron2's register_coco_instances"
        )
    json_file = _complete_json(metadata.json_file, output_dir)
    name = f"{dataset_name} (boxes)"
    MetadataCatalog.get(name).set(**{**metadata.as_dict(), "name": name, "json_file": json_file})
    try:
        return COCOEvaluator(
            name,
            tasks=tuple(tasks),
            distributed=True,
            output_dir=output_dir,
            use_fast_impl=False,  # the fast one is a compiled module that is not required here
        )
    finally:
        MetadataCatalog.pop(name)  # the evaluator holds the metadata; the catalog is the user's


def completed(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """A COCO-instances object with everything that its evaluation reads; None if it is complete.

    The object is left as it is.
    """
    annotations = content["annotations"]
    ids_are_usable = all(annotation.get("id", 0) for annotation in annotations)
    if ids_are_usable and all("area" in a and "iscrowd" in a for a in annotations):
        return None
    new = [
        {"iscrowd": 0, "area": annotation["bbox"][2] * annotation["bbox"][3], **annotation}
        for annotation in annotations
    ]
    if not ids_are_usable:
        new = [{**annotation, "id": number} for number, annotation in enumerate(new, start=1)]
    return {**content, "annotations": new}


def _complete_json(path: str, output_dir: str) -> str:
    """The path of the JSON, or of its completed copy."""
    try:
        with PathManager.open(path) as file:
            content = dict(json.load(file))
        # The JSON of a test set has no annotations; its results are only written down.
        new = completed(content) if "annotations" in content else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no readable COCO-instances JSON ({error})") from error
    if new is None:
        return path
    copy = Path(output_dir) / "annotations_completed.json"
    if comm.is_main_process():
        logger.info("%s lacks what COCO's evaluation needs; it is completed in %s", path, copy)
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(str(copy), lambda name: _write_json(name, new))
    comm.synchronize()
    return str(copy)


def _write_json(path: str, content: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(content), encoding="utf-8")
