"""Weights and names of Atten4Vis/ConditionalDETR."""

from torch import Tensor

from .detr import NO_STATISTICS_COUNT
from .focal import finish_focal
from .names import NameTable, Row
from .official import AFFINE, official_to_ours
from .rules import Converted, Request, rename

_PROJECTIONS = (
    r"(?:sa_(?:qcontent|qpos|kcontent|kpos|v)|ca_(?:qcontent|qpos|kcontent|kpos|v|qpos_sine))_proj"
)
_SAME = [
    ("transformer.decoder.layers.#.", rf"(?:{_PROJECTIONS}|cross_attn\.out_proj)\.{AFFINE}"),
    ("transformer.decoder.query_scale.layers.#.", AFFINE),
    ("transformer.decoder.ref_point_head.layers.#.", AFFINE),
]
_TABLE = NameTable([Row(prefix, prefix, tail) for prefix, tail in _SAME])


def official_conditional_to_ours(name: str) -> str | None:
    """This project's name of an official parameter, None if there is none."""
    return _TABLE.to_ours(name) or official_to_ours(name)


def convert_conditional(state: dict[str, Tensor], request: Request) -> Converted:
    """Convert a Conditional-DETR for boxes; its 91 class rows are numbered as COCO's files do.

    Raises:
        UserError: lists every key that is left over, missing, or has another shape.
    """
    renamed = rename(state, official_conditional_to_ours, [NO_STATISTICS_COUNT], request)
    settings = {"MODEL.DETR.TRANSFORMER_NAME": "conditional"}
    return finish_focal(renamed, request, what="Conditional-DETR", settings=settings)
