"""DETR (Carion et al. 2020), and the transformer over one feature map that others share.

Shapes: B images, B' = streams * B, N = H * W tokens, Q queries, C channels, L decoder layers.
"""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...errors import UserError
from ...layers import SinePositionEncoding
from .base import (
    TRANSFORMER_REGISTRY,
    BoxPredictor,
    Transformer,
    TransformerOutput,
    build_batchformer_hook,
    feature_shapes,
)
from .layers import (
    BatchPadding,
    Decoder,
    DecoderLayer,
    DETRDecoder,
    DETREncoder,
    EncoderLayer,
    MemoryGrid,
)


class SingleScaleTransformer(Transformer):
    """Projection, sine positions, encoder and decoder over one backbone map.

    The only difference from facebookresearch/detr is in names: ``query_embed`` and ``input_proj``
    belong to the transformer, and not to the model around it.

    Args:
        in_feature: name of the backbone map.
        in_channels: its channels.
        embed_dim: channels C of tokens and queries.
        num_queries: object queries Q.
        encoder: tokens to memory; its hook may open a second stream.
        decoder: query positions and memory to query states and reference points.
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        in_channels: int,
        embed_dim: int,
        num_queries: int,
        encoder: DETREncoder,
        decoder: Decoder,
    ) -> None:
        super().__init__()
        self.in_features = (in_feature,)
        self.box_biases = (decoder.box_bias,)
        self.position_encoding = SinePositionEncoding(num_channels=embed_dim)
        self.encoder = encoder
        self.decoder = decoder
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)  # as published, the hook's blocks included
        self.query_embed = nn.Embedding(num_queries, embed_dim)
        self.input_proj = nn.Conv2d(in_channels, embed_dim, kernel_size=1)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        input_shape: dict[str, ShapeSpec],
        decoder: Decoder,
    ) -> dict[str, Any]:
        """Translate ``MODEL.DETR`` into constructor arguments."""
        node = cfg.MODEL.DETR
        shape = in_feature_shape(cfg, input_shape)
        encoder = DETREncoder(
            [EncoderLayer(**layer_arguments(cfg)) for _ in range(node.ENC_LAYERS)],
            hook=build_batchformer_hook(cfg),
            norm=nn.LayerNorm(node.HIDDEN_DIM) if node.PRE_NORM else None,
        )
        return {
            "in_feature": node.IN_FEATURE,
            "in_channels": shape.channels,
            "embed_dim": node.HIDDEN_DIM,
            "num_queries": node.NUM_OBJECT_QUERIES,
            "encoder": encoder,
            "decoder": decoder,
        }

    def forward(
        self, features: dict[str, Tensor], padding: BatchPadding, box_head: BoxPredictor
    ) -> TransformerOutput:
        """See :data:`TRANSFORMER_REGISTRY`."""
        projected = self.input_proj(features[self.in_features[0]])
        mask = padding.mask_like(projected)
        height, width = projected.shape[-2:]
        tokens = projected.flatten(2).transpose(1, 2)
        pos = self.position_encoding(mask).flatten(1, 2).to(tokens.dtype)
        key_padding_mask = mask.flatten(1) if padding.is_padded else None

        memory, streams = self.encoder(tokens, pos, key_padding_mask)
        hidden_states, references = self.decoder(
            self.query_embed.weight.expand(memory.shape[0], -1, -1),
            memory,
            streams.expand(pos),
            None if key_padding_mask is None else streams.expand(key_padding_mask),
            MemoryGrid([(height, width)], padding, streams),
        )
        memory_map = memory.transpose(1, 2).unflatten(2, (height, width))
        return TransformerOutput(hidden_states, references, projected, memory_map, mask, streams)


def in_feature_shape(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> ShapeSpec:
    """Channels and stride of the map that ``MODEL.DETR.IN_FEATURE`` names."""
    return feature_shapes("MODEL.DETR.IN_FEATURE", cfg.MODEL.DETR.IN_FEATURE, input_shape)[0]


def layer_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Constructor arguments of DETR's encoder and decoder layers."""
    node = cfg.MODEL.DETR
    return {
        "embed_dim": node.HIDDEN_DIM,
        "num_heads": node.NHEADS,
        "dim_feedforward": node.DIM_FEEDFORWARD,
        "dropout": node.DROPOUT,
        "pre_norm": node.PRE_NORM,
    }


def post_norm_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Constructor arguments of layers that exist as post-norm layers only.

    Raises:
        UserError: the config asks for pre-norm layers.
    """
    arguments = layer_arguments(cfg)
    if arguments.pop("pre_norm"):
        raise UserError(
            "MODEL.DETR.PRE_NORM is True; the transformer "
            f"{cfg.MODEL.DETR.TRANSFORMER_NAME!r} is post-norm: set it to False"
        )
    return arguments


@TRANSFORMER_REGISTRY.register()
def detr(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> SingleScaleTransformer:
    """DETR: absolute boxes, no reference points."""
    layers = [DecoderLayer(**layer_arguments(cfg)) for _ in range(cfg.MODEL.DETR.DEC_LAYERS)]
    decoder = DETRDecoder(layers, embed_dim=cfg.MODEL.DETR.HIDDEN_DIM)
    return SingleScaleTransformer(cfg, input_shape, decoder)
