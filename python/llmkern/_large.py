"""Matrices too large for memory: [K, K] of a very wide layer, in a mapped file instead."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from llmkern import _memory

# A matrix of more than this share of the available memory is mapped: a solver has up to five of them at a time.
SHARE = 8
# Below this nobody asks how much there is.
SMALL = 64 << 20


def zeros(k: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """A [k, k] matrix of zeros, which all code may use as any other.

    On a CPU, one that is large against the available memory is the shared mapping of a temporary file without a name:
    the system writes its pages out when memory is short, which it cannot do with a process's own where there is no
    swap. OSError when the file does not fit on the disk.
    """
    nbytes = k * k * dtype.itemsize
    on_host = torch.empty(0, device=device).device.type == "cpu"
    free = _memory.available() if on_host and nbytes > SMALL else None
    if free is None or nbytes <= free // SHARE or not hasattr(os, "posix_fallocate"):
        return torch.zeros(k, k, dtype=dtype, device=device)
    handle, name = tempfile.mkstemp(prefix="llmkern-matrix-")
    try:
        # Reserved at once: a page that does not fit later would kill the process.
        os.posix_fallocate(handle, 0, nbytes)
        return torch.from_file(name, shared=True, size=k * k, dtype=dtype).view(k, k)
    except OSError as error:
        where = os.path.dirname(name)
        raise OSError(
            error.errno, f"a matrix of {nbytes} bytes (K={k}) does not fit in {where}: {error.strerror}"
        ) from None
    finally:
        os.close(handle)
        os.unlink(name)
