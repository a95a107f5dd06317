"""Swin Transformer (Liu et al. 2021) as in published detectors, with a layer norm per output.

The Swin of timm differs: it shifts windows before it pads the map, omits the shift where one window
covers the map at timm's own image size, and has no norms of the outputs. Published:
facebookresearch/Mask2Former, whose parameter names are kept.

Shapes: B images, (H, W) one map, C channels, w the side of a window, P = w * w its pixels.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError

_PATCH = 4  # pixels of a side
_MLP_RATIO = 4
_HIDDEN = -100.0  # added to attention logits of pixels that are not neighbours in the image


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias per relative position.

    Args:
        dim: channels C.
        window: side w of a window.
        num_heads: attention heads.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, *, window: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(
            nn.init.trunc_normal_(torch.empty((2 * window - 1) ** 2, num_heads), std=0.02)
        )
        side = torch.arange(window)
        y, x = (axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))
        row, column = (axis[:, None] - axis[None] + window - 1 for axis in (y, x))
        index = row * (2 * window - 1) + column  # (P, P)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, windows: Tensor, hidden: Tensor | None) -> Tensor:
        """Attend.

        Args:
            windows: (B * N, P, C), the N windows of each image in turn.
            hidden: (N, P, P) added to the logits, or None.

        Returns:
            (B * N, P, C).
        """
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(windows).chunk(3, dim=-1)
        )
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if hidden is None:
            bias = bias[None]
        else:
            bias = bias + hidden[:, None]
            bias = bias.expand(len(windows) // len(hidden), *bias.shape).flatten(0, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


class SwinBlock(nn.Module):
    """Window attention and feed-forward network, pre-norm.

    Args:
        dim: channels C.
        window: side w of a window.
        shift: pixels by which the windows are shifted, 0 or w // 2.
        num_heads: attention heads.
        drop_path: probability of skipping a residual branch for an image in training.
    """

    def __init__(
        self, dim: int, *, window: int, shift: int, num_heads: int, drop_path: float
    ) -> None:
        super().__init__()
        self.window, self.shift, self.drop_path = window, shift, drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window=window, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(dim)
        hidden = _MLP_RATIO * dim
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self._kept(self._attended(self.norm1(x)))
        return x + self._kept(self.mlp(self.norm2(x)))

    def _attended(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        # Padding takes part in the attention, as published.
        x = F.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        hidden = None
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
            hidden = _hidden_pairs(x.shape[1], x.shape[2], self.window, self.shift, x)
        rows, columns = x.shape[1] // self.window, x.shape[2] // self.window
        windows = to_windows(x, self.window)
        attended = self.attn(windows, hidden)
        # (B * rows * columns, w * w, C) -> (B, rows, w, columns, w, C) -> (B, H, W, C)
        grid = attended.unflatten(1, (self.window, self.window)).unflatten(0, (-1, rows, columns))
        x = grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), dims=(1, 2))
        return x[:, :height, :width]

    def _kept(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        mask = branch.new_empty(len(branch), 1, 1, 1).bernoulli_(keep)
        return branch * mask / keep


def to_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B * N, w * w, C), the windows of each image row by row."""
    grid = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return grid.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def _hidden_pairs(height: int, width: int, window: int, shift: int, like: Tensor) -> Tensor:
    """(N, P, P), 0 for pixels of a shifted window that are neighbours in the image, else -100."""
    y, x = (
        (torch.arange(size, device=like.device) >= size - window).long()
        + (torch.arange(size, device=like.device) >= size - shift).long()
        for size in (height, width)
    )
    region = to_windows((3 * y[:, None] + x)[None, :, :, None], window)[..., 0]
    differs = region[:, :, None] != region[:, None]
    return torch.zeros(differs.shape, dtype=like.dtype, device=like.device).masked_fill_(
        differs, _HIDDEN
    )


