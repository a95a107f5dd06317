"""BatchFormerV2 (arXiv 2204.01254): attention over the batch axis. Needs torch alone."""

from .attach import attach
from .attached import AttachedBatchFormer
from .block import BatchFormerV2
from .hook import BatchFormerHook, IdentityHook
from .streams import BATCHFORMER, ORIGINAL, StreamState

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
