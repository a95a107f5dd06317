"""How the process takes memory from the system."""

import ctypes
import os

# Parameters of glibc's mallopt (malloc.h), and its largest threshold that moves by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 32 * 2**20


def tune_allocation() -> None:
    """Spare large CPU tensors what the system asks for memory that is used for the first time.

    PyTorch is asked to allocate tensors above 2 MiB in huge pages where the system grants them: it
    looks once, when it makes its first CPU tensor, and so do processes that are started later.
    glibc is asked to keep what is freed, as after a backward pass, for the next step, instead of
    giving it back and asking for it again; memory that was needed once stays with the process. Only
    blocks above 32 MiB are still fresh each time, as by default.

    Whoever has set ``THP_MEM_ALLOC_ENABLE``, ``GLIBC_TUNABLES`` or one of the ``MALLOC_`` variables
    keeps that choice. Without glibc nothing happens.
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
