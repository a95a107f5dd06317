"""How the process takes memory from the system."""

import os


def use_huge_pages() -> None:
    """Ask PyTorch to allocate large CPU tensors in huge pages, where the system grants them.

    Beyond 32 MiB glibc takes every tensor fresh from the system and gives it back at once, and the
    system hands it out in pages of 4 KiB: an addition of such tensors can take several times as
    long as the same work on smaller ones. PyTorch looks at the setting once, when it makes its
    first CPU tensor, and so do processes that are started later; after that nothing changes.
    Whoever has set ``THP_MEM_ALLOC_ENABLE`` keeps the choice.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
