"""The linear layer of the transformers here."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Multiplications below which a convolution's longer start outweighs what it saves.
_WORTH_A_CONVOLUTION = 1 << 22


class TokenLinear(nn.Linear):
    """``nn.Linear`` that runs as a 1 x 1 convolution where that is faster.

    PyTorch multiplies matrices on x86 CPUs with MKL and convolves with oneDNN, which was about
    twice as fast on an AMD processor (docs/benchmarks.md, "Layers on a CPU"; no other was tried).
    Rows of tokens are a map with its channels last, so that nothing is copied, and the sums are the
    same up to rounding. Other devices and types, and small inputs, take the usual way.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out)."""
        if x.dim() < 3 or not _as_convolution(x, self.weight):
            return super().forward(x)
        tokens = x.flatten(0, -3).unsqueeze(0)  # (1, height, width, channels)
        out = F.conv2d(tokens.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _as_convolution(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _WORTH_A_CONVOLUTION
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )
