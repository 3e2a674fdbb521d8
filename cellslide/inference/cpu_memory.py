"""What the C library does with freed memory. Only glibc can be told; elsewhere nothing happens.

By default glibc takes each block of 128 KiB to 32 MiB from the system and gives it back when it is freed, so the next
map or tensor of that size is fetched anew, page by page: a third of the time of decoding, and of a network on a CPU.
"""

from __future__ import annotations

import ctypes
import os
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
# The most that glibc takes for M_MMAP_THRESHOLD.
_MMAP_THRESHOLD_MAX = 32 * 1024 * 1024


def keep_freed_blocks() -> None:
    """Have the C library keep freed blocks up to 32 MiB, what a tile's maps are, for the next tile."""
    _tell({_M_MMAP_THRESHOLD: _MMAP_THRESHOLD_MAX, _M_TRIM_THRESHOLD: 2**31 - 1})


def keep_freed_memory() -> None:
    """Have the C library keep all freed memory, however large the blocks, for the next pass of a network."""
    _tell({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1})


def share_freed_memory() -> None:
    """Have all threads take memory from one arena, here and in processes that are started from here.

    By default there are eight a core: what the threads of a long run free stays scattered over all of them, and a
    thread's own arena gives back what is freed whatever it is told. Call it first: arenas that are there stay in use.
    """
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    _tell({_M_ARENA_MAX: 1})


def _tell(options: dict[int, int]) -> None:
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in options.items():
        libc.mallopt(option, value)
