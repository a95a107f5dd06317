"""Predictor: a trained model that maps an image to the result that evaluation scores."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from ..checkpoint import PanopticCheckpointer, SettingsRecord, read_class_table
from ..data import ClassTable, PanopticDatasetMapper, class_section, setup_datasets
from ..data.datasets.setup import class_table_of
from ..data.images import ImageArray, read_image
from ..errors import UserError, one_line
from ..modeling.fast_inference import model_for_evaluation
from .prediction import Prediction
from .setup import load_config

# Lowest score of a drawn box where there is no panoptic map and no threshold was given.
_INSTANCE_SCORE = 0.5
_HASH_DIGITS = 12


def configure_for_drawing(cfg: CfgNode, score_threshold: float | None = None) -> None:
    """Restrict inference to what is drawn, in place.

    With a mask head, only the panoptic map is computed: AP also needs the masks of all instances,
    and these take most of the time. Without one, boxes with a low score are dropped.

    Args:
        cfg: changed in place, so it must not be frozen.
        score_threshold: 0 to 1. None: the threshold of the config for segments, 0.5 for boxes.

    Raises:
        UserError: the threshold is not between 0 and 1.
    """
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise UserError(f"the confidence threshold is {score_threshold}: give one from 0 to 1")
    node = cfg.MODEL.PANOPTIC
    node.INSTANCES_TEST = not cfg.MODEL.MASK_ON
    node.SEMANTIC_TEST = False
    if score_threshold is not None:
        node.SCORE_THRESHOLD_TEST = score_threshold
    if not cfg.MODEL.MASK_ON:
        lowest = max(_INSTANCE_SCORE, node.INSTANCE_SCORE_THRESHOLD_TEST)
        node.INSTANCE_SCORE_THRESHOLD_TEST = lowest if score_threshold is None else score_threshold


class Predictor:
    """A model with trained weights, the preprocessing of evaluation and the class table.

    Images go through the evaluation path of `PanopticDatasetMapper`, so the results equal those of
    evaluation. The classes are read from the checkpoint, so no data set has to be on disk. For a
    checkpoint without classes they come from the data sets of the config.

    Three lines for a program::

        from batchformer_panoptic import Predictor
        prediction = Predictor.load("output/run/model_final.pth").predict("image.jpg")
        print(prediction.segments)

    Attributes:
        class_table: the classes that the class ids of results refer to.
        model: in evaluation mode on MODEL.DEVICE; the faster copy if TEST.FAST is enabled.

    Args:
        cfg: not changed. MODEL.DETR.NUM_CLASSES 0 and MODEL.PANOPTIC.THING_CLASS_IDS [] are filled
            in from the class table.

    Raises:
        UserError: weights that are missing, unreadable or do not fit the model, or no class table.
    """

    def __init__(self, cfg: CfgNode) -> None:
        cfg = cfg.clone()
        cfg.defrost()
        if class_section(cfg) == "CLASSIFIER":
            raise UserError(
                "MODEL.META_ARCHITECTURE ImageClassifier predicts neither segments nor boxes to "
                "draw: evaluate it with train_net.py --eval-only"
            )
        weights = _local_weights(cfg.MODEL.WEIGHTS)
        self._cfg, self._weights = cfg, weights
        self.class_table = _class_table(cfg, weights)
        if cfg.MODEL.DETR.NUM_CLASSES == 0:
            cfg.MODEL.DETR.NUM_CLASSES = self.class_table.num_classes
        if not cfg.MODEL.PANOPTIC.THING_CLASS_IDS:
            cfg.MODEL.PANOPTIC.THING_CLASS_IDS = self.class_table.thing_class_ids
        model = build_model(cfg).eval()
        PanopticCheckpointer(model, settings=SettingsRecord(cfg)).load(weights)
        self.model = model_for_evaluation(cfg, model)
        self._mapper = PanopticDatasetMapper(cfg, is_train=False)

    @classmethod
    def load(
        cls,
        weights: str | Path,
        config_file: str | Path | None = None,
        *,
        score_threshold: float | None = None,
        opts: Sequence[str] = (),
    ) -> "Predictor":
        """Load a trained model from its files.

        A checkpoint names its classes, but not the whole config.

        Args:
            weights: a checkpoint.
            config_file: None: ``config.yaml`` beside the weights, where training writes it.
            score_threshold: see `configure_for_drawing`.
            opts: config changes, ``[KEY, VALUE, ...]``, such as ``["MODEL.DEVICE", "cpu"]``.

        Raises:
            UserError: see `load_config`, `configure_for_drawing` and the class itself.
        """
        config = Path(weights).parent / "config.yaml" if config_file is None else config_file
        cfg = load_config(str(config), [*opts, "MODEL.WEIGHTS", str(weights)])
        configure_for_drawing(cfg, score_threshold)
        return cls(cfg)

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of the weights and of the settings that predictions depend on."""
        cfg = self._cfg.clone()
        cfg.MODEL.WEIGHTS = cfg.MODEL.INIT_FROM = cfg.MODEL.DEVICE = ""
        cfg.INPUT.MAX_PIXELS = 0  # of no effect on what is predicted
        text = cfg.MODEL.dump() + cfg.INPUT.dump() + cfg.TEST.FAST.dump()
        contents = {"weights": Path(self._weights).read_bytes(), "settings": text.encode()}
        return {
            key: hashlib.sha256(content).hexdigest()[:_HASH_DIGITS]
            for key, content in contents.items()
        }

    def check_classes_of(self, dataset: str) -> ClassTable:
        """Return the classes of a registered data set, which must be those of the model.

        Raises:
            UserError: names the first difference.
        """
        table = ClassTable.from_metadata(MetadataCatalog.get(dataset))
        if difference := table.difference(self.class_table):
            raise UserError(
                f"the classes of data set {dataset} and of the checkpoint differ: {difference}"
            )
        return table

    def __call__(self, image_bgr: ImageArray) -> dict[str, Any]:
        """Predict one image.

        Args:
            image_bgr: (H, W, 3) uint8, as read by OpenCV and `read_image`.

        Returns:
            ``panoptic_seg`` and ``instances`` at (H, W), depending on the config.
        """
        return self.predict_batch([image_bgr])[0]

    def predict(self, image: str | Path | ImageArray) -> Prediction:
        """Predict one photograph, and return its segments with names, scores, areas and boxes.

        Args:
            image: a file, or (H, W, 3) uint8 in the order BGR.

        Raises:
            UserError: the file cannot be read.
        """
        image_bgr = self.read_image(image) if isinstance(image, str | Path) else image
        return Prediction(image_bgr, self(image_bgr), self.class_table)

    def read_image(self, path: str | Path) -> ImageArray:
        """Read a photograph, (H, W, 3) uint8 in the order BGR.

        Raises:
            UserError: the file cannot be read, or has more than INPUT.MAX_PIXELS.
        """
        return read_image(path, max_pixels=self._cfg.INPUT.MAX_PIXELS)

    def predict_batch(self, images_bgr: Sequence[ImageArray]) -> list[dict[str, Any]]:
        """Predict several images, which may differ in size; see `__call__`."""
        inputs = [self._mapper.map_image(image) for image in images_bgr]
        with torch.inference_mode():
            results: list[dict[str, Any]] = self.model(inputs)
        return results


def _local_weights(path: str) -> str:
    """Return a local path for MODEL.WEIGHTS, which may be a URL."""
    if not path:
        raise UserError("MODEL.WEIGHTS is empty: give trained weights, --opts MODEL.WEIGHTS FILE")
    if "://" not in path:
        if not os.path.isfile(path):
            raise UserError(f"checkpoint {path} not found: see --opts MODEL.WEIGHTS FILE")
        return path
    try:
        local: str = PathManager.get_local_path(path)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be fetched: {one_line(error)}") from error
    return local


def _class_table(cfg: CfgNode, weights: str) -> ClassTable:
    """Return the classes of the checkpoint, or else those of the config's data sets."""
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