class PatchMerging(nn.Module):
    """Merges 2 x 2 pixels: half the size, twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C)."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(corners, dim=-1)))
        return merged


class SwinStage(nn.Module):
    """Blocks at one size; every other block shifts its windows."""

    def __init__(
        self, dim: int, *, window: int, num_heads: int, drop_paths: Sequence[float], is_last: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim,
                window=window,
                shift=(i % 2) * (window // 2),
                num_heads=num_heads,
                drop_path=drop_path,
            )
            for i, drop_path in enumerate(drop_paths)
        )
        self.downsample = None if is_last else PatchMerging(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), before the merging of patches."""
        for block in self.blocks:
            x = block(x)
        return x


class SwinBackbone(Backbone):
    """Swin Transformer with maps ``res2`` to ``res5`` at strides 4 to 32.

    Args:
        embed_dim: channels of the first stage, doubled by each further one.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window: side of the windows in pixels of the maps.
        drop_path_rate: probability of skipping the last block, rising linearly from 0.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window: int,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict(
            {
                "proj": nn.Conv2d(3, embed_dim, kernel_size=_PATCH, stride=_PATCH),
                "norm": nn.LayerNorm(embed_dim),
            }
        )
        # On the CPU even if the model is built on the meta device, which has no numbers.
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self._shapes: dict[str, ShapeSpec] = {}
        self.layers = nn.ModuleList()
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = embed_dim * 2**i
            self.layers.append(
                SwinStage(
                    dim,
                    window=window,
                    num_heads=heads,
                    drop_paths=[rates.pop(0) for _ in range(depth)],
                    is_last=i == len(depths) - 1,
                )
            )
            self.add_module(f"norm{i}", nn.LayerNorm(dim))
            self._shapes[f"res{i + 2}"] = ShapeSpec(channels=dim, stride=_PATCH * 2**i)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def size_divisibility(self) -> int:
        """The largest stride."""
        return max(int(shape.stride or 1) for shape in self._shapes.values())

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        return dict(self._shapes)

    def freeze(self, freeze_at: int) -> None:
        """Exclude everything up to ``res<freeze_at>`` from training; 0: nothing, 1: the patches."""
        frozen: list[nn.Module] = [self.patch_embed] if freeze_at else []
        for i in range(freeze_at - 1):
            # The merging of patches leads from one map to the next.
            frozen += [self.layers[i].get_submodule("blocks"), self.get_submodule(f"norm{i}")]
            if i < freeze_at - 2:
                frozen.append(self.layers[i].get_submodule("downsample"))
        for module in frozen:
            module.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (B, 3, H, W) images to (B, C_i, H / stride, W / stride) maps by name."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % _PATCH, 0, -height % _PATCH))
        x = self.patch_embed["norm"](self.patch_embed["proj"](images).movedim(1, -1))
        maps = {}
        for i, (name, stage) in enumerate(zip(self._shapes, self.layers, strict=True)):
            x = stage(x)
            maps[name] = self.get_submodule(f"norm{i}")(x).movedim(-1, 1).contiguous()
            assert isinstance(stage, SwinStage)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The Swin Transformer of ``MODEL.SWIN``.

    Raises:
        UserError: the sizes do not fit together.
    """
    node, freeze_at = cfg.MODEL.SWIN, cfg.MODEL.BACKBONE.FREEZE_AT
    if not len(node.DEPTHS) == len(node.NUM_HEADS) == 4:
        raise UserError(
            f"MODEL.SWIN.DEPTHS is {node.DEPTHS} and NUM_HEADS {node.NUM_HEADS}; each needs four "
            "numbers"
        )
    widths = [node.EMBED_DIM * 2**i for i in range(4)]
    if any(width % heads for width, heads in zip(widths, node.NUM_HEADS, strict=True)):
        raise UserError(
            f"MODEL.SWIN.NUM_HEADS is {node.NUM_HEADS}; each must divide the width of its stage, "
            f"{widths}"
        )
    if not 0 <= freeze_at <= 5:
        raise UserError(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; choose 0 to 5")
    backbone = SwinBackbone(
        embed_dim=node.EMBED_DIM,
        depths=node.DEPTHS,
        num_heads=node.NUM_HEADS,
        window=node.WINDOW_SIZE,
        drop_path_rate=node.DROP_PATH_RATE,
    )
    backbone.freeze(freeze_at)
    return backbone
