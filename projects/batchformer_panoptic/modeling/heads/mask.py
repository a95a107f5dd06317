"""The panoptic mask head of DETR: attention maps, then a small feature pyramid network.

Shapes: K queries of interest gathered from all images, B' = streams * B, h heads, C channels.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...layers import conv_upsampled
from ..transformer import TransformerOutput

# Values of the largest map of the queries that a CPU decodes at a time. What its caches do not hold
# costs more for each query, and tensors above 32 MiB are taken from the system anew each time.
_CACHED_VALUES = 1 << 20


class AttentionMap(nn.Module):
    """Attention of each query over the memory, one map a head, without values.

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
            image_index: (K,) int64, the entry of the batch that a query belongs to.

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
        # A softmax over thousands of cells wants more digits than half precision has.
        precise = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.masked_fill(ignored, -math.inf).flatten(1).softmax(dim=1, dtype=precise)
        return weights.view(-1, self.num_heads, height, width).to(scores.dtype)


class MaskHead(nn.Module):
    """Masks of chosen queries at the resolution of the finest backbone map.

    DETR, section 4.4 (``MaskHeadSmallConv``): projected map and attention maps are mixed by
    convolutions and brought up through three backbone maps. Queries do not see each other, so
    masks of a subset are the masks of all, restricted. Four of the five convolutions read a sum or
    a concatenation of what depends on the query and what depends on the image alone (projected map,
    adapted backbone maps). Convolutions are linear: the image's part of their results is computed
    once for each image, for all its queries and both streams, and the query's part of an enlarged
    map from the small one (:func:`conv_upsampled`).

    Group norm uses 8 groups as published wherever 8 divides the channels, else their greatest
    common divisor, so that any width is possible.

    Args:
        embed_dim: channels C of memory and queries; a multiple of 16.
        num_heads: attention maps of a query.
        in_channels: channels of the three backbone maps, coarse to fine.
        channels: output channels of the second to the fifth convolution. None: C / 2, C / 4, C / 8,
            C / 16, as published.
        max_step_bytes: decode so many queries at a time that their maps take about this much
            memory. It changes no result but by rounding.

    Raises:
        ValueError: channels that cannot be built.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        in_channels: Sequence[int],
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
        self.embed_dim = embed_dim
        self.max_step_bytes = max_step_bytes
        self.attention = AttentionMap(embed_dim=embed_dim, num_heads=num_heads)
        self.convs = nn.ModuleList(
            nn.Conv2d(n_in, n_out, kernel_size=3, padding=1) for n_in, n_out in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(8, n), n) for n in widths[1:])
        self.adapters = nn.ModuleList(
            nn.Conv2d(n_in, n_out, kernel_size=1)
            for n_in, n_out in zip(in_channels, widths[2:5], strict=True)
        )
        self.predictor = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)
        for conv in [*self.convs, *self.adapters, self.predictor]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(
        self,
        output: TransformerOutput,
        backbone_maps: Sequence[Tensor],
        image_index: Tensor,
        query_index: Tensor,
    ) -> Tensor:
        """Masks of chosen queries of the last decoder layer.

        Args:
            output: what the transformer returned.
            backbone_maps: three maps (B, C_i, H_i, W_i), coarse to fine, not expanded.
            image_index: (K,) int64 in [0, B').
            query_index: (K,) int64 in [0, Q).

        Returns:
            (K, H_3, W_3) mask logits; K may be 0.
        """
        streams = output.streams
        queries = output.hidden_states[-1][image_index, query_index]
        attention = self.attention(
            queries, output.memory_map, streams.expand(output.padding_mask), image_index
        )
        source_index = streams.image_of(image_index, output.projected_map.shape[0])
        of_image = self._image_parts(output.projected_map, backbone_maps)
        step = self.queries_per_step(of_image)
        decode = partial(self._decode, of_image)
        if len(queries) > step and torch.is_grad_enabled():
            # What a step computed is not kept but computed once more in the backward pass.
            decode = partial(checkpoint, decode, use_reentrant=False)
        if attention.device.type == "cpu":
            step = min(step, max(1, _CACHED_VALUES // of_image[-1][0].numel()))
        if len(queries) <= step:
            return decode(attention, source_index)
        parts = zip(attention.split(step), source_index.split(step), strict=True)
        return torch.cat([decode(*part) for part in parts])

    def queries_per_step(self, of_image: Sequence[Tensor]) -> int:
        """How many queries the bound on memory allows at a time; at least one."""
        # Convolution, norm and one more (a sum, a gradient) of each enlarged level.
        values = 3 * sum(part[0].numel() for part in of_image[1:])
        # Under autocast group norms give float32, whatever goes in.
        return max(1, self.max_step_bytes // (values * max(4, of_image[0].element_size())))

    def _decode(
        self, of_image: Sequence[Tensor], attention: Tensor, source_index: Tensor
    ) -> Tensor:
        """(K, H_3, W_3) masks of (K, heads, H_0, W_0) attention maps on the (K,) images.

        ``of_image`` are the image's parts of the first and of the last three convolutions.
        """
        x = F.conv2d(attention, self._first_weights()[1], padding=1)
        x = F.relu_(self.norms[0](x.add_(_of_entries(of_image[0], source_index))))
        x = F.relu_(self.norms[1](self.convs[1](x)))
        for conv, norm, part in zip(self.convs[2:], self.norms[2:], of_image[1:], strict=True):
            x = conv_upsampled(x, conv.get_parameter("weight"), (part.shape[-2], part.shape[-1]))
            x = F.relu_(norm(x.add_(_of_entries(part, source_index))))
        return self.predictor(x)[:, 0]

    def _image_parts(
        self, projected_map: Tensor, backbone_maps: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Of the first and of the last three convolutions: (B, C_i, H_i, W_i) each, with bias."""
        weight, bias = self._first_weights()[0], self.convs[0].get_parameter("bias")
        parts = [F.conv2d(projected_map, weight, bias, padding=1)]
        for conv, adapter, backbone_map in zip(
            self.convs[2:], self.adapters, backbone_maps, strict=True
        ):
            parts.append(conv(adapter(backbone_map)))
        return tuple(parts)

    def _first_weights(self) -> tuple[Tensor, Tensor]:
        """The first convolution's weights for the projected map and for the attention maps."""
        weight = self.convs[0].get_parameter("weight")
        of_image, of_attention = weight.split([self.embed_dim, self.attention.num_heads], dim=1)
        return of_image, of_attention


def _of_entries(per_entry: Tensor, index: Tensor) -> Tensor:
    """(E, ...) -> (K, ...), the entry of each query; a view, and no copies, where there is one."""
    if per_entry.shape[0] == 1:
        return per_entry.expand(len(index), *per_entry.shape[1:])
    return per_entry.index_select(0, index)
