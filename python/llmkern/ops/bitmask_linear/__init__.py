"""bitmask_linear: y = x @ Wᵀ + bias with unstructured sparse weights: kept values and one bit per position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.ops import _cuda, _cuda_sparse, _triton
from llmkern.ops._linear import DTYPE_CODES, check_input, check_scales, linear_op, native_call, pointer
from llmkern.ops.bitmask_linear.reference import dequantize, reference
from llmkern.ops.sparse24_linear import check_values


def check(
    x: Tensor, values: Tensor, bits: Tensor, row_offsets: Tensor, scales: Tensor | None, bias: Tensor | None,
    group_size: int,
) -> int:  # fmt: skip
    """Raise on bad arguments; return N. Offsets are trusted here: BitmaskWeight.from_tensors validates them."""
    name = "bitmask_linear"
    check_values(name, values, scales)
    if values.ndim != 1:
        raise ValueError(f"{name}: values must be [nnz], got {list(values.shape)}")
    if bits.dtype != torch.uint8:
        raise TypeError(f"{name}: bits must be uint8, got {bits.dtype}")
    if bits.ndim != 2:
        raise ValueError(f"{name}: bits must be [N, ceil(K/8)], got {list(bits.shape)}")
    n = bits.shape[0]
    tensors = {"values": values, "bits": bits, "row_offsets": row_offsets, "scales": scales}
    check_input(name, x, tensors, n, bias)
    k = x.shape[-1]
    if bits.shape[1] != -(-k // 8):
        raise ValueError(f"{name}: x is [..., K={k}], which needs bits [N, {-(-k // 8)}], got {list(bits.shape)}")
    if row_offsets.dtype != torch.int64 or row_offsets.shape != (n + 1,):
        raise ValueError(
            f"{name}: row_offsets must be int64 [N+1]=[{n + 1}], got {row_offsets.dtype} {list(row_offsets.shape)}"
        )
    check_scales(name, scales, None, n, k, group_size)
    return n


def native(
    function: Any, x: Tensor, values: Tensor, bits: Tensor, row_offsets: Tensor, scales: Any, bias: Any, group_size: int
) -> Tensor:
    """Pointers for csrc/cpu/bitmask_linear."""
    return native_call(
        function, x, bits.shape[0], bias,
        values.data_ptr(), DTYPE_CODES[values.dtype], bits.data_ptr(), row_offsets.data_ptr(),
        pointer(scales), 0 if scales is None else DTYPE_CODES[scales.dtype], group_size,
    )  # fmt: skip


def cuda(
    kernel: str, function: Any, gpu: _cuda.Gpu, x: Tensor, values: Tensor, bits: Tensor, row_offsets: Tensor,
    scales: Any, bias: Any, group_size: int,
) -> Tensor:  # fmt: skip
    """Sizes and pointers for csrc/cuda/bitmask_linear."""
    n = bits.shape[0]
    plan = _cuda_sparse.mask_plan(kernel, gpu, _cuda_sparse.rows_of(x), n, x.shape[-1])
    return _cuda.cuda_call(
        function, plan, x, n, bias, values.data_ptr(), DTYPE_CODES[values.dtype], bits.data_ptr(),
        row_offsets.data_ptr(), pointer(scales), 0 if scales is None else DTYPE_CODES[scales.dtype], group_size,
    )  # fmt: skip


def cuda_rejects(
    kernel: str, x: Tensor, values: Tensor, bits: Tensor, row_offsets: Tensor, scales: Any, bias: Any, group_size: int
) -> str | None:
    """Why a CUDA kernel cannot run on these arguments."""
    return _cuda_sparse.rejects_values(values, x)


def cuda_yields(kernel: str, gpu: _cuda.Gpu, x: Tensor, *_: Any) -> str | None:
    """Why a CUDA kernel that can run leaves these arguments to a later one."""
    return _cuda_sparse.yields(kernel, gpu, x, wgmma=False)


OP = linear_op(
    "bitmask_linear(Tensor x, Tensor values, Tensor bits, Tensor row_offsets, Tensor? scales, Tensor? bias, "
    "int group_size) -> Tensor",
    check=check,
    dequantize=lambda x, values, bits, row_offsets, scales, bias, group_size: dequantize(
        values, bits, scales, group_size, x.shape[-1]
    ),
)
OP.native(native)
_cuda.add_rows(OP, cuda, cuda_rejects, cuda_yields)
_triton.add_row(OP)
OP.kernel("reference", "any")(reference)
