import math

import pytest
import torch

from batchformer_panoptic.layers import SinePositionEncoding


def slow_encoding(mask: torch.Tensor, num_channels: int, offset: float) -> torch.Tensor:
    """The definition, cell by cell: rows first, sine and cosine in turn."""
    batch, height, width = mask.shape
    result = torch.zeros(batch, height, width, num_channels)
    half = num_channels // 2
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                valid_rows, valid_columns = (~mask[b, :, x]).sum(), (~mask[b, y]).sum()
                row, column = (~mask[b, : y + 1, x]).sum(), (~mask[b, y, : x + 1]).sum()
                for start, index, count in ((0, row, valid_rows), (half, column, valid_columns)):
                    position = (index + offset) / (count + 1e-6) * 2 * math.pi
                    for c in range(half):
                        angle = position / 10000 ** (2 * (c // 2) / half)
                        wave = math.sin(angle) if c % 2 == 0 else math.cos(angle)
                        result[b, y, x, start + c] = wave
    return result


@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_equals_the_definition(offset):
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[1, 2:] = True
    mask[1, :, 3:] = True
    encoding = SinePositionEncoding(num_channels=8, offset=offset)(mask)
    valid = ~mask
    torch.testing.assert_close(
        encoding[valid], slow_encoding(mask, 8, offset)[valid], atol=1e-5, rtol=1e-5
    )


def test_valid_cells_do_not_depend_on_padding():
    encode = SinePositionEncoding(num_channels=16)
    single = encode(torch.zeros(1, 3, 5, dtype=torch.bool))
    mask = torch.ones(1, 6, 7, dtype=torch.bool)
    mask[:, :3, :5] = False
    torch.testing.assert_close(encode(mask)[:, :3, :5], single)


def test_refuses_channels_that_cannot_be_split():
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        SinePositionEncoding(num_channels=6)
