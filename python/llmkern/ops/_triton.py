"""The Triton row of an op: for GPUs that this build has no CUDA kernels for. Nothing here imports Triton.

The kernels of an op are in `ops/<op>/triton.py`, which is imported when the row first runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from llmkern import _features
from llmkern._registry import Op, forced


def add_row(op: Op, rejects: Callable[..., str | None] | None = None) -> None:
    """Append the row `triton` to the op's table; `rejects` as in `Kernel`.

    Its device is the GPU. In Triton's interpreter it is the CPU, for tests, and the row runs only where it is forced.
    """

    def run(*args: Any) -> Any:
        with _device_of(args[0]):
            return import_module(f"llmkern.ops.{op.name}.triton").run(*args)

    interpreted = _features.TRITON_INTERPRETED
    op.kernel(
        "triton",
        "cpu" if interpreted else "cuda",
        lacking=_features.triton_lacking,
        rejects=_unforced(rejects) if interpreted else rejects,
    )(run)


def _unforced(rejects: Callable[..., str | None] | None) -> Callable[..., str | None]:
    """`rejects`, and where the row is not forced."""

    def refuses(*args: Any) -> str | None:
        if forced() != "triton":
            return "Triton's interpreter runs only where it is forced"
        return rejects(*args) if rejects else None

    return refuses


def _device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which must be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def capability(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of the tensor's GPU; (9, 0) in the interpreter. AMD's numbers are of another order."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)
