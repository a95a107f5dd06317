"""BatchFormerV2 (arXiv 2204.01254) for panoptic segmentation with Detectron2.

Importing a public name registers the models with Detectron2. Detectron2 is only imported then,
since the subpackage ``batchformer`` needs only torch.
"""

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import add_batchformer_panoptic_config
    from .data import register_image_folder, register_instances_dataset, register_panoptic_dataset
    from .engine.predictor import Predictor
    from .modeling.fast_inference import prepare_for_inference
    from .modeling.image_classifier import ImageClassifier
    from .modeling.panoptic_detr import PanopticDETR

__all__ = [
    "ImageClassifier",
    "PanopticDETR",
    "Predictor",
    "add_batchformer_panoptic_config",
    "prepare_for_inference",
    "register_image_folder",
    "register_instances_dataset",
    "register_panoptic_dataset",
]

_HOME_OF_NAME = {
    "ImageClassifier": ".modeling.image_classifier",
    "PanopticDETR": ".modeling.panoptic_detr",
    "Predictor": ".engine.predictor",
    "add_batchformer_panoptic_config": ".config",
    "prepare_for_inference": ".modeling.fast_inference",
    "register_image_folder": ".data",
    "register_instances_dataset": ".data",
    "register_panoptic_dataset": ".data",
}


# Threads that wait for others leave their cores to them (engine/threads.py). The OpenMP runtime
# reads this when torch is imported; a program that has imported torch before waits as before.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Detectron2 compiles two functions with TorchScript when it is imported.
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is", FutureWarning, r"torch\.jit\.")


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".modeling", __name__)  # registers the models
    return getattr(importlib.import_module(_HOME_OF_NAME[name], __name__), name)
