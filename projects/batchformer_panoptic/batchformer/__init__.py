"""BatchFormerV2 (arXiv 2204.01254): attention over the batch axis. Depends on torch only."""

from .attach import AttachedBatchFormer, attach
from .batchformer import (
    BATCHFORMER,
    ORIGINAL,
    BatchFormerHook,
    BatchFormerV2,
    IdentityHook,
    Losses,
    StreamState,
    encode,
)

__all__ = [
    "BATCHFORMER",
    "ORIGINAL",
    "AttachedBatchFormer",
    "BatchFormerHook",
    "BatchFormerV2",
    "IdentityHook",
    "Losses",
    "StreamState",
    "attach",
    "encode",
]
