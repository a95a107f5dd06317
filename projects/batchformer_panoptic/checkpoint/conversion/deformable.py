"""Deformable-DETR (fundamentalvision/Deformable-DETR) and its BatchFormer fork: names, weights."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.class_table import ClassTable
from .core import (
    AFFINE,
    BLOCKS,
    CLASS_KEYS,
    NO_STATISTICS_COUNT,
    REMEDY,
    TORCHVISION_INPUT,
    Converted,
    NameTable,
    Renamed,
    Request,
    Row,
    refuse_mismatch,
    rename,
    select_class_rows,
    wrong_shapes,
)
from .detr import (
    ALIAS,
    ALIASED,
    UNKNOWN_DEPTH,
    block_notes,
    official_to_ours,
    refuse_without_block,
)
from .layout import (
    block_layout,
    compare_with_layout,
    settings_of,
    transformer_layout,
    transformer_settings,
)

_PUBLISHED_HEADS, _PUBLISHED_POINTS = 8, 4
_WHAT = "the weights are not a Deformable-DETR that can be converted"

_HEAD, _LAYER_HEADS = "box_head.", "box_head.layers."
_QUERIES = "transformer.query_embed.weight"
_LEVELS = "transformer.level_embed"
_ENCODER, _DECODER = "transformer.encoder.layers.", "transformer.decoder.layers."
_PROJECTION = "transformer.projection.levels."
# Config key: the weight with one number for each head, level and point.
_POINTS = {
    "MODEL.DEFORMABLE.ENC_POINTS": f"{_ENCODER}0.self_attn.attention_weights.bias",
    "MODEL.DEFORMABLE.DEC_POINTS": f"{_DECODER}0.cross_attn.attention_weights.bias",
}
_STAGES = ("res2", "res3", "res4", "res5")
_PROPOSALS = "transformer.proposal_stage."

_SAMPLING = r"(?:sampling_offsets|attention_weights|value_proj|output_proj)\."
_SELF_ATTENTION = r"self_attn\.(?:in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
_ENCODER_LAYER = rf"(?:self_attn\.{_SAMPLING}|linear[12]\.|norm[12]\.){AFFINE}"
_DECODER_LAYER = (
    rf"(?:{_SELF_ATTENTION}|(?:cross_attn\.{_SAMPLING}|linear[12]\.|norm[123]\.){AFFINE})"
)

_TRANSFORMER = [
    *(
        Row(f"input_proj.#.{part}.", f"transformer.projection.levels.#.{part}.", AFFINE)
        for part in (0, 1)
    ),
    Row("query_embed.", "transformer.query_embed.", "weight"),
    Row("transformer.level_embed", "transformer.level_embed", ""),
    Row("transformer.reference_points.", "transformer.reference_points.", AFFINE),
    Row("transformer.encoder.layers.#.", "transformer.encoder.layers.#.", _ENCODER_LAYER),
    Row("transformer.decoder.layers.#.", "transformer.decoder.layers.#.", _DECODER_LAYER),
    *(
        Row(f"transformer.{part}.", f"transformer.proposal_stage.{part}.", AFFINE)
        for part in ("enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")
    ),
]


def _box_heads(ours: str) -> list[Row]:
    """Rows of the box heads, stored once per layer and, for refinement, again in the decoder."""
    return [
        row
        for theirs in ("", "transformer.decoder.")
        for row in (
            Row(f"{theirs}class_embed.#.", f"{ours}class_embed.", AFFINE),
            *(
                Row(f"{theirs}bbox_embed.#.layers.{i}.", f"{ours}bbox_embed.layers.{i}.", AFFINE)
                for i in range(3)
            ),
        )
    ]


_SHARED_HEAD = NameTable([*_TRANSFORMER, *_box_heads("box_head.")])
_LAYERWISE_HEADS = NameTable([*_TRANSFORMER, *_box_heads("box_head.layers.#.")])


def official_deformable_to_ours(name: str, *, box_refine: bool) -> str | None:
    """Return this project's name of an official parameter, or None.

    Args:
        name: in a checkpoint of Deformable-DETR or its BatchFormer fork. A parameter may have
            several names: heads are stored per layer and again in the decoder.
        box_refine: True: each layer has its own head, which refines boxes; False: all layers share
            one head.
    """
    if name.startswith(("backbone.", ALIAS, ALIASED)):
        return official_to_ours(name)
    return (_LAYERWISE_HEADS if box_refine else _SHARED_HEAD).to_ours(name)


def convert_deformable(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a Deformable-DETR; the names distinguish plain, box refinement and two-stage models.

    The 91 class rows are indexed by COCO's class ids. The head of the proposals keeps its row 0 for
    any classes, since it separates objects from background.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    refines = any(key.startswith("transformer.decoder.bbox_embed.") for key in state)

    def new_name(key: str) -> str | None:
        name = official_deformable_to_ours(key, box_refine=refines)
        return None if name is None or name.startswith(BLOCKS) else name

    renamed = rename(state, new_name, [NO_STATISTICS_COUNT], request)
    _refuse_unknown_sizes(renamed)
    settings = _settings(renamed.model, box_refine=refines)
    heads = _head_prefixes(settings)
    _refuse_wrong_layout(renamed, settings, heads)
    resnet_and_sizes = settings_of(_as_detr(renamed.model, heads[0]))
    model, notes = _select_rows(renamed.model, heads, settings, request.classes)
    settings = {
        **TORCHVISION_INPUT,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        **resnet_and_sizes,
        **settings,
    }
    return Converted(model, renamed.dropped, [*notes, *_drop_unknown(settings, model)], settings)


def convert_deformable_batchformer(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a Deformable-DETR of zhihou7/BatchFormer including its blocks.

    Raises:
        UserError: as in `convert_deformable`, or the weights have no block.
    """
    of_blocks = {k: v for k, v in state.items() if k.startswith((ALIAS, ALIASED))}
    renamed = rename(of_blocks, official_to_ours, [], request)
    refuse_without_block(renamed.model)
    converted = convert_deformable({k: state[k] for k in state.keys() - of_blocks.keys()}, request)
    expected = dict(block_layout(renamed.model, converted.settings["MODEL.DETR.HIDDEN_DIM"]))
    refuse_mismatch(
        _WHAT,
        leftovers=renamed.leftovers,
        missing=expected.keys() - renamed.model.keys(),
        wrong_shape=wrong_shapes(renamed.model, expected),
        remedy=REMEDY,
    )
    return converted._replace(
        model={**converted.model, **renamed.model},
        dropped=[*converted.dropped, *renamed.dropped],
        notes=[*converted.notes, *block_notes(renamed.model)],
    )


