"""Export of a model to the layout of its public repository or of transformers."""

import shutil
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from safetensors.torch import save_file
from torch import Tensor

from ...data.class_table import ClassTable
from ...data.io import writing
from ...errors import UserError, one_line
from ..mismatch import is_pilot
from ..records import SettingsRecord
from . import mask2former_huggingface
from .core import BLOCKS, TORCHVISION_INPUT, refuse_mismatch
from .detection_huggingface import CLASSES as DETECTION_CLASSES
from .detection_huggingface import detection_config, detection_processor, detection_weights
from .detr import ALIAS, ALIASED, ours_to_official
from .huggingface import (
    STAGES,
    class_names,
    detr_arguments,
    ours_to_huggingface,
    resnet_config,
    split_projections,
)
from .layout import compare_with_layout, has_masks, resnet_shape, settings_of
from .mask2former import (
    is_mask2former,
    mask2former_settings,
    refuse_unless_mask2former,
    to_official_mask2former,
)
from .model_card import model_card

HUGGINGFACE_FILES = (
    *("config.json", "model.safetensors", "preprocessor_config.json"),
    "README.md",  # the model card
)
_EXTRA = "huggingface"
_GROUPS = 8  # of the group norms in published mask heads


def to_official(
    state: Mapping[str, Tensor], *, with_block: bool = True, no_object_weight: float = 0.1
) -> dict[str, Tensor]:
    """Rename a model to its public repository.

    These are facebookresearch/detr, whose DETRsegm has a mask head, and
    facebookresearch/Mask2Former.

    Args:
        state: the state dict of a `PanopticDETR` with Detectron2's ResNet and the transformer
            "detr", or with a ResNet or Swin and the transformer "mask2former".
        with_block: keep BatchFormer blocks, under both of their names in zhihou7/BatchFormer.
            Those of a Mask2Former are always left out.
        no_object_weight: weight of "no object" in the loss, part of a published Mask2Former.

    Raises:
        UserError: lists the keys that have no counterpart there.
    """
    if is_mask2former(state):
        model = _exportable(state, with_block=False)
        return to_official_mask2former(model, no_object_weight=no_object_weight)
    model = _exportable(state, with_block=with_block)
    segm = has_masks(model)
    official = {}
    for name, value in model.items():
        theirs = ours_to_official(name, with_masks=segm)
        assert theirs is not None, name
        official[theirs] = value
        # The fork registers per-layer blocks twice, but a shared block once.
        if ALIASED in theirs and not name.startswith(f"{BLOCKS}shared."):
            official[theirs.replace(ALIASED, ALIAS)] = value
    return official


def not_exported(
    state: Mapping[str, Tensor], *, with_block: bool, masks: bool = True
) -> list[tuple[str, str]]:
    """Return the keys that an export leaves out, with the reason.

    Args:
        state: a state dict.
        with_block: whether the target has BatchFormer blocks.
        masks: whether the target has masks for this model.
    """
    dropped = []
    with_block = with_block and not is_mask2former(state)
    for name in state:
        if name.startswith("semantic_head."):
            dropped.append((name, "the auxiliary head is for training only"))
        elif name.endswith(".num_batches_tracked"):
            dropped.append((name, "exported batch norms are frozen"))
        elif name.startswith(BLOCKS) and not with_block:
            dropped.append((name, "the BatchFormer block is for training only"))
        elif name.startswith("mask_head.") and not masks:
            dropped.append((name, "transformers has no masks for this model"))
        elif is_pilot(name):
            dropped.append((name, "mask-piloted training adds queries in training only"))
    return dropped


def without_training_parts(
    state: Mapping[str, Tensor], *, with_block: bool = False, masks: bool = True
) -> dict[str, Tensor]:
    """Return the weights that an export keeps; see `not_exported`."""
    dropped = {name for name, _ in not_exported(state, with_block=with_block, masks=masks)}
    return {name: value for name, value in state.items() if name not in dropped}


