"""gptq_block: the column updates of one block of columns, GPTQ without an inverse.

With H = V Vᵀ, V upper triangular (one Cholesky of the reversed Hessian), and V' = V / diag(V) by columns, the
compensated value of column j given the columns already fixed is

    wc[:, j] = w[:, j] + sum_{i<j} (w[:, i] - q[:, i]) V'[i, j]

which equals GPTQ's update (Frantar et al., arXiv 2210.17323) with U = V^-1; see ARCHITECTURE.md. The caller adds the
same product for the columns after the block as one GEMM.

Several layers of one shape, the experts of a mixture, go in one call: every tensor but `groups` then has a leading
dimension L. The values are those of a call per layer (to the bit, but for the products that CUDA takes for B > 128).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern._registry import Op
from llmkern.ops import _cuda, _triton
from llmkern.ops._columns import by_layer, run_columns
from llmkern.ops._linear import pointer
from llmkern.ops.gptq_block.reference import reference


def check(
    w: Tensor, wc: Tensor, v: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor, mask: Tensor | None,
    bits: int,
) -> None:  # fmt: skip
    """w, wc fp32 [N, B]; v fp32 [B, B]; scales fp32 [N, G]; zeros int8 [N, G]; groups int32 [B]; mask bool [N, B].

    All but groups may be of L >= 1 layers: w [L, N, B], v [L, B, B], scales [L, N, G] and so on. q is as w.
    """
    check_block("gptq_block", w, wc, v)
    check_grid("gptq_block", w, scales, zeros, groups, bits)
    check_mask("gptq_block", w, mask)


def check_block(name: str, w: Tensor, wc: Tensor, v: Tensor) -> None:
    """Raise unless w, wc [N, B] and v [B, B], or L >= 1 of each, are contiguous fp32 on one device."""
    for label, tensor in (("w", w), ("wc", wc), ("v", v)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: {label} must be float32, got {tensor.dtype}")
        if tensor.ndim not in (2, 3) or not tensor.is_contiguous() or 0 in tensor.shape[:-2]:
            raise ValueError(
                f"{name}: {label} must be a contiguous matrix, or L >= 1 of them in one tensor, "
                f"got {list(tensor.shape)}"
            )
        check_devices(name, w, **{label: tensor})
    n, b = w.shape[-2:]
    if wc.shape != w.shape or v.shape != (*w.shape[:-2], b, b):
        raise ValueError(
            f"{name}: w is [{layers(w)}N={n}, B={b}], so wc must be {list(w.shape)} and v "
            f"{[*w.shape[:-2], b, b]}, got {list(wc.shape)} and {list(v.shape)}"
        )


def layers(w: Tensor) -> str:
    """The leading dimension of w and what goes with it, as errors write it."""
    return f"L={w.shape[0]}, " if w.ndim == 3 else ""


def check_devices(name: str, w: Tensor, /, **tensors: Tensor | None) -> None:
    """Raise unless all tensors are on w's device: a kernel gets addresses."""
    for label, tensor in tensors.items():
        if tensor is not None and tensor.device != w.device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, but w is on {w.device}")


def check_grid(name: str, w: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor, bits: int) -> None:
    """Raise unless scales/zeros are [N, G] (of each of w's layers), groups int32 [B], and bits in 2..8.

    Group values are the caller's.
    """
    n, b = w.shape[-2:]
    check_devices(name, w, scales=scales, zeros=zeros, groups=groups)
    if scales.dtype != torch.float32 or scales.shape[:-1] != w.shape[:-1] or not scales.is_contiguous():
        raise ValueError(
            f"{name}: scales must be contiguous float32 [{layers(w)}N={n}, G], got {scales.dtype} {list(scales.shape)}"
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
    """Raise unless mask is None or contiguous bool of the shape of w."""
    check_devices(name, w, mask=mask)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != w.shape or not mask.is_contiguous()):
        raise ValueError(f"{name}: mask must be contiguous bool {list(w.shape)}, got {mask.dtype} {list(mask.shape)}")


def native(
    function: Any, w: Tensor, wc: Tensor, v: Tensor, scales: Tensor, zeros: Any, groups: Tensor, mask: Any, bits: int
) -> Tensor:
    """Pointers for csrc/cpu/gptq_block; one layer."""
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
OP.native(by_layer(native))
_cuda.add_rows(OP, cuda, dtypes=(torch.float32,))
_triton.add_row(OP)
OP.kernel("reference", "any")(by_layer(reference))
