"""Keeps a C library's heap from holding on to weights that were freed.

glibc gives a large block a mapping of its own, which returns to the system when it is freed, but raises what counts
as large to the largest block freed so far, up to 32 MiB. Weights then live in the heap, and their holes between other
things stay with the process: a quarter of a model's bytes was measured. While activations are computed the heap is
right: a mapping costs a page fault per 4 KiB. Elsewhere than with glibc nothing is done.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them
_APART, _RUNNING, _KEPT = 2**20, 2**25, 2**26  # bytes; the last two are where glibc's own rule ends up
_OWN_CHOICES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Inside the block, memory of 1 MiB and more comes from the system and goes back to it."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _RUNNING)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """None with another C library, and where the user has set its thresholds."""
    if os.name != "posix" or any(name in os.environ for name in _OWN_CHOICES):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
