"""A convolution of an upsampled map, computed from the small map.

Shapes: K maps, C channels in, D out, (h, w) of the small map, (H, W) of the large one.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def conv_upsampled(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """3 x 3 convolution, zero padded, of a map upsampled to ``size`` by nearest neighbour.

    Where both sides are doubled, up to the last row and column of an odd size, every large pixel
    depends on 2 x 2 small ones: a transposed convolution with stride 2 needs 16 multiplications per
    small pixel, and the convolution of the large map 36. Other sizes are upsampled first. The
    result is the same up to rounding.

    Args:
        x: (K, C, h, w).
        weight: (D, C, 3, 3).
        size: (H, W).

    Returns:
        (K, D, H, W).
    """
    height, width = size
    rows, columns = x.shape[-2:]
    if not (_is_known(height, width) and _is_double(height, rows) and _is_double(width, columns)):
        if size != (rows, columns):
            x = F.interpolate(x, size=size, mode="nearest")
        return F.conv2d(x, weight, padding=1)
    large = F.conv_transpose2d(x, _doubled_weight(weight), stride=2, padding=1)
    # The last row or column of an odd size is half of a pair, next to the zero padding: it is
    # convolved separately.
    if height % 2:
        last = x[:, :, -2:].repeat_interleave(2, dim=3)[..., :width]
        last = F.conv2d(last, weight[:, :, :2], padding=(0, 1))
        large = torch.cat([large[:, :, : height - 1, :width], last], dim=2)
    if width % 2:
        last = x[..., -2:].repeat_interleave(2, dim=2)[:, :, :height]
        last = F.conv2d(last, weight[..., :2], padding=(1, 0))
        large = torch.cat([large[..., : width - 1], last], dim=3)
    return large


def _is_known(*sizes: int) -> bool:
    """Whether sizes are numbers; those of an exported graph may be variables."""
    return not torch.compiler.is_exporting() or all(isinstance(size, int) for size in sizes)


def _is_double(large: int, small: int) -> bool:
    """Whether pixel i of the large side is pixel i // 2 of the small one, each but the last twice.

    A side of one pixel is excluded: the separate last row needs a neighbour.
    """
    return small > 1 and large in (2 * small, 2 * small - 1)


def _doubled_weight(weight: Tensor) -> Tensor:
    """(D, C, 3, 3) -> (C, D, 4, 4), for a transposed convolution with stride 2 and padding 1.

    Two adjacent large pixels are copies of one small pixel, so taps that fall on both are summed:
    along each side, the taps a, b, c become c, b + c, a + b, a.
    """
    sums = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)
    return sums.flip(2, 3).transpose(0, 1)
