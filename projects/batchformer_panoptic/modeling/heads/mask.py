"""Heads for masks: DETR's mask head, products of queries and pixels, and auxiliary pixel classes.

Shapes: K chosen queries gathered from all images, B' = streams * B, h heads, C channels.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...layers import conv_upsampled
from ..set_prediction.predictions import MaskSelector, QueryMasks
from ..transformer import TransformerOutput


class AttentionMap(nn.Module):
    """Attention of each query over the memory, one map per head, without values.

    The softmax runs over heads and positions together, as published
    (``MHAttentionMap`` of facebookresearch/detr).
    """

    def __init__(self, *, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(embed_dim, embed_dim)
        self.k_linear = nn.Linear(embed_dim, embed_dim)
        for layer in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, queries: Tensor, memory_map: Tensor, padding_mask: Tensor, image_index: Tensor
    ) -> Tensor:
        """Attention maps of the chosen queries.

        Args:
            queries: (K, C).
            memory_map: (B', C, H, W).
            padding_mask: (B', H, W) bool, True where a cell is padding.
            image_index: (K,) int64, the batch entry of each query.

        Returns:
            (K, heads, H, W), non-negative; sums to 1 over heads and valid cells.
        """
        height, width = memory_map.shape[-2:]
        query = self.q_linear(queries).unflatten(1, (self.num_heads, -1))
        query = query / math.sqrt(query.shape[-1])
        key = self.k_linear(memory_map.flatten(2).transpose(1, 2))  # (B', H * W, C)
        key = key.unflatten(2, (self.num_heads, -1))
        key = _of_entries(key, image_index)  # (K, H * W, heads, C / heads)
        scores = torch.einsum("khc,knhc->khn", query, key)
        ignored = _of_entries(padding_mask.flatten(1), image_index)[:, None]
        # Half precision is too coarse for a softmax over thousands of cells.
        precise = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.masked_fill(ignored, -math.inf).flatten(1).softmax(dim=1, dtype=precise)
        return weights.view(-1, self.num_heads, height, width).to(scores.dtype)


class ImagePartNorm(nn.GroupNorm):
    """Adds the part of a convolution that depends on the image only, then group norm and ReLU."""

    def forward(self, x: Tensor, of_image: Tensor, image_index: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise.

        Args:
            x: (K, C, H, W), the part that depends on the query; it may be changed.
            of_image: (B, C, H, W).
            image_index: (K,) int64, the image of each query.

        Returns:
            (K, C, H, W).
        """
        part = _of_entries(of_image, image_index)
        # A compiled sum is part of the kernel after it; in place it would be stored as well.
        total = x + part if torch.compiler.is_compiling() else x.add_(part)
        return F.relu_(super().forward(total))


class MaskHead(nn.Module):
    """Masks of chosen queries at the resolution of the finest backbone map.

    DETR, section 4.4 (``MaskHeadSmallConv``): convolutions combine the projected map with the
    attention maps, and upsample them through three backbone maps. Queries are independent, so
    the masks of some queries can be computed without the others.

    Four of the five convolutions read a sum or a concatenation of a part that depends on the query
    and a part that depends on the image only (projected map, adapted backbone maps). Since
    convolutions are linear, the image part is computed once per image, for all queries and both
    streams, and the query part of an upsampled map is computed from the small map
    (:func:`conv_upsampled`).

    Group norm uses 8 groups as published where 8 divides the channels, and otherwise their greatest
    common divisor.

    Args:
        embed_dim: channels C of memory and queries; a multiple of 16.
        num_heads: attention maps of a query.
        in_channels: names and channels of the three backbone maps that are read, coarse to fine.
        channels: output channels of the second to the fifth convolution. None: C / 2, C / 4, C / 8,
            C / 16, as published.
        max_step_bytes: approximate memory limit for the maps of the queries that are decoded at a
            time. Results differ by rounding only.

    Raises:
        ValueError: an unusable number of channels or maps.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        in_channels: Mapping[str, int],
        channels: Sequence[int] | None = None,
        max_step_bytes: int = 2**33,
    ) -> None:
        super().__init__()
        if channels is None:
            if embed_dim % 16:
                raise ValueError(f"embed_dim must be a multiple of 16, not {embed_dim}")
            channels = [embed_dim // 2**i for i in range(1, 5)]
        if len(channels) != 4:
            raise ValueError(f"the mask head needs four widths, not {list(channels)}")
        if len(in_channels) != 3:
            raise ValueError(f"the mask head reads three backbone maps, not {len(in_channels)}")
        first = embed_dim + num_heads
        widths = [first, first, *channels]
        self.in_features = tuple(in_channels)
        self.embed_dim = embed_dim
        self.max_step_bytes = max_step_bytes
        self.attention = AttentionMap(embed_dim=embed_dim, num_heads=num_heads)
        self.convs = nn.ModuleList(
            nn.Conv2d(n_in, n_out, kernel_size=3, padding=1) for n_in, n_out in pairwise(widths)
        )
        self.norms = nn.ModuleList(
            (nn.GroupNorm if i == 1 else ImagePartNorm)(math.gcd(8, n), n)
            for i, n in enumerate(widths[1:])
        )
        self.adapters = nn.ModuleList(
            nn.Conv2d(n_in, n_out, kernel_size=1)
            for n_in, n_out in zip(in_channels.values(), widths[2:5], strict=True)
        )
        self.predictor = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)
        for conv in [*self.convs, *self.adapters, self.predictor]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, output: TransformerOutput, features: Mapping[str, Tensor]) -> MaskSelector:
        """Return a function that computes the masks of chosen queries.

        Args:
            output: the output of the transformer.
            features: backbone maps (B, C_i, H_i, W_i) by name, not expanded.

        Returns:
            A selector of (K, H_3, W_3) mask logits; K may be 0.
        """
        return partial(self.decode, output, features)

    def decode(
        self,
        output: TransformerOutput,
        features: Mapping[str, Tensor],
        layer_index: Tensor | int,
        image_index: Tensor,
        query_index: Tensor,
    ) -> Tensor:
        """Decode the masks of chosen queries.

        Args:
            output: the output of the transformer.
            features: backbone maps (B, C_i, H_i, W_i) by name, not expanded.
            layer_index: (K,) int64 layers of ``output``, or one for all; -1 is the last.
            image_index: (K,) int64 in [0, B').
            query_index: (K,) int64 in [0, Q).

        Returns:
            (K, H_3, W_3) mask logits; K may be 0.
        """
        streams = output.streams
        queries = output.hidden_states[layer_index, image_index, query_index]
        attention = self.attention(
            queries, output.memory_map, streams.expand(output.padding_mask), image_index
        )
        source_index = streams.image_of(image_index, output.projected_map.shape[0])
        maps = [features[name] for name in self.in_features]
        of_image = self._image_parts(output.projected_map, maps)
        step = self.queries_per_step(of_image)
        decode = partial(self._decode, of_image)
        if torch.compiler.is_exporting():  # with an unknown number of queries
            return decode(attention, source_index)
        if len(queries) > step and torch.is_grad_enabled():
            # The maps of a step are not kept but computed again in the backward pass.
            decode = partial(checkpoint, decode, use_reentrant=False)
        if len(queries) <= step:
            return decode(attention, source_index)
        parts = zip(attention.split(step), source_index.split(step), strict=True)
        return torch.cat([decode(*part) for part in parts])

    def queries_per_step(self, of_image: Sequence[Tensor]) -> int:
        """The number of queries that the memory limit allows at a time; at least one."""
        # The outputs of convolution and norm and one temporary of each upsampled level.
        values = 3 * sum(part[0].numel() for part in of_image[1:])
        # Under autocast group norms return float32.
        return max(1, self.max_step_bytes // (values * max(4, of_image[0].element_size())))

    def _decode(
        self, of_image: Sequence[Tensor], attention: Tensor, source_index: Tensor
    ) -> Tensor:
        """(K, H_3, W_3) masks of (K, heads, H_0, W_0) attention maps on the (K,) images.

        ``of_image`` holds the image parts of the first and of the last three convolutions.
        """
        x = F.conv2d(attention, self._first_weights()[1], padding=1)
        x = self.norms[0](x, of_image[0], source_index)
        x = F.relu_(self.norms[1](self.convs[1](x)))
        for conv, norm, part in zip(self.convs[2:], self.norms[2:], of_image[1:], strict=True):
            assert isinstance(conv, nn.Conv2d)
            x = conv_upsampled(x, conv.weight, (part.shape[-2], part.shape[-1]))
            x = norm(x, part, source_index)
        return self.predictor(x)[:, 0]

    def _image_parts(
        self, projected_map: Tensor, backbone_maps: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Image parts (B, C_i, H_i, W_i) of the first and the last three convolutions."""
        weight, _, bias = self._first_weights()
        parts = [F.conv2d(projected_map, weight, bias, padding=1)]
        for conv, adapter, backbone_map in zip(
            self.convs[2:], self.adapters, backbone_maps, strict=True
        ):
            parts.append(conv(adapter(backbone_map)))
        return tuple(parts)

    def _first_weights(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """First convolution: its weights for projected map and attention maps, and its bias."""
        first = self.convs[0]
        assert isinstance(first, nn.Conv2d)
        widths = [self.embed_dim, self.attention.num_heads]
        of_image, of_attention = first.weight.split(widths, dim=1)
        return of_image, of_attention, first.bias


class QueryMaskHead(nn.Module):
    """Masks as products of query embeddings and per-pixel features (MaskFormer, section 3.2).

    It has no parameters: the transformer provides both, because its decoder attends within masks.

    Attributes:
        embeds_masks: True for mask heads that return :class:`QueryMasks`, which costs and losses at
            points need.
    """

    embeds_masks = True

    def forward(self, output: TransformerOutput, features: Mapping[str, Tensor]) -> QueryMasks:
        """Return the masks of all queries, computed on demand.

        Raises:
            ValueError: the transformer provides no embeddings.
        """
        if output.mask_embeddings is None or output.mask_features is None:
            raise ValueError("QueryMaskHead needs a transformer that returns mask embeddings")
        assert output.padded_size is not None
        return QueryMasks(output.mask_embeddings, output.mask_features, output.padded_size)


class SemanticAuxHead(nn.Module):
    """One 1x1 convolution on each of some backbone maps.

    Not part of DETR, and used in training only. A set loss reaches a randomly initialised backbone
    only through a few matched queries. Classifying every pixel as well gives it a dense signal
    from the first step.

    Args:
        in_channels: channels of the backbone maps to read, by name.
        num_classes: things and stuff together.
    """

    def __init__(self, *, in_channels: Mapping[str, int], num_classes: int) -> None:
        super().__init__()
        self.in_features = tuple(in_channels)
        self.classifiers = nn.ModuleDict(
            {name: nn.Conv2d(n, num_classes, kernel_size=1) for name, n in in_channels.items()}
        )

    def forward(self, features: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Class logits (B, num_classes, H_i, W_i) of each map."""
        return [self.classifiers[name](features[name]) for name in self.in_features]


def _of_entries(per_entry: Tensor, index: Tensor) -> Tensor:
    """(E, ...) -> (K, ...): the entry of each query; a view if there is only one entry."""
    if per_entry.shape[0] == 1:
        return per_entry.expand(len(index), *per_entry.shape[1:])
    return per_entry.index_select(0, index)
