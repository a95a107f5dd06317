"""Sine position encodings of feature maps."""

import math

import torch
from torch import Tensor, nn


class SinePositionEncoding(nn.Module):
    """Sine and cosine of the row and column, normalised by the valid area of each image.

    As in DETR (appendix A.4; ``PositionEmbeddingSine`` of facebookresearch/detr): the first half
    of the channels encodes the row, the second half the column.

    Args:
        num_channels: channels of the encoding; a multiple of 4.
        temperature: base of the wave lengths.
        scale: value that the last valid row and column are normalised to.
        offset: shift in cells before normalisation. DETR: 0; Deformable-DETR: -0.5.
    """

    _EPS = 1e-6

    def __init__(
        self,
        *,
        num_channels: int,
        temperature: float = 10000.0,
        scale: float = 2 * math.pi,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        if num_channels % 4:
            raise ValueError(f"num_channels must be a multiple of 4, not {num_channels}")
        self.scale = scale
        self.offset = offset
        half = num_channels // 2
        exponent = torch.arange(0, half, 2, dtype=torch.float32) / half
        self.register_buffer("wave_lengths", temperature**exponent, persistent=False)
        self.wave_lengths: Tensor

    def forward(self, padding_mask: Tensor) -> Tensor:
        """Encode all cells of a batch of maps.

        Args:
            padding_mask: (B, H, W) bool, True where the cell is padding.

        Returns:
            (B, H, W, num_channels) float32.
        """
        valid = ~padding_mask
        rows = self._normalise(valid.cumsum(1, dtype=torch.float32), dim=1)
        columns = self._normalise(valid.cumsum(2, dtype=torch.float32), dim=2)
        where = torch.stack([rows, columns], dim=-1) * self.scale
        return interleaved_waves(where, self.wave_lengths).flatten(-2)

    def _normalise(self, index: Tensor, dim: int) -> Tensor:
        last = index.narrow(dim, -1, 1)
        return (index + self.offset if self.offset else index) / (last + self._EPS)


def sine_encoding(
    coordinates: Tensor,
    num_channels: int,
    *,
    temperature: float = 10000.0,
    scale: float = 2 * math.pi,
) -> Tensor:
    """Sine encoding of points, with one group of channels for each coordinate.

    Args:
        coordinates: (..., D) in 0 to 1 over the valid area.
        num_channels: channels of the result; a multiple of 2 * D.
        temperature: base of the wave lengths.
        scale: factor of the coordinates.

    Returns:
        (..., num_channels); ``num_channels / D`` channels for each coordinate in turn.
    """
    share = num_channels // coordinates.shape[-1]
    exponent = torch.arange(0, share, 2, dtype=torch.float32, device=coordinates.device) / share
    return interleaved_waves(coordinates * scale, temperature**exponent).flatten(-2)


def interleaved_waves(positions: Tensor, wave_lengths: Tensor) -> Tensor:
    """Sine at even and cosine at odd channels: (...) and (K / 2,) -> (..., K)."""
    phase = positions[..., None] / wave_lengths
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-2)
