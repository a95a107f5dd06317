"""Names of facebookresearch/Mask2Former, and this project's names."""

from .core import AFFINE, NameTable, Row

_ATTENTION = r"(?:in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
_DEFORMABLE = r"self_attn\.(?:sampling_offsets|attention_weights|value_proj|output_proj)"
_ENCODER = "pixel_decoder.transformer.encoder.layers.#."
_PIXELS = "transformer.pixel_decoder."
_LAYER = "transformer.decoder.layers.#."

_TABLE = NameTable(
    [
        Row("pixel_decoder.input_proj.#.", f"{_PIXELS}input_proj.#.", rf"[01]\.{AFFINE}"),
        Row("pixel_decoder.transformer.level_embed", f"{_PIXELS}level_embed", ""),
        Row(
            _ENCODER,
            "transformer.encoder.layers.#.",
            rf"(?:{_DEFORMABLE}|norm[12]|linear[12])\.{AFFINE}",
        ),
        Row("pixel_decoder.adapter_1.norm.", f"{_PIXELS}lateral_norm.", AFFINE),
        Row("pixel_decoder.adapter_1.", f"{_PIXELS}lateral.", "weight"),
        Row("pixel_decoder.layer_1.norm.", f"{_PIXELS}output_norm.", AFFINE),
        Row("pixel_decoder.layer_1.", f"{_PIXELS}output.", "weight"),
        Row("pixel_decoder.mask_features.", f"{_PIXELS}mask_features.", AFFINE),
        Row(
            "predictor.transformer_cross_attention_layers.#.multihead_attn.",
            f"{_LAYER}cross_attn.",
            _ATTENTION,
        ),
        Row("predictor.transformer_cross_attention_layers.#.norm.", f"{_LAYER}norm1.", AFFINE),
        Row(
            "predictor.transformer_self_attention_layers.#.self_attn.",
            f"{_LAYER}self_attn.",
            _ATTENTION,
        ),
        Row("predictor.transformer_self_attention_layers.#.norm.", f"{_LAYER}norm2.", AFFINE),
        Row("predictor.transformer_ffn_layers.#.norm.", f"{_LAYER}norm3.", AFFINE),
        Row("predictor.transformer_ffn_layers.#.", _LAYER, rf"linear[12]\.{AFFINE}"),
        Row("predictor.decoder_norm.", "transformer.decoder.norm.", AFFINE),
        Row("predictor.", "transformer.decoder.", r"(?:query_(?:feat|embed)|level_embed)\.weight"),
        Row("predictor.mask_embed.layers.#.", "transformer.decoder.mask_embed.layers.#.", AFFINE),
        Row("predictor.class_embed.", "box_head.class_embed.", AFFINE),
    ]
)


def official_mask2former_to_ours(name: str) -> str | None:
    """This project's name of a parameter, ``sem_seg_head.`` left out; None if there is none."""
    return _TABLE.to_ours(name)
