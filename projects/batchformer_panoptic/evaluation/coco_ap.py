"""COCO AP of boxes and masks, by Detectron2's COCO evaluator.

The ground truth is an instances JSON, or the things of a panoptic data set converted to one.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..data.io import read_coco_json, write_json
from ..data.segment_maps import IntArray
from ..data.validation import (
    SECTIONS,
    check_boxes,
    check_lists,
    raise_first_error,
    records,
    segment_without_pixels,
)
from ..errors import UserError
from .panoptic_ground_truth import PanopticGroundTruth, TrueImage

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
COCO_DETECTIONS = 100


class _COCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator; the tables that pycocotools prints go to the log, at level DEBUG."""

    def evaluate(self, img_ids: Sequence[int | str] | None = None) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            results = super().evaluate(img_ids)
        logger.debug("pycocotools:\n%s", printed.getvalue())
        return results


def _coco_evaluator(
    name: str,
    metadata: Mapping[str, Any],
    tasks: Sequence[str],
    output_dir: str,
    max_detections: int,
) -> COCOEvaluator:
    """Build Detectron2's evaluator, which reads its metadata from the catalog by name.

    Args:
        name: for the log, and for a temporary entry of the catalog.
        metadata: ``json_file``, ``thing_classes`` and ``thing_dataset_id_to_contiguous_id``.
        tasks: "bbox", and "segm" for a model that predicts masks.
        output_dir: for predictions and result files.
        max_detections: predictions of an image that AP counts for each class, at least COCO's 100.
    """
    MetadataCatalog.get(name).set(**{**metadata, "name": name})
    try:
        return _COCOEvaluator(
            name,
            tasks=tuple(tasks),
            distributed=True,
            output_dir=output_dir,
            max_dets_per_image=max(COCO_DETECTIONS, max_detections),
            use_fast_impl=False,  # the fast one is a compiled module that need not be installed
        )
    finally:
        # The evaluator keeps the metadata: remove the temporary catalog entry.
        MetadataCatalog.pop(name)


# ---------------------------------------------------------------------------
# Data sets of boxes
# ---------------------------------------------------------------------------


def build_box_evaluator(
    dataset_name: str,
    output_dir: str,
    tasks: Sequence[str] = ("bbox",),
    max_detections: int = COCO_DETECTIONS,
) -> COCOEvaluator:
    """Build Detectron2's COCO evaluator for a registered data set of boxes.

    Handmade JSON often lacks ``area`` or ``iscrowd``, which pycocotools requires, or has an
    annotation with the id 0, which pycocotools takes for "no match". Such JSON is completed in a
    copy in the output folder: area = width * height of the box, no crowds, ids from 1.

    Args:
        dataset_name: a registered data set with the metadata of ``register_coco_instances``.
        output_dir: for the copy, the predictions and the result files.
        tasks: "bbox", and "segm" for a model that predicts masks.
        max_detections: TEST.DETECTIONS_PER_IMAGE. AP counts that many, if they are more than 100.

    Raises:
        UserError: the metadata has no JSON, or the file cannot be read.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if not metadata.get("json_file"):
        raise UserError(
            f"the data set {dataset_name} names no 'json_file': register it with "
            "DATASETS.CUSTOM_INSTANCES or Detectron2's register_coco_instances"
        )
    json_file = _complete_json(metadata.json_file, output_dir)
    entries = {**metadata.as_dict(), "json_file": json_file}
    return _coco_evaluator(f"{dataset_name} (boxes)", entries, tasks, output_dir, max_detections)


def _complete_json(path: str, output_dir: str) -> str:
    """Return the path of the JSON, or of its completed copy."""
    content = read_coco_json(path)
    present = [section for section in SECTIONS if section in content]
    raise_first_error(chain(check_lists(content, present), check_boxes(content)), path)
    # The JSON of a test set has no annotations; only its predictions are written.
    new = completed(content) if "annotations" in content else None
    if new is None:
        return path
    copy = Path(output_dir) / "annotations_completed.json"
    if comm.is_main_process():
        logger.info("%s lacks entries that COCO's evaluation needs; completed in %s", path, copy)
        write_json(copy, new)
    comm.synchronize()
    return str(copy)


def completed(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a COCO-instances object with all entries that its evaluation reads.

    The given object is not changed. None: it is complete already.
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


# ---------------------------------------------------------------------------
# Things of panoptic data sets
# ---------------------------------------------------------------------------


class ThingAPEvaluator(DatasetEvaluator):
    """COCO AP of predicted instances against the things of a panoptic data set.

    The ground truth is the data set's own instances JSON (metadata ``json_file``) if that file
    exists, as in the published evaluation on COCO; otherwise it is made from the panoptic
    annotation.
    Detectron2's evaluator needs contiguous classes, so predicted classes are renumbered among the
    things; predicted stuff is left out. Model outputs are not modified.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str,
        tasks: Sequence[str] = TASKS,
        max_detections: int = COCO_DETECTIONS,
    ) -> None:
        """Prepare the annotations.

        Args:
            dataset_name: a registered panoptic data set with one id space for things and stuff and
                at least one thing class.
            output_dir: for annotations made from PNGs, predictions and Detectron2's result files.
            tasks: "bbox" and, if the model predicts masks, "segm".
            max_detections: see `build_box_evaluator`.
        """
        metadata = MetadataCatalog.get(dataset_name)
        truth = PanopticGroundTruth(metadata)
        if not truth.thing_ids:
            raise UserError(f"the data set {dataset_name} has no thing classes to measure AP of")
        json_file = _instances_json(metadata.get("json_file"), truth, output_dir)
        self._image_ids = list(truth.images)
        self._thing_class = _thing_class(truth)
        entries = {
            "json_file": json_file,
            "thing_classes": [truth.categories[key]["name"] for key in truth.thing_ids],
            "thing_dataset_id_to_contiguous_id": {key: i for i, key in enumerate(truth.thing_ids)},
        }
        self._evaluator = _coco_evaluator(
            f"{truth.name} (things)", entries, tasks, output_dir, max_detections
        )

    def reset(self) -> None:
        """Forget all images."""
        self._evaluator.reset()

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Store the things of a batch as run-length codes.

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
            empty elsewhere. Detectron2 gives NaN without ground truth or without any prediction.
        """
        return OrderedDict(self._evaluator.evaluate(img_ids=self._image_ids) or {})


def _thing_class(truth: PanopticGroundTruth) -> torch.Tensor:
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


def _instances_json(metadata_path: str | None, truth: PanopticGroundTruth, output_dir: str) -> str:
    """Return the data set's own instances JSON if it exists, else one made from the PNGs."""
    if metadata_path and os.path.isfile(PathManager.get_local_path(metadata_path)):
        local_path = _complete_json(metadata_path, output_dir)
        categories = records(read_coco_json(local_path), "categories")
        if sorted((item.get("id") for item in categories), key=repr) != sorted(
            truth.thing_ids, key=repr
        ):
            raise UserError(
                f"the categories of {metadata_path} are not the things of {truth.json_file}; "
                "register the data set without an instances JSON, AP then uses the panoptic "
                "annotation"
            )
        logger.info("AP of things is measured on the instance annotations %s", metadata_path)
        return local_path
    # The main process writes the file, then the others find it.
    if comm.is_main_process():
        cached_thing_annotations(truth, output_dir)
    comm.synchronize()
    return cached_thing_annotations(truth, output_dir)


