"""Names of facebookresearch/detr and of its fork zhihou7/BatchFormer, and this project's names."""

from .names import NameTable, Row

AFFINE = r"(?:weight|bias)"
FROZEN_NORM = r"(?:weight|bias|running_mean|running_var)"
_ATTENTION = r"(?:in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
_ENCODER_LAYER = rf"(?:self_attn\.{_ATTENTION}|(?:linear[12]|norm[12])\.{AFFINE})"
_DECODER_LAYER = (
    rf"(?:(?:self_attn|multihead_attn)\.{_ATTENTION}|(?:linear[12]|norm[123])\.{AFFINE})"
)
BLOCKS = "transformer.encoder.batchformer.blocks."

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

# The mask head lies beside the detector, which DETRsegm holds under this prefix.
DETECTOR = "detr."
BESIDE_DETECTOR = ("bbox_attention.", "mask_head.")
# With one block for each layer the fork registers the very same blocks in two places.
ALIAS, ALIASED = "transformer.encoder.bf.", "transformer.bf."


def official_to_ours(name: str) -> str | None:
    """This project's name of an official parameter, None if there is none.

    Args:
        name: with or without the ``detr.`` of DETRsegm. Of the fork's BatchFormer blocks also the
            second name, ``transformer.encoder.bf.*``.
    """
    name = name.removeprefix(DETECTOR)
    if name.startswith(ALIAS):
        name = ALIASED + name.removeprefix(ALIAS)
    return _TABLE.to_ours(name)


def ours_to_official(name: str, *, with_masks: bool = False) -> str | None:
    """The official name of a parameter of this project, None if there is none.

    Args:
        name: as in the state dict of :class:`PanopticDETR`.
        with_masks: whether the detector is part of a DETRsegm and its names begin with ``detr.``.
    """
    official = _TABLE.to_theirs(name)
    if official is None or not with_masks or official.startswith(BESIDE_DETECTOR):
        return official
    return DETECTOR + official
