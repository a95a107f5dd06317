"""A vision Transformer of timm with the BatchFormerV2 hook between its blocks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...batchformer import BatchFormerHook, IdentityHook, StreamState
from ...batchformer.streams import SINGLE


class HookedVisionTransformer(nn.Module):
    """Images to class logits: what timm's VisionTransformer does, and the hook after each block.

    Class token, position embedding and everything else before the first insertion is computed
    once; everything behind it (blocks, norm, head) serves both streams. All tokens, the class token
    among them, go through the batch attention (arXiv 2204.01254, section 3.3 and table of DeiT).

    timm's ``model.set_grad_checkpointing()`` makes each block run again in the backward pass.

    Parameters are called ``model.`` and what timm calls them, those of the hook ``batchformer.``.

    Args:
        model: a ``timm.models.VisionTransformer``; see :func:`is_plain_vision_transformer`.
        hook: acts after block ``i`` (from 0) as after an encoder layer.
    """

    def __init__(self, model: Any, hook: BatchFormerHook | IdentityHook) -> None:
        super().__init__()
        self.model = model
        self.batchformer = hook

    @property
    def num_classes(self) -> int:
        """Number of logits K."""
        return int(self.model.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, StreamState]:
        """Classify a batch.

        Args:
            images: (B, C, H, W), normalised, of the size the model was built for.

        Returns:
            Logits (B', K), and the streams along B'.
        """
        model, streams = self.model, SINGLE
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        recompute = model.grad_checkpointing and torch.is_grad_enabled()
        for index, block in enumerate(model.blocks):
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
            tokens, streams = self.batchformer.after_layer(index, tokens, streams, None)
        return model.forward_head(model.norm(tokens)), streams


def is_plain_vision_transformer(model: Any) -> bool:
    """Whether a timm model is one whose forward pass :class:`HookedVisionTransformer` knows.

    Subclasses that pass in another way (distilled DeiT with its second token and head) and models
    that only look alike (EVA, relative positions) are not.
    """
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(model, VisionTransformer) and all(
        getattr(type(model), name) is getattr(VisionTransformer, name)
        for name in ("forward", "forward_features", "forward_head", "_pos_embed")
    )