# ---------------------------------------------------------------------------
# Instance annotations made from panoptic PNGs, kept in a file
# ---------------------------------------------------------------------------

_FORMAT_VERSION = 1


def cached_thing_annotations(truth: PanopticGroundTruth, output_dir: str) -> str:
    """Write the things of a panoptic data set as a COCO instances JSON, if not done before.

    The file contains a hash of the JSON and the PNGs that it was made from. A file with another
    hash, or one that cannot be read, is replaced.

    Args:
        truth: the panoptic ground truth.
        output_dir: folder for ``<data set>_things.json``.

    Returns:
        The path of the file.
    """
    path = Path(output_dir) / f"{truth.name}_things.json"
    source = _fingerprint(truth)
    if _source_of(path) == source:
        return str(path)
    logger.info("Writing the things of %s as instance annotations to %s", truth.name, path)
    content = {"info": {"source": source}, **thing_annotations(truth)}
    write_json(path, content)
    return str(path)


def _fingerprint(truth: PanopticGroundTruth) -> str:
    """Hash the JSON and the name, size and modification time of every PNG."""
    digest = hashlib.sha256(f"{_FORMAT_VERSION}".encode())
    digest.update(Path(truth.json_file).read_bytes())
    for image in truth.images.values():
        try:
            status = os.stat(truth.png_path(image))
        except FileNotFoundError:
            state = "missing"
        else:
            state = f"{status.st_size} {status.st_mtime_ns}"
        digest.update(f"\n{truth.png_path(image)} {state}".encode())
    return digest.hexdigest()


def _source_of(path: Path) -> str | None:
    """Return the hash stored in a cached file, None if there is no usable file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("info"), dict):
        return None
    complete = {"images", "annotations", "categories"} <= set(content)
    return content["info"].get("source") if complete else None


def thing_annotations(truth: PanopticGroundTruth) -> dict[str, Any]:
    """Convert the things of a panoptic data set to the content of a COCO instances JSON.

    Boxes are tight around the visible pixels, (x, y, width, height); masks are compressed
    run-length codes; crowd segments have ``iscrowd`` 1. Stuff is left out.

    Raises:
        UserError: a PNG is missing or unreadable, or an annotated segment has no pixels.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image in truth.images.values():
        segment_map = truth.read_segment_map(image)
        height, width = segment_map.shape
        images.append(
            {
                "id": image.image_id,
                "file_name": image.png_name,
                "height": height,
                "width": width,
            }
        )
        for annotation in _image_annotations(truth, image, segment_map):
            # From 1, because pycocotools takes an annotation with the id 0 for "no match".
            annotations.append({"id": len(annotations) + 1, **annotation})
    categories = [{"id": key, "name": truth.categories[key]["name"]} for key in truth.thing_ids]
    return {"images": images, "annotations": annotations, "categories": categories}


def _image_annotations(
    truth: PanopticGroundTruth, image: TrueImage, segment_map: IntArray
) -> list[dict[str, Any]]:
    segments = image.segments
    annotations: list[dict[str, Any]] = []
    for position in np.flatnonzero(np.isin(segments.category_ids, truth.thing_ids)).tolist():
        segment_id = int(segments.ids[position])
        mask = np.asfortranarray(segment_map == segment_id, dtype=np.uint8)
        code = mask_util.encode(mask)
        area = int(mask_util.area(code))
        if area == 0:
            problem = segment_without_pixels(segment_id, image.png_name)
            raise UserError(f"{truth.json_file}: {problem}")
        annotations.append(
            {
                "image_id": image.image_id,
                "category_id": int(segments.category_ids[position]),
                "iscrowd": int(segments.is_crowd[position]),
                "area": area,
                "bbox": mask_util.toBbox(code).tolist(),
                "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
            }
        )
    return annotations
