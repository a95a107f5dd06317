"""Allocator settings for training on a CPU."""

import ctypes
import os

# Parameters of glibc's mallopt (malloc.h), and the upper limit of its adaptive mmap threshold.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 32 * 2**20


def tune_allocation() -> None:
    """Reduce page faults of large CPU tensors: huge pages, and reuse of freed memory.

    PyTorch is told to allocate tensors above 2 MiB in huge pages where the system supports them.
    It reads the setting once, when it creates its first CPU tensor; child processes inherit it.
    glibc is told to keep freed memory (as after a backward pass) for the next step instead of
    returning it to the system, so peak memory stays with the process. Blocks above 32 MiB are still
    mapped anew each time, as by default.

    A user who has set ``THP_MEM_ALLOC_ENABLE``, ``GLIBC_TUNABLES`` or one of the ``MALLOC_``
    variables keeps that choice. Without glibc there is no effect.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
