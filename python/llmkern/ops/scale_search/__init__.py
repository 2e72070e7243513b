"""scale_search: per row and group, the clipped scale whose rounding error, weighted per column, is least.

With importance = diag(H) this is the Hessian-weighted clip that precedes GPTQ; with ones it is the plain MSE clip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern._registry import Op
from llmkern.ops import _cuda, _triton
from llmkern.ops._linear import check_group_size, groups
from llmkern.ops.gptq_block import check_devices
from llmkern.ops.scale_search.reference import reference

MAX_STEPS = 8192  # csrc/cuda/scale_search


def check(
    w: Tensor, importance: Tensor, group_size: int, bits: int, symmetric: bool, steps: int, smallest: float
) -> int:
    """w fp32 [N, K]; importance fp32 [K]; 1 <= group_size <= K; bits 2..8; steps >= 1; 0 < smallest <= 1. Returns G."""
    name = "scale_search"
    if w.dtype != torch.float32 or w.ndim != 2 or not w.is_contiguous():
        raise ValueError(f"{name}: w must be contiguous float32 [N, K], got {w.dtype} {list(w.shape)}")
    k = w.shape[1]
    if importance.dtype != torch.float32 or importance.shape != (k,) or not importance.is_contiguous():
        raise ValueError(f"{name}: importance must be float32 [K={k}], got {importance.dtype} {list(importance.shape)}")
    check_devices(name, w, importance=importance)
    check_group_size(name, group_size, k)
    if not 2 <= bits <= 8:
        raise ValueError(f"{name}: bits must be in 2..8, got {bits}")
    if steps < 1 or not 0 < smallest <= 1:
        raise ValueError(f"{name}: wanted steps >= 1 and 0 < smallest <= 1, got {steps} and {smallest}")
    return groups(k, group_size)


def native(
    function: Any, w: Tensor, importance: Tensor, group_size: int, bits: int, symmetric: bool, steps: int,
    smallest: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pointers for csrc/cpu/scale_search."""
    n, k = w.shape
    g = groups(k, group_size)
    scales, zeros = w.new_empty((n, g)), w.new_empty((n, g), dtype=torch.int8)
    function(
        w.data_ptr(), importance.data_ptr(), scales.data_ptr(), zeros.data_ptr(),
        n, k, group_size, bits, symmetric, steps, smallest, torch.get_num_threads(),
    )  # fmt: skip
    return scales, zeros


def cuda(
    kernel: str, function: Any, gpu: _cuda.Gpu, w: Tensor, importance: Tensor, group_size: int, bits: int,
    symmetric: bool, steps: int, smallest: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sizes and pointers for csrc/cuda/scale_search."""
    n, k = w.shape
    g = groups(k, group_size)
    scales, zeros = w.new_empty((n, g)), w.new_empty((n, g), dtype=torch.int8)
    if n:
        # Blocks of 8 warps: as many as fit, which then go over the groups.
        blocks = min(-(-n * g // 8), 4 * gpu.multiprocessors)
        _cuda.call(
            function, w, w.data_ptr(), importance.data_ptr(), scales.data_ptr(), zeros.data_ptr(),
            n, k, group_size, bits, symmetric, steps, smallest, blocks,
        )  # fmt: skip
    return scales, zeros


def cuda_rejects(
    kernel: str, w: Tensor, importance: Tensor, group_size: int, bits: int, symmetric: bool, steps: int,
    smallest: float,
) -> str | None:  # fmt: skip
    """Why a CUDA kernel cannot run on these arguments."""
    return None if steps <= MAX_STEPS else f"tries at most {MAX_STEPS} clip ratios, got steps={steps}"


OP: Op = Op(
    "scale_search(Tensor w, Tensor importance, int group_size, int bits, bool symmetric, int steps, float smallest) "
    "-> (Tensor, Tensor)",
    check=check,
    fake=lambda g, w, *rest: (w.new_empty((w.shape[0], g)), w.new_empty((w.shape[0], g), dtype=torch.int8)),
)
OP.native(native)
_cuda.add_rows(OP, cuda, cuda_rejects, dtypes=(torch.float32,))
_triton.add_row(OP)
OP.kernel("reference", "any")(reference)
