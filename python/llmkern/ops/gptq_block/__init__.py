"""gptq_block: the column updates of one block of columns, GPTQ without an inverse.

With H = V Vᵀ, V upper triangular (one Cholesky of the reversed Hessian), and V' = V / diag(V) by columns, the
compensated value of column j given the columns already fixed is

    wc[:, j] = w[:, j] + sum_{i<j} (w[:, i] - q[:, i]) V'[i, j]

which equals GPTQ's update (Frantar et al., arXiv 2210.17323) with U = V^-1; see ARCHITECTURE.md. The caller adds the
same product for the columns after the block as one GEMM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern._registry import Op
from llmkern.ops import _cuda, _triton
from llmkern.ops._columns import run_columns
from llmkern.ops._linear import pointer
from llmkern.ops.gptq_block.reference import reference


def check(
    w: Tensor, wc: Tensor, v: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor, mask: Tensor | None,
    bits: int,
) -> None:  # fmt: skip
    """w, wc fp32 [N, B]; v fp32 [B, B]; scales fp32 [N, G]; zeros int8 [N, G]; groups int32 [B]; mask bool [N, B]."""
    check_block("gptq_block", w, wc, v)
    check_grid("gptq_block", w, scales, zeros, groups, bits)
    check_mask("gptq_block", w, mask)


def check_block(name: str, w: Tensor, wc: Tensor, v: Tensor) -> None:
    """Raise unless w, wc [N, B] and v [B, B] are contiguous fp32 on one device."""
    for label, tensor in (("w", w), ("wc", wc), ("v", v)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: {label} must be float32, got {tensor.dtype}")
        if tensor.ndim != 2 or not tensor.is_contiguous():
            raise ValueError(f"{name}: {label} must be a contiguous matrix, got {list(tensor.shape)}")
        check_devices(name, w, **{label: tensor})
    n, b = w.shape
    if wc.shape != w.shape or v.shape != (b, b):
        raise ValueError(f"{name}: w is [N={n}, B={b}], but wc is {list(wc.shape)} and v is {list(v.shape)}")


def check_devices(name: str, w: Tensor, /, **tensors: Tensor | None) -> None:
    """Raise unless all tensors are on w's device: a kernel gets addresses."""
    for label, tensor in tensors.items():
        if tensor is not None and tensor.device != w.device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, but w is on {w.device}")


def check_grid(name: str, w: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor, bits: int) -> None:
    """Raise unless scales/zeros are [N, G], groups int32 [B], and bits in 2..8. Group values are the caller's."""
    n, b = w.shape
    check_devices(name, w, scales=scales, zeros=zeros, groups=groups)
    if scales.dtype != torch.float32 or scales.ndim != 2 or scales.shape[0] != n or not scales.is_contiguous():
        raise ValueError(
            f"{name}: scales must be contiguous float32 [N={n}, G], got {scales.dtype} {list(scales.shape)}"
        )
    if zeros is not None and (zeros.dtype != torch.int8 or zeros.shape != scales.shape or not zeros.is_contiguous()):
        raise ValueError(
            f"{name}: zeros must be contiguous int8 {list(scales.shape)}, got {zeros.dtype} {list(zeros.shape)}"
        )
    if groups.dtype != torch.int32 or groups.shape != (b,) or not groups.is_contiguous():
        raise ValueError(f"{name}: groups must be contiguous int32 [B={b}], got {groups.dtype} {list(groups.shape)}")
    if not 2 <= bits <= 8:
        raise ValueError(f"{name}: bits must be in 2..8, got {bits}")


def check_mask(name: str, w: Tensor, mask: Tensor | None) -> None:
    """Raise unless mask is None or contiguous bool [N, B]."""
    check_devices(name, w, mask=mask)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != w.shape or not mask.is_contiguous()):
        raise ValueError(f"{name}: mask must be contiguous bool {list(w.shape)}, got {mask.dtype} {list(mask.shape)}")


def native(
    function: Any, w: Tensor, wc: Tensor, v: Tensor, scales: Tensor, zeros: Any, groups: Tensor, mask: Any, bits: int
) -> Tensor:
    """Pointers for csrc/cpu/gptq_block."""
    n, b = w.shape
    q = torch.empty_like(w)
    function(
        w.data_ptr(), wc.data_ptr(), v.data_ptr(), scales.data_ptr(), pointer(zeros), groups.data_ptr(), pointer(mask),
        q.data_ptr(), n, b, scales.shape[1], bits, torch.get_num_threads(),
    )  # fmt: skip
    return q


def cuda(
    kernel: str, function: Any, gpu: _cuda.Gpu, w: Tensor, wc: Tensor, v: Tensor, scales: Tensor, zeros: Any,
    groups: Tensor, mask: Any, bits: int,
) -> Tensor:  # fmt: skip
    """Sizes and pointers for csrc/cuda/gptq_block."""
    return run_columns(function, gpu, w, wc, v, None, mask, 0, 0, scales, zeros, groups, bits, keep=False)[0]


OP: Op = Op(
    "gptq_block(Tensor w, Tensor wc, Tensor v, Tensor scales, Tensor? zeros, Tensor groups, Tensor? mask, int bits) "
    "-> Tensor",
    check=check,
    fake=lambda checked, w, *rest: torch.empty_like(w),
)
OP.native(native)
_cuda.add_rows(OP, cuda, dtypes=(torch.float32,))
_triton.add_row(OP)
OP.kernel("reference", "any")(reference)