def check_official_input(cfg: CfgNode) -> None:
    """Refuse a model whose preprocessing differs from that of the public code.

    The public Mask2Former has the same config keys, so that any preprocessing can be set there.

    Raises:
        UserError: names the first key that differs.
    """
    if cfg.MODEL.DETR.TRANSFORMER_NAME == "mask2former":
        return
    found = {
        "INPUT.FORMAT": cfg.INPUT.FORMAT,
        "MODEL.PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN),
        "MODEL.PIXEL_STD": list(cfg.MODEL.PIXEL_STD),
    }
    for key, value in TORCHVISION_INPUT.items():
        if found[key] != value:
            raise UserError(
                f"{key} is {found[key]}: facebookresearch/detr uses {value} for all weights"
            )
    if cfg.MODEL.RESNETS.STRIDE_IN_1X1:
        raise UserError("MODEL.RESNETS.STRIDE_IN_1X1 is True: torchvision's ResNet cannot do that")


def check_config(state: Mapping[str, Tensor], cfg: CfgNode) -> None:
    """Refuse a config that does not match the weights, or a model that cannot be exported.

    Raises:
        UserError: names each key that differs.
    """
    model = _exportable(state, with_block=False)
    if is_mask2former(model):
        # The weights do not determine strides and dilation.
        needed = {
            key: value
            for key, value in mask2former_settings(model).items()
            if key not in ("MODEL.RESNETS.STRIDE_IN_1X1", "MODEL.RESNETS.RES5_DILATION")
        }
        SettingsRecord(cfg).check(needed, "the model to be exported")
        return
    needed = {
        **settings_of(model),
        "MODEL.DETR.IN_FEATURE": "res5",
        "MODEL.MASK_ON": has_masks(model),
    }
    if has_masks(model):
        needed["MODEL.MASK_HEAD.IN_FEATURES"] = ["res4", "res3", "res2"]
    SettingsRecord(cfg).check(needed, "the model to be exported")


