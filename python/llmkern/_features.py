"""What this machine and this build can do, and the one environment variable, LLMKERN_DISABLE.

The CPU levels and their tests live in `csrc/common/levels.def`; the native module reports them. Nothing else in the
package asks the machine.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch


def _module(name: str, absent: str) -> tuple[ModuleType | None, str]:
    """A native module, or None and why not.

    A broken or missing build must not hide: the text becomes the reason of every row of it (see `llmkern env`).
    """
    if find_spec(f"llmkern.{name}") is None:
        return None, absent
    try:
        return import_module(f"llmkern.{name}"), ""
    except ImportError as error:
        return None, f"llmkern.{name} failed to load: {error}"


native, native_error = _module("_C", "the native module failed to load: it is not in this build")
cuda, cuda_error = _module("_cuda", "this build has no CUDA kernels: nvcc was not found, or LLMKERN_CUDA=OFF")


class Level(NamedTuple):
    """One row of levels.def, in order from the lowest to the best."""

    name: str
    available: bool
    reason: str  # why not, empty when available


def levels() -> tuple[Level, ...]:
    """Every CPU level known to this build, lowest first."""
    if native is None:
        return ()
    return tuple(
        Level(name, ok, "" if ok else f"this machine lacks {name} ({flags})") for name, ok, flags in native.levels()
    )


def half_is_fast() -> bool:
    """Whether this machine multiplies bf16 faster than fp32: in AMX's tiles, or in pairs where those are no slower.

    AMD's pairs are as fast as an fp32 FMA, for twice the work; Intel's run at a quarter of that rate.
    """
    found = {level.name for level in levels() if level.available}
    return "amx" in found or ("avx512_bf16" in found and native is not None and native.fast_bf16_products())


def disabled() -> frozenset[str]:
    """Names in LLMKERN_DISABLE: levels (`avx512_vnni`) or kernels (`cpu.avx2`). The registry refuses unknown ones."""
    text = os.environ.get("LLMKERN_DISABLE", "")
    return frozenset(name for name in (part.strip() for part in text.split(",")) if name)


# Triton's interpreter runs kernels on CPU tensors, in Python: for tests. Triton reads the variable when it is imported.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def triton_lacking() -> str:
    """Why kernels in Triton cannot run here; empty if they can. Asked at first use: it may start the GPU's driver."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if TRITON_INTERPRETED:
        return ""
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"needs a GPU of compute capability 8.0 or later, this one has {capability[0]}.{capability[1]}"
    return ""
