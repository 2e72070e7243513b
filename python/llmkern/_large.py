"""Matrices too large for memory: [K, K] of a very wide layer, in a mapped file instead."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from llmkern import _memory
from llmkern._dense import on_host
from llmkern._pages import large_empty

# A matrix of more than this share of the available memory is mapped: a solver has up to five of them at a time.
SHARE = 8
# Below this nobody asks how much there is.
SMALL = 64 << 20


def zeros(k: int, device: torch.device | str | None = None) -> Tensor:
    """An fp32 [k, k] matrix of zeros, which all code may use as any other; mapped where it is `_mapped`."""
    like = torch.empty(0, device=device)
    mapped = _mapped(k, like)
    return large_empty(k, k, like=like).zero_() if mapped is None else mapped


def empty(k: int, like: Tensor) -> Tensor:
    """As `zeros`, on the device of `like`, and with any values."""
    mapped = _mapped(k, like)
    return large_empty(k, k, like=like) if mapped is None else mapped


def _mapped(k: int, like: Tensor) -> Tensor | None:
    """A matrix of zeros as the shared mapping of a temporary file without a name, if it is for the CPU, and large
    against the available memory; else None.

    The system writes its pages out when memory is short, which it cannot do with a process's own where there is no
    swap. OSError when the file does not fit on the disk.
    """
    nbytes = 4 * k * k
    free = _memory.available() if on_host(like) and nbytes > SMALL else None
    if free is None or nbytes <= free // SHARE or not hasattr(os, "posix_fallocate"):
        return None
    handle, name = tempfile.mkstemp(prefix="llmkern-matrix-")
    try:
        # Reserved at once: a page that does not fit later would kill the process.
        os.posix_fallocate(handle, 0, nbytes)
        return torch.from_file(name, shared=True, size=k * k, dtype=torch.float32).view(k, k)
    except OSError as error:
        where = os.path.dirname(name)
        raise OSError(
            error.errno, f"a matrix of {nbytes} bytes (K={k}) does not fit in {where}: {error.strerror}"
        ) from None
    finally:
        os.close(handle)
        os.unlink(name)
