"""Registry of the layouts that can be converted, by the name given to ``--source``."""

from ...errors import UserError
from .backbones import BACKBONE_SOURCES, TIMM_PREFIX, timm_source
from .conditional_smca import convert_conditional, convert_smca
from .core import Source
from .deformable import convert_deformable, convert_deformable_batchformer
from .detr import convert_batchformer, convert_detectron2, convert_official
from .huggingface_folder import convert_transformers
from .mask2former import convert_mask2former
from .vision_transformers import VIT_PREFIX, convert_deit, vision_transformer_source

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
