"""A trained model behind one call: image in, evaluation's result out."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from ..checkpoint import PanopticCheckpointer, SettingsRecord, read_class_table
from ..data import ClassTable, build_augmentations, class_section, setup_datasets
from ..data.datasets.setup import class_table_of
from ..data.io import ImageArray
from ..errors import UserError, one_line
from ..modeling.fast_inference import model_for_evaluation

# Boxes without a panoptic map are drawn from this score on when no threshold is asked for.
_INSTANCE_SCORE = 0.5


def configure_for_drawing(cfg: CfgNode, score_threshold: float | None = None) -> None:
    """Set what a picture needs, and nothing more, in place.

    With a mask head only the panoptic map is computed: the masks of all instances, which AP needs,
    cost most of the time. Without one, boxes of low score are left out.

    Args:
        cfg: changed in place, therefore not frozen.
        score_threshold: 0 to 1; None: that of the config for segments, 0.5 for boxes.

    Raises:
        UserError: the threshold is not from 0 to 1.
    """
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise UserError(f"the confidence threshold is {score_threshold}: give one from 0 to 1")
    node = cfg.MODEL.PANOPTIC
    node.INSTANCES_TEST = not cfg.MODEL.MASK_ON
    if score_threshold is not None:
        node.SCORE_THRESHOLD_TEST = score_threshold
    if not cfg.MODEL.MASK_ON:
        lowest = max(_INSTANCE_SCORE, node.INSTANCE_SCORE_THRESHOLD_TEST)
        node.INSTANCE_SCORE_THRESHOLD_TEST = lowest if score_threshold is None else score_threshold


class Predictor:
    """The model of a config with its trained weights, preprocessing and classes.

    Images go through the resize of evaluation and `PanopticDETR.inference`, so that results are
    those that are scored. The classes are those stored in the checkpoint, so that no data set has
    to be on disk; a checkpoint without them needs the data sets of the config.

    Attributes:
        class_table: the classes that results refer to.
        model: in evaluation mode, on MODEL.DEVICE; the faster copy with TEST.FAST.

    Args:
        cfg: left as it is. MODEL.DETR.NUM_CLASSES of 0 and MODEL.PANOPTIC.THING_CLASS_IDS of []
            are taken from the classes.

    Raises:
        UserError: no weights, unreadable ones, ones that do not fit; classes that nobody knows.
    """

    def __init__(self, cfg: CfgNode) -> None:
        cfg = cfg.clone()
        cfg.defrost()
        if class_section(cfg) == "CLASSIFIER":
            raise UserError(
                "pictures show segments and boxes, and MODEL.META_ARCHITECTURE ImageClassifier "
                "predicts neither: evaluate it with train_net.py --eval-only"
            )
        weights = _local_weights(cfg.MODEL.WEIGHTS)
        self.class_table = _class_table(cfg, weights)
        if cfg.MODEL.DETR.NUM_CLASSES == 0:
            cfg.MODEL.DETR.NUM_CLASSES = self.class_table.num_classes
        if not cfg.MODEL.PANOPTIC.THING_CLASS_IDS:
            cfg.MODEL.PANOPTIC.THING_CLASS_IDS = self.class_table.thing_class_ids
        model = build_model(cfg).eval()
        PanopticCheckpointer(model, settings=SettingsRecord(cfg)).load(weights)
        self.model = model_for_evaluation(cfg, model)
        self._augmentations = T.AugmentationList(build_augmentations(cfg, is_train=False))
        self._reverse_channels = cfg.INPUT.FORMAT == "RGB"

    def __call__(self, image_bgr: ImageArray) -> dict[str, Any]:
        """Predict one image.

        Args:
            image_bgr: (H, W, 3) uint8, as OpenCV and `read_image` give it.

        Returns:
            ``panoptic_seg`` and ``instances`` at (H, W), as the model is configured.
        """
        return self.predict_batch([image_bgr])[0]

    def predict_batch(self, images_bgr: Sequence[ImageArray]) -> list[dict[str, Any]]:
        """Predict several images, of different sizes if need be; see `__call__`."""
        with torch.inference_mode():
            results: list[dict[str, Any]] = self.model([self._input(x) for x in images_bgr])
        return results

    def _input(self, image_bgr: ImageArray) -> dict[str, Any]:
        image = image_bgr[:, :, ::-1] if self._reverse_channels else image_bgr
        augmented = T.AugInput(np.ascontiguousarray(image))
        self._augmentations(augmented)
        channels_first = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        height, width = image_bgr.shape[:2]
        return {"image": torch.from_numpy(channels_first), "height": height, "width": width}


def _local_weights(path: str) -> str:
    if not path:
        raise UserError("MODEL.WEIGHTS is empty: give trained weights, --opts MODEL.WEIGHTS FILE")
    if "://" not in path:
        if not os.path.isfile(path):
            raise UserError(f"checkpoint {path} not found: see --opts MODEL.WEIGHTS FILE")
        return path
    try:
        local: str = PathManager.get_local_path(path)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"checkpoint {path} cannot be fetched: {reason}") from error
    return local


def _class_table(cfg: CfgNode, weights: str) -> ClassTable:
    table = read_class_table(weights)
    if table is None:
        setup_datasets(cfg)
        table = class_table_of([*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN])
    if table is None:
        raise UserError(
            f"checkpoint {weights} does not name its classes and the config names no data set: "
            "set DATASETS.TEST"
        )
    return table
