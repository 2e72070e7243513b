"""What this machine and this build can do, and the one environment variable, LLMKERN_DISABLE.

The CPU levels and their tests live in `csrc/common/levels.def`; the native module reports them. Nothing else in the
package asks the machine.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import NamedTuple

try:
    from llmkern import _C as _native
except ImportError as error:
    # A broken or missing build must not hide: the text becomes the reason of every native row (see `llmkern env`).
    native: ModuleType | None = None
    native_error = f"the native module failed to load: {error}"
else:
    native = _native
    native_error = ""

try:
    from llmkern import _cuda
except ImportError as error:
    cuda: ModuleType | None = None
    cuda_error = f"the CUDA module failed to load: {error}"
else:
    cuda = _cuda
    cuda_error = ""


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


def disabled() -> frozenset[str]:
    """Names in LLMKERN_DISABLE: levels (`avx512_vnni`) or kernels (`cpu.avx2`). The registry refuses unknown ones."""
    text = os.environ.get("LLMKERN_DISABLE", "")
    return frozenset(name for name in (part.strip() for part in text.split(",")) if name)
