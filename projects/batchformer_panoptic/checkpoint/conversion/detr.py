"""DETR (facebookresearch/detr), its BatchFormer fork and its Detectron2 wrapper: names, weights."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .core import (
    AFFINE,
    BLOCKS,
    CLASS_KEYS,
    FROZEN_NORM,
    NO_STATISTICS_COUNT,
    REMEDY,
    TORCHVISION_INPUT,
    Allowed,
    Converted,
    NameTable,
    Renamed,
    Request,
    Row,
    refuse_mismatch,
    rename,
    select_class_rows,
)
from .layout import block_names, compare_with_layout, settings_of

# Names.

_ATTENTION = r"(?:in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
_ENCODER_LAYER = rf"(?:self_attn\.{_ATTENTION}|(?:linear[12]|norm[12])\.{AFFINE})"
_DECODER_LAYER = (
    rf"(?:(?:self_attn|multihead_attn)\.{_ATTENTION}|(?:linear[12]|norm[123])\.{AFFINE})"
)

# Parts of a ResNet block: torchvision's names, Detectron2's names.
_BLOCK_PARTS = [
    *((f"conv{i}.", f"conv{i}.", "weight") for i in (1, 2, 3)),
    *((f"bn{i}.", f"conv{i}.norm.", FROZEN_NORM) for i in (1, 2, 3)),
    ("downsample.0.", "shortcut.", "weight"),
    ("downsample.1.", "shortcut.norm.", FROZEN_NORM),
]

_TABLE = NameTable(
    [
        Row("backbone.0.body.conv1.", "backbone.stem.conv1.", "weight"),
        Row("backbone.0.body.bn1.", "backbone.stem.conv1.norm.", FROZEN_NORM),
        *(
            Row(f"backbone.0.body.layer{i}.#.{theirs}", f"backbone.res{i + 1}.#.{ours}", tail)
            for i in (1, 2, 3, 4)
            for theirs, ours, tail in _BLOCK_PARTS
        ),
        Row("input_proj.", "transformer.input_proj.", AFFINE),
        Row("query_embed.", "transformer.query_embed.", "weight"),
        Row("transformer.encoder.layers.#.", "transformer.encoder.layers.#.", _ENCODER_LAYER),
        Row("transformer.encoder.norm.", "transformer.encoder.norm.", AFFINE),
        Row("transformer.decoder.layers.#.", "transformer.decoder.layers.#.", _DECODER_LAYER),
        Row("transformer.decoder.norm.", "transformer.decoder.norm.", AFFINE),
        Row("transformer.bf.#.", f"{BLOCKS}#.", _ENCODER_LAYER),
        Row("transformer.bf.", f"{BLOCKS}shared.", _ENCODER_LAYER),
        Row("class_embed.", "box_head.class_embed.", AFFINE),
        Row("bbox_embed.layers.#.", "box_head.bbox_embed.layers.#.", AFFINE),
        Row("bbox_attention.q_linear.", "mask_head.attention.q_linear.", AFFINE),
        Row("bbox_attention.k_linear.", "mask_head.attention.k_linear.", AFFINE),
        *(Row(f"mask_head.lay{i + 1}.", f"mask_head.convs.{i}.", AFFINE) for i in range(5)),
        *(Row(f"mask_head.gn{i + 1}.", f"mask_head.norms.{i}.", AFFINE) for i in range(5)),
        *(Row(f"mask_head.adapter{i + 1}.", f"mask_head.adapters.{i}.", AFFINE) for i in range(3)),
        Row("mask_head.out_lay.", "mask_head.predictor.", AFFINE),
    ]
)

# DETRsegm holds the detector under this prefix, and the mask head next to it.
DETECTOR = "detr."
BESIDE_DETECTOR = ("bbox_attention.", "mask_head.")
# With one block per layer, the fork registers the same blocks in two places.
ALIAS, ALIASED = "transformer.encoder.bf.", "transformer.bf."


def official_to_ours(name: str) -> str | None:
    """Return this project's name of an official parameter, or None.

    Args:
        name: with or without the ``detr.`` of DETRsegm. Both names of the fork's BatchFormer blocks
            are accepted, ``transformer.bf.*`` and ``transformer.encoder.bf.*``.
    """
    name = name.removeprefix(DETECTOR)
    if name.startswith(ALIAS):
        name = ALIASED + name.removeprefix(ALIAS)
    return _TABLE.to_ours(name)


def ours_to_official(name: str, *, with_masks: bool = False) -> str | None:
    """Return the official name of a parameter of this project, or None.

    Args:
        name: as in the state dict of `PanopticDETR`.
        with_masks: whether the detector is part of a DETRsegm, so that its names start with
            ``detr.``.
    """
    official = _TABLE.to_theirs(name)
    if official is None or not with_masks or official.startswith(BESIDE_DETECTOR):
        return official
    return DETECTOR + official


# Converters.

_NO_CRITERION = Allowed(
    "criterion.empty_weight", "class weights of the loss, here MODEL.DETR.NO_OBJECT_WEIGHT"
)
_WRAPPER_BACKBONE = "backbone.0.backbone."
UNKNOWN_DEPTH = "the numbers of blocks of the ResNet match no MODEL.RESNETS.DEPTH"


def convert_official(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a DETR or DETRsegm of facebookresearch/detr.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    return _convert_official(state, request, with_block=False)


def convert_batchformer(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a DETR of zhihou7/BatchFormer including its blocks, for further training.

    Raises:
        UserError: as in `convert_official`, or the weights have no block.
    """
    return _convert_official(state, request, with_block=True)