def _refuse_unknown_sizes(renamed: Renamed) -> None:
    """Raise UserError if a weight is absent from which a size is read."""
    needed = [_LEVELS, *_POINTS.values(), f"{_ENCODER}0.linear1.weight"]
    if not _has_two_stages(renamed.model):
        needed.append(_QUERIES)
    missing = [name for name in needed if name not in renamed.model]
    leftovers = renamed.leftovers if missing else []
    refuse_mismatch(_WHAT, leftovers=leftovers, missing=missing, remedy=REMEDY)


def _settings(model: Mapping[str, Tensor], *, box_refine: bool) -> dict[str, Any]:
    """Config keys of the transformer.

    Only the product of heads and points is known. It is split into the published numbers if it is
    their product; otherwise NHEADS is 1 and marks the split as unknown.
    """
    num_levels = len(model[_LEVELS])
    projections = [f"{_PROJECTION}{level}.0.weight" for level in range(num_levels)]
    pointwise = sum(name in model and model[name].shape[-1] == 1 for name in projections)
    products = {key: len(model[name]) // num_levels for key, name in _POINTS.items()}
    published = set(products.values()) == {_PUBLISHED_HEADS * _PUBLISHED_POINTS}
    heads = _PUBLISHED_HEADS if published else 1
    return {
        **transformer_settings(_as_detr(model, _HEAD)),
        "MODEL.DETR.TRANSFORMER_NAME": "deformable",
        "MODEL.DETR.SCORING": "focal",
        "MODEL.DETR.NHEADS": heads,
        "MODEL.DEFORMABLE.IN_FEATURES": list(_STAGES[-max(pointwise, 1) :]),
        "MODEL.DEFORMABLE.NUM_FEATURE_LEVELS": num_levels,
        **{key: value // heads for key, value in products.items()},
        "MODEL.DEFORMABLE.BOX_REFINE": box_refine,
        "MODEL.DEFORMABLE.TWO_STAGE": _has_two_stages(model),
    }


def _drop_unknown(settings: dict[str, Any], model: Mapping[str, Tensor]) -> list[str]:
    """Remove settings that are guesses; return a line for the user about each of them."""
    notes = []
    if _QUERIES not in model:
        del settings["MODEL.DETR.NUM_OBJECT_QUERIES"]
        notes.append("the weights do not determine MODEL.DETR.NUM_OBJECT_QUERIES; published: 300")
    if settings["MODEL.DETR.NHEADS"] != _PUBLISHED_HEADS:
        del settings["MODEL.DETR.NHEADS"]
        products = " and ".join(f"{settings.pop(key)} for {key}" for key in _POINTS)
        notes.append(f"MODEL.DETR.NHEADS times the number of points must be {products}")
    if "MODEL.RESNETS.DEPTH" not in settings:
        notes.append(UNKNOWN_DEPTH)
    return notes


def _has_two_stages(model: Collection[str]) -> bool:
    """Whether queries are derived from proposals instead of being learned."""
    return _QUERIES not in model and any(name.startswith(_PROPOSALS) for name in model)


def _head_prefixes(settings: Mapping[str, Any]) -> list[str]:
    """Prefix of the shared box head, or of the heads of each layer and then of the proposals."""
    if not settings["MODEL.DEFORMABLE.BOX_REFINE"]:
        return [_HEAD]
    count = settings["MODEL.DETR.DEC_LAYERS"] + settings["MODEL.DEFORMABLE.TWO_STAGE"]
    return [f"{_LAYER_HEADS}{index}." for index in range(count)]


def _as_detr(model: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    """View the weights as a DETR's, with one of the box heads and one vector per query.

    A query of Deformable-DETR has two vectors, and one of a two-stage model has no weights.
    """
    view = {name: value for name, value in model.items() if not name.startswith(_HEAD)}
    view |= {_HEAD + k.removeprefix(head): v for k, v in model.items() if k.startswith(head)}
    queries = model.get(_QUERIES)
    view[_QUERIES] = torch.empty(1 if queries is None else len(queries), model[_LEVELS].shape[1])
    return view


def _refuse_wrong_layout(
    renamed: Renamed, settings: Mapping[str, Any], heads: Sequence[str]
) -> None:
    """Raise UserError unless the names and shapes are exactly those of the layout."""
    model = renamed.model
    unexpected = [
        name for name in model if name.startswith(_HEAD) and not name.startswith(tuple(heads))
    ]
    leftovers, missing, wrong = [*renamed.leftovers, *unexpected], list[str](), list[str]()
    layout = transformer_layout(_as_detr(model, heads[0]), settings, _WHAT)
    if _QUERIES in model and tuple(model[_QUERIES].shape) != layout[_QUERIES]:
        wrong.append(f"{_QUERIES}: {tuple(model[_QUERIES].shape)} instead of {layout[_QUERIES]}")
    for head in heads:
        view = _as_detr(model, head)
        layout[_QUERIES] = tuple(view[_QUERIES].shape)
        mismatch = compare_with_layout(view, layout)
        for found, kind in (
            (mismatch.unexpected, leftovers),
            (mismatch.missing, missing),
            (mismatch.wrong_shape, wrong),
        ):
            # Heads get their own names back. Other keys are found once per head: see set() below.
            kind += [head + n.removeprefix(_HEAD) if n.startswith(_HEAD) else n for n in found]
    lists = {"leftovers": leftovers, "missing": missing, "wrong_shape": wrong}
    refuse_mismatch(_WHAT, **{kind: set(names) for kind, names in lists.items()}, remedy=REMEDY)


def _select_rows(
    model: Mapping[str, Tensor],
    heads: Sequence[str],
    settings: Mapping[str, Any],
    classes: ClassTable | None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Select the class rows of every head; also return lines for the user."""
    result, notes = dict(model), list[str]()
    for head in heads:
        keys = [head + key.removeprefix(_HEAD) for key in CLASS_KEYS]
        one = dict(zip(CLASS_KEYS, (model[key] for key in keys), strict=True))
        selected, notes = select_class_rows(one, classes, no_object=False)
        for key, name in zip(CLASS_KEYS, keys, strict=True):
            rows = selected[key]
            if settings["MODEL.DEFORMABLE.TWO_STAGE"] and head == heads[-1]:
                rows = torch.cat([model[name][:1], rows[1:]])  # row 0: object
            result[name] = rows
    return result, notes
