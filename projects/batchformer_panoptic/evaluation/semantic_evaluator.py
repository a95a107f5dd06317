"""Mean IoU of all classes on a panoptic data set, by Detectron2's evaluator."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, SemSegEvaluator

from ..errors import UserError
from .panoptic_ground_truth import PanopticGroundTruth, TrueImage


class SemanticEvaluator(DatasetEvaluator):
    """Mean IoU of predicted class maps against the classes of a panoptic annotation.

    Things and stuff are classes alike. Void pixels, those of crowds included, are ignored. A model
    output must have ``sem_seg``, the (K, H, W) scores of all classes at the original size. Images
    that a process sees again are skipped.
    """

    def __init__(self, dataset_name: str) -> None:
        """Read the annotation JSON of the data set.

        Args:
            dataset_name: a registered panoptic data set with one id space for things and stuff.
        """
        self._truth = PanopticGroundTruth(MetadataCatalog.get(dataset_name))
        dataset_ids = self._truth.dataset_ids
        self._contiguous = {dataset_ids[class_id]: class_id for class_id in sorted(dataset_ids)}
        self._evaluator = self._build(f"{dataset_name} (classes)")
        self.reset()

    def _build(self, name: str) -> SemSegEvaluator:
        """Build Detectron2's evaluator, which looks up the ground truth by name in catalogs.

        It identifies images by ``file_name``; here that is the image id.
        """
        images = [{"file_name": key, "sem_seg_file_name": key} for key in self._truth.images]
        categories = self._truth.categories
        DatasetCatalog.register(name, lambda: images)
        MetadataCatalog.get(name).set(
            stuff_classes=[categories[key]["name"] for key in self._contiguous],
            stuff_dataset_id_to_contiguous_id=self._contiguous,
            ignore_label=len(self._contiguous),
        )
        try:
            return _CountingEvaluator(
                name,
                distributed=True,
                sem_seg_loading_fn=lambda key, dtype: self._class_map(self._truth.images[key]),
            )
        finally:
            # The evaluator keeps what it read: remove the temporary catalog entries.
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name)

    def _class_map(self, image: TrueImage) -> npt.NDArray[np.int64]:
        """(H, W) contiguous classes; the number of classes at void and crowds."""
        segment_map = self._truth.read_segment_map(image, self._size)
        ids, index = np.unique(segment_map, return_inverse=True)
        segments = image.segments
        class_of = {
            int(segment_id): self._contiguous[int(category_id)]
            for segment_id, category_id, is_crowd in zip(
                segments.ids, segments.category_ids, segments.is_crowd, strict=True
            )
            if not is_crowd
        }
        classes = np.array([class_of.get(int(key), len(self._contiguous)) for key in ids])
        return classes[index].reshape(segment_map.shape)

    def reset(self) -> None:
        """Forget all images."""
        self._evaluator.reset()
        self._seen: set[int | str] = set()
        self._size = (0, 0)  # (H, W) of the prediction being counted

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Count the pixels of a batch.

        Args:
            inputs: the model's inputs, of which ``image_id`` is read.
            outputs: the model's outputs, of which ``sem_seg`` is read.
        """
        for image_input, output in zip(inputs, outputs, strict=True):
            image_id = image_input["image_id"]
            if image_id in self._seen:
                continue
            self._seen.add(image_id)
            if image_id not in self._truth.images:
                raise UserError(
                    f"image {image_id} is not annotated in {self._truth.json_file}; evaluate on "
                    "the data set that the images come from"
                )
            if "sem_seg" not in output:
                raise UserError(
                    "the model returns no class scores of pixels (sem_seg), which the mean IoU "
                    "needs: enable its semantic inference"
                )
            height, width = output["sem_seg"].shape[-2:]
            self._size = (height, width)
            self._evaluator.process([{"file_name": image_id}], [{"sem_seg": output["sem_seg"]}])

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Sum over processes; every process has to call it.

        Returns:
            ``{"sem_seg": {"mIoU", "fwIoU", "mACC", "pACC", ...}}`` in percent on the main process,
            empty elsewhere. Classes that occur nowhere are NaN and left out of the means.
        """
        return OrderedDict(self._evaluator.evaluate() or {})


class _CountingEvaluator(SemSegEvaluator):
    """Detectron2's evaluator without copies of the predictions, so that memory does not grow."""

    def encode_json_sem_seg(self, sem_seg: Any, input_file_name: Any) -> list[Any]:
        return []
