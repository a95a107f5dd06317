"""The BatchFormerV2 hook that a config asks for, for whatever encoder."""

from collections.abc import Sequence

from detectron2.config import CfgNode

from ..batchformer import BatchFormerHook, IdentityHook
from ..errors import UserError


def build_hook(
    cfg: CfgNode, *, embed_dim: int, num_layers: int, layers_are: str
) -> IdentityHook | BatchFormerHook:
    """Build the hook that ``cfg.MODEL.BATCHFORMER`` describes.

    Args:
        cfg: the whole config.
        embed_dim: channels of a token.
        num_layers: layers of the encoder.
        layers_are: where this number comes from, for messages ("MODEL.DETR.ENC_LAYERS is 6").

    Raises:
        UserError: a block would sit after a layer that does not exist.
    """
    node = cfg.MODEL.BATCHFORMER
    if not node.ENABLED:
        return IdentityHook()
    _check_insert_layers(node.INSERT_LAYERS, num_layers, layers_are)
    return BatchFormerHook(
        embed_dim,
        insert_layers=node.INSERT_LAYERS,
        num_heads=node.NUM_HEADS,
        dim_feedforward=node.DIM_FEEDFORWARD or None,
        dropout=node.DROPOUT,
        shared=node.SHARED,
        mask_padding=node.MASK_PADDING,
    )


def _check_insert_layers(insert_layers: Sequence[int], num_layers: int, layers_are: str) -> None:
    layers = list(insert_layers)
    in_range = all(0 <= layer < num_layers for layer in layers)
    if not layers or not in_range or len(set(layers)) != len(layers):
        raise UserError(
            f"MODEL.BATCHFORMER.INSERT_LAYERS is {layers}; it must name distinct encoder layers "
            f"from 0 to {num_layers - 1} ({layers_are})"
        )
