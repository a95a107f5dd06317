"""Registry of the layouts that can be converted, by the name given to ``--source``.

It also reads the model folders of Hugging Face, which contain one of two models.
"""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...data.io import read_json
from ...errors import UserError, one_line
from . import huggingface, mask2former_huggingface
from .backbones import BACKBONE_SOURCES, TIMM_PREFIX, timm_source
from .conditional_smca import convert_conditional, convert_smca
from .core import Converted, Request, Source
from .deformable import convert_deformable, convert_deformable_batchformer
from .detr import convert_batchformer, convert_detectron2, convert_official
from .mask2former import convert_mask2former
from .vision_transformers import VIT_PREFIX, convert_deit, vision_transformer_source

# --- transformers of Hugging Face: DETR or Mask2Former ---

_SETTINGS = {
    "detr": huggingface.settings_of_config,
    mask2former_huggingface.MODEL_TYPE: mask2former_huggingface.settings_of_config,
}
# Defaults of DetrImageProcessor: torchvision's statistics, of pixels from 0 to 1.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ModelFolder(NamedTuple):
    """A folder of Hugging Face: its weights, and settings from the files next to them.

    Attributes:
        weights: path of the weights.
        settings: config keys implied by ``config.json`` and, if it exists,
            ``preprocessor_config.json``.
    """

    weights: Path
    settings: dict[str, Any]


def convert_transformers(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a DETR or Mask2Former of transformers; the names distinguish them.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    if mask2former_huggingface.is_mask2former(state):
        return mask2former_huggingface.convert_huggingface_mask2former(state, request)
    return huggingface.convert_huggingface(state, request)


def open_folder(folder: Path) -> ModelFolder:
    """Find the weights in a folder of Hugging Face and read its configs.

    Raises:
        UserError: no single file of weights, no config of a known model, or unreadable statistics.
    """
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    weights = next((file for file in files if file.is_file()), None)
    if weights is None:
        raise UserError(f"folder {folder} has neither model.safetensors nor pytorch_model.bin")
    config = read_json(folder / "config.json")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in _SETTINGS:
        raise UserError(
            f"{folder}/config.json does not describe a DETR or a Mask2Former: model_type "
            f"{model_type!r}"
        )
    settings = {**_SETTINGS[model_type](config, folder), **_pixel_settings(folder)}
    return ModelFolder(weights, settings)


def _pixel_settings(folder: Path) -> dict[str, Any]:
    """Read statistics of pixels from 0 to 255; the file is optional."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return {}
    content = read_json(path)
    try:
        # Statistics refer to rescaled pixels; this factor converts them back to 0 to 255.
        white = 1 / content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else 1
        mean, std = [0, 0, 0], [1, 1, 1]
        if content.get("do_normalize", True):
            mean = content.get("image_mean", _IMAGENET_MEAN)
            std = content.get("image_std", _IMAGENET_STD)
        pairs = {"MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}
        settings = {key: [round(x * white, 4) for x in value] for key, value in pairs.items()}
        if any(len(value) != 3 for value in settings.values()):
            raise ValueError("image_mean and image_std must have three numbers")
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    return settings


# --- sources ---

_DETR_SOURCES = (
    Source("detr", "facebookresearch/detr, boxes or panoptic (.pth)", convert_official),
    Source(
        "detr_batchformer",
        "DETR of zhihou7/BatchFormer with its blocks, for further training",
        convert_batchformer,
    ),
    Source(
        "detr_detectron2", "the Detectron2 wrapper of facebookresearch/detr", convert_detectron2
    ),
    Source(
        "huggingface",
        "DETR and Mask2Former of transformers (folder or file)",
        convert_transformers,
    ),
    Source("conditional_detr", "Atten4Vis/ConditionalDETR, boxes (.pth)", convert_conditional),
    Source(
        "deformable_detr",
        "fundamentalvision/Deformable-DETR, boxes: plain, refined or two-stage",
        convert_deformable,
    ),
    Source(
        "deformable_detr_batchformer",
        "Deformable-DETR of zhihou7/BatchFormer with its blocks, for further training",
        convert_deformable_batchformer,
    ),
    Source("smca_detr", "gaopengcuhk/SMCA-DETR, boxes, single- or multi-scale", convert_smca),
    Source(
        "mask2former",
        "facebookresearch/Mask2Former, ResNet or Swin (.pkl, .pth)",
        convert_mask2former,
    ),
)

_CLASSIFIER_SOURCES = (
    Source(
        "deit",
        f"facebookresearch/deit, not distilled ({VIT_PREFIX}NAME for other models of timm)",
        convert_deit,
    ),
)

SOURCES: dict[str, Source] = {
    source.name: source for source in (*_DETR_SOURCES, *BACKBONE_SOURCES, *_CLASSIFIER_SOURCES)
}


def source_named(name: str) -> Source:
    """Return the source with a name: one of `SOURCES`, or a prefix and the name of a timm model.

    The prefix is ``timm:`` for a backbone and ``timm_vit:`` for an image classifier.

    Raises:
        UserError: an unknown name; the message lists the known ones.
    """
    if name.startswith(TIMM_PREFIX):
        return timm_source(name.removeprefix(TIMM_PREFIX))
    if name.startswith(VIT_PREFIX):
        return vision_transformer_source(name.removeprefix(VIT_PREFIX))
    if name not in SOURCES:
        raise UserError(
            f"--source {name} is unknown; known: {', '.join(SOURCES)}, {TIMM_PREFIX}NAME, "
            f"{VIT_PREFIX}NAME"
        )
    return SOURCES[name]
