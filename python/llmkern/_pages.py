"""Memory of large matrices on a CPU: in huge pages where there are any, and kept for the next matrix of the same size.

A solver needs a few matrices of [N, K] and [K, K] for every layer. Memory that is fresh from the system is cleared
first, page by page: 64 MiB took 20 ms in pages of 4 KiB and 3 ms in huge ones, and 80 ms where a virtual machine had
handed the pages to its host meanwhile. Pages that were used before cost nothing.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from llmkern import _memory

# Bytes from which the C library asks the system for memory each time.
LARGE = 32 << 20
# At most this part of the memory that is available is kept.
SHARE = 16


class _Rooms:
    """Memory that nobody uses at present, the oldest first."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        # Matrices die whenever the garbage collector likes, also within `put`.
        self._lock = threading.RLock()

    def take(self, size: int) -> mmap.mmap:
        """Memory of `size` bytes with any values: what was given back last, or new."""
        with self._lock:
            for at in reversed(range(len(self._free))):
                if len(self._free[at]) == size:
                    return self._free.pop(at)
        room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        room.madvise(mmap.MADV_HUGEPAGE)
        return room

    def put(self, room: mmap.mmap) -> None:
        """Keep memory for the next one; what is too much goes, the oldest first."""
        most = (_memory.available() or 0) // SHARE
        with self._lock:
            self._free.append(room)
            while sum(map(len, self._free)) > most:
                del self._free[0]

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._free.clear()


_rooms = _Rooms()


def large_empty(*shape: int, like: Tensor) -> Tensor:
    """An uninitialised fp32 tensor on like's device; on a CPU of memory as above."""
    size = 4 * math.prod(shape)
    if like.device.type != "cpu" or size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape, dtype=torch.float32)
    room = _rooms.take(size)
    # The tensor's storage holds this alone, so that it dies with the last tensor that shares it.
    handle = (ctypes.c_char * size).from_buffer(room)
    weakref.finalize(handle, _rooms.put, room).atexit = False
    return torch.frombuffer(handle, dtype=torch.float32).view(shape)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library than glibc
        return None


def give_back() -> None:
    """Hand freed memory back to the system: what is kept here, and what the C library (glibc) keeps for itself."""
    _rooms.clear()
    trim = _trim()
    if trim is not None:
        trim(0)