def to_huggingface(
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    cfg: CfgNode,
    classes: ClassTable | None,
    evaluation: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder for ``from_pretrained`` of transformers, with the same predictions.

    The files are those of ``HUGGINGFACE_FILES``. The folder is written completely or not at all; an
    existing one is replaced.

    Args:
        state: as in `to_official`; BatchFormer blocks are left out.
        folder: to be written.
        cfg: the config of the training.
        classes: names of the classes; None: their indices are the names.
        evaluation: the content of ``model_best.json``, for the model card.

    Raises:
        UserError: transformers is not installed, or does not support the model.
    """
    transformers = _transformers()
    name = cfg.MODEL.DETR.TRANSFORMER_NAME
    if name in DETECTION_CLASSES:
        model = without_training_parts(state, masks=False)
        _check_expressible(model, cfg)
        names = class_names(classes, cfg.MODEL.DETR.NUM_CLASSES)
        config = detection_config(transformers, model, cfg, names)
        theirs = detection_weights(transformers, model, config)
        processor = detection_processor(transformers, cfg)
    elif is_mask2former(state):
        check_config(state, cfg)
        model = _exportable(state, with_block=False)
        mask2former_huggingface.check_expressible(model, cfg)
        config = mask2former_huggingface.huggingface_config(transformers, model, cfg, classes)
        theirs = mask2former_huggingface.huggingface_weights(model, cfg.MODEL.DETR.NO_OBJECT_WEIGHT)
        processor = mask2former_huggingface.image_processor(transformers, cfg)
    else:
        check_config(state, cfg)
        model = _exportable(state, with_block=False)
        config = _huggingface_config(transformers, model, cfg, classes)
        theirs = _huggingface_weights(model)
        processor = _image_processor(transformers, cfg, segm=has_masks(model))
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        with writing(folder):
            _write_folder(temporary, theirs, config, processor)
            card = model_card(cfg, classes, evaluation, class_name=config.architectures[0])
            (temporary / "README.md").write_text(card, encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _huggingface_weights(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    theirs = {}
    for name, value in split_projections(model).items():
        key = ours_to_huggingface(name, with_masks=has_masks(model))
        assert key is not None, name
        theirs[key] = value
    return theirs


def _exportable(state: Mapping[str, Tensor], *, with_block: bool) -> dict[str, Tensor]:
    """Return the exported part of a state dict, which must be a complete published model."""
    model = without_training_parts(state, with_block=with_block)
    if is_mask2former(model):
        refuse_unless_mask2former(model, "the model is not a published Mask2Former")
        return model
    mismatch = compare_with_layout(model)
    refuse_mismatch(
        "the model is not a published DETR",
        leftovers=mismatch.unexpected,
        missing=mismatch.missing,
        wrong_shape=mismatch.wrong_shape,
        remedy="the export supports the transformers 'mask2former' and 'detr', the latter on "
        "Detectron2's ResNet with FrozenBN or BN, and the mask head in its published widths",
    )
    if has_masks(model):
        for name, value in model.items():
            if name.startswith("mask_head.norms.") and value.shape[0] % _GROUPS:
                raise UserError(
                    f"{name} has {value.shape[0]} channels, and published mask heads normalise "
                    f"{_GROUPS} groups: HIDDEN_DIM must be a multiple of 128, NHEADS of {_GROUPS}"
                )
    return model


def _write_folder(folder: Path, weights: dict[str, Tensor], config: Any, processor: Any) -> None:
    folder.mkdir()
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def _transformers() -> Any:
    """Import the optional library, which only the export uses."""
    try:
        return import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"the export needs transformers, which cannot be imported ({one_line(error)}): "
            f"pip install 'batchformer-panoptic[{_EXTRA}]'"
        ) from error


def _huggingface_config(
    transformers: Any, model: Mapping[str, Tensor], cfg: CfgNode, classes: ClassTable | None
) -> Any:
    _check_expressible(model, cfg)
    names = class_names(classes, model["box_head.class_embed.weight"].shape[0] - 1)
    return transformers.DetrConfig(
        **detr_arguments(cfg, names),
        backbone_config=resnet_config(transformers, model, cfg, STAGES),
        eos_coefficient=cfg.MODEL.DETR.NO_OBJECT_WEIGHT,
        architectures=["DetrForSegmentation" if has_masks(model) else "DetrForObjectDetection"],
    )


def _check_expressible(model: Mapping[str, Tensor], cfg: CfgNode) -> None:
    shape = resnet_shape(model)
    problems = {
        "MODEL.DETR.PRE_NORM is True": cfg.MODEL.DETR.PRE_NORM,
        "MODEL.RESNETS.RES5_DILATION is not 1": cfg.MODEL.RESNETS.RES5_DILATION != 1,
        "INPUT.FORMAT is not RGB": cfg.INPUT.FORMAT != "RGB",
        "MODEL.RESNETS.NUM_GROUPS is not 1": cfg.MODEL.RESNETS.NUM_GROUPS != 1,
        "the ResNet's bottlenecks are not a quarter of their output": shape.bottleneck
        and [4 * width for width in shape.inner_widths] != list(shape.widths),
    }
    if found := [problem for problem, is_so in problems.items() if is_so]:
        raise UserError(f"{found[0]}: the DETR of transformers does not support that")


def _image_processor(transformers: Any, cfg: CfgNode, *, segm: bool) -> Any:
    return transformers.DetrImageProcessor(
        format="coco_panoptic" if segm else "coco_detection",
        size={"shortest_edge": cfg.INPUT.MIN_SIZE_TEST, "longest_edge": cfg.INPUT.MAX_SIZE_TEST},
        image_mean=[value / 255 for value in cfg.MODEL.PIXEL_MEAN],
        image_std=[value / 255 for value in cfg.MODEL.PIXEL_STD],
    )