def convert_detectron2(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a checkpoint of the Detectron2 wrapper, facebookresearch/detr in ``d2/``.

    Raises:
        UserError: as in `convert_official`.
    """
    allowed = [NO_STATISTICS_COUNT, _NO_CRITERION]
    renamed = rename(state, _wrapper_to_ours, allowed, request)
    converted = finish(renamed, request, input_settings=TORCHVISION_INPUT)
    weight, bias = (renamed.model[key] for key in CLASS_KEYS)
    if torch.equal(weight[-1], weight[0]) and torch.equal(bias[-1], bias[0]):
        converted.notes.append(
            "the 'no object' row is a copy of the first class, as written by the wrapper's own "
            "converter: no query can prefer 'no object'; convert the official file instead if you "
            "have it"
        )
    return converted


def _convert_official(state: dict[str, Tensor], request: Request, *, with_block: bool) -> Converted:
    new_name = official_to_ours if with_block else _without_block(official_to_ours)
    renamed = rename(state, new_name, [NO_STATISTICS_COUNT], request)
    if with_block:
        refuse_without_block(renamed.model)
    return finish(renamed, request, input_settings=TORCHVISION_INPUT)


def _without_block(new_name: Callable[[str], str | None]) -> Callable[[str], str | None]:
    def translate(key: str) -> str | None:
        name = new_name(key)
        return None if name is None or name.startswith(BLOCKS) else name

    return translate


def _wrapper_to_ours(key: str) -> str | None:
    """Translate the wrapper's names: "detr." and DETR's or DETRsegm's, Detectron2's backbone."""
    if not key.startswith("detr."):
        return None
    inner = key.removeprefix("detr.")
    if (part := inner.removeprefix("detr.")).startswith(_WRAPPER_BACKBONE):
        # Detectron2's own names; those that are not part of a ResNet are found later as unexpected.
        name = "backbone." + part.removeprefix(_WRAPPER_BACKBONE)
        return None if name.endswith(".num_batches_tracked") else name
    return official_to_ours(inner)


def finish(renamed: Renamed, request: Request, *, input_settings: dict[str, Any]) -> Converted:
    """Check that the weights are complete, select the class rows and collect the settings.

    Args:
        renamed: weights in this project's names.
        request: the options of the conversion.
        input_settings: config keys of the pixel normalisation.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    mismatch = compare_with_layout(renamed.model)
    refuse_mismatch(
        "the weights are not a DETR that can be converted",
        leftovers=[*renamed.leftovers, *renamed.old_keys(mismatch.unexpected)],
        missing=mismatch.missing,
        wrong_shape=mismatch.wrong_shape,
        remedy=REMEDY,
    )
    model, notes = select_class_rows(renamed.model, request.classes)
    settings = {**input_settings, "MODEL.RESNETS.STRIDE_IN_1X1": False, **settings_of(model)}
    if "MODEL.RESNETS.DEPTH" not in settings:
        notes.append(UNKNOWN_DEPTH)
    return Converted(model, renamed.dropped, [*notes, *block_notes(model)], settings)


# BatchFormer blocks.


def refuse_without_block(model: Collection[str]) -> None:
    """Raise UserError unless the weights contain a BatchFormer block."""
    if not block_names(model):
        refuse_mismatch(
            "the weights have no BatchFormer block",
            missing=["transformer.bf.*"],
            remedy="use the --source of the plain model",
        )


def block_notes(model: Collection[str]) -> Sequence[str]:
    """Return lines on how to continue training with the blocks."""
    blocks = block_names(model)
    if not blocks:
        return []
    if blocks == ["shared"]:
        layers = "MODEL.BATCHFORMER.SHARED True, and INSERT_LAYERS, unknown from the weights"
        return [f"to continue training in two streams: MODEL.BATCHFORMER.ENABLED True, {layers}"]
    return [
        "to continue training in two streams: MODEL.BATCHFORMER.ENABLED True, INSERT_LAYERS "
        f"[{', '.join(blocks)}]"
    ]


# Settings that the weights do not determine.


def settings_of_args(args: Any) -> dict[str, Any]:
    """Read config keys from the command line that official training checkpoints keep as "args".

    Args:
        args: an ``argparse.Namespace``; absent attributes are skipped.
    """
    settings: dict[str, Any] = {}
    if isinstance(nheads := getattr(args, "nheads", None), int):
        settings["MODEL.DETR.NHEADS"] = nheads
    if isinstance(smooth := getattr(args, "smooth", None), int | float):  # of SMCA
        settings["MODEL.SMCA.SMOOTH"] = float(smooth)
    if isinstance(dilation := getattr(args, "dilation", None), bool):
        settings.update(dilation_settings(dilation))
    return settings


def dilation_settings(dilated: bool) -> dict[str, Any]:
    """Return the config keys of a ResNet with or without dilation in its last stage (DC5)."""
    if not dilated:
        return {"MODEL.RESNETS.RES5_DILATION": 1}
    return {
        "MODEL.BACKBONE.NAME": "build_resnet_dc5_backbone",
        "MODEL.RESNETS.RES5_DILATION": 2,
    }


def open_questions(settings: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that the weights do not determine.

    Args:
        settings: those known from the weights and the files next to them.
    """
    questions = {
        "MODEL.DETR.NHEADS": "the weights do not determine MODEL.DETR.NHEADS; published: 8",
        "MODEL.RESNETS.RES5_DILATION": (
            "the weights do not determine whether res5 is dilated; a model called DC5 needs "
            + ", ".join(f"{key} {value}" for key, value in dilation_settings(True).items())
        ),
    }
    transformer = settings.get("MODEL.DETR.TRANSFORMER_NAME")
    if transformer is None:
        return []  # a backbone only
    if settings.get("MODEL.BACKBONE.NAME") == "build_swin_backbone":
        del questions["MODEL.RESNETS.RES5_DILATION"]
    if transformer.startswith("smca"):
        questions["MODEL.SMCA.SMOOTH"] = (
            "the weights do not determine MODEL.SMCA.SMOOTH (--smooth); published: 8"
        )
    return [question for key, question in questions.items() if key not in settings]
