"""What the C library does with memory that is freed: by default, large pieces go back to the system at once.

A framework on a CPU takes and frees gigabytes in every training step. Whatever went back comes as new pages
that the system clears first: a fifth of the processor time of a step of 135 million parameters, and more in a
virtual machine that hands free memory on to its host.
"""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_memory() -> bool:
    """Have this process keep what it frees, for what it takes next; whether that could be arranged (glibc).

    Call it before a framework is imported: threads that already run have pools of their own. The process
    then holds the most that it ever used at a time, until `give_back`.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    # One pool that grows and never shrinks. -1 is the largest size, which no pool reaches.
    return all(
        mallopt(name, value) for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    )


def give_back() -> None:
    """Hand back to the system what is kept and not in use (glibc)."""
    if (trim := _function("malloc_trim")) is not None:
        trim(ctypes.c_size_t(0))


def _function(name: str) -> ctypes._FuncPointer | None:  # type: ignore[name-defined]
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
