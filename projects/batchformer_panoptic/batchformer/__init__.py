"""BatchFormerV2 (arXiv 2204.01254): attention over the batch axis. Needs torch alone."""

from .attach import AttachedBatchFormer, attach
from .batchformer import (
    BATCHFORMER,
    ORIGINAL,
    BatchFormerHook,
    BatchFormerV2,
    IdentityHook,
    StreamState,
)

__all__ = [
    "BATCHFORMER",
    "ORIGINAL",
    "AttachedBatchFormer",
    "BatchFormerHook",
    "BatchFormerV2",
    "IdentityHook",
    "StreamState",
    "attach",
]
