"""int8_linear: y = x @ Wᵀ + bias with int8 weights, activations at x's own precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.ops import _cuda, _cuda_ring, _triton
from llmkern.ops._linear import DTYPE_CODES, check_input, check_scales, linear_op, native_call, pointer
from llmkern.ops.int8_linear.reference import dequantize, reference


def check(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int) -> int:
    """Raise on bad arguments; return N."""
    return check_int8("int8_linear", x, codes, scales, zeros, bias, group_size)


def check_int8(name: str, x: Any, codes: Any, scales: Any, zeros: Any, bias: Any, group_size: int) -> int:
    """The same for every op over an Int8Weight."""
    if codes.dtype != torch.int8:
        raise TypeError(f"{name}: codes must be int8, got {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"{name}: codes must be [N, K], got {list(codes.shape)}")
    n, k = codes.shape
    check_input(name, x, {"codes": codes, "scales": scales, "zeros": zeros}, n, bias)
    if x.shape[-1] != k:
        raise ValueError(f"{name}: x is [..., K={x.shape[-1]}], but codes are [N={n}, K={k}]")
    check_scales(name, scales, zeros, n, k, group_size)
    return n


def native(function: Any, x: Tensor, codes: Tensor, scales: Tensor, zeros: Any, bias: Any, group_size: int) -> Tensor:
    """Pointers for csrc/cpu/int8_linear and int8_dynamic_linear."""
    return native_call(
        function, x, codes.shape[0], bias,
        codes.data_ptr(), scales.data_ptr(), DTYPE_CODES[scales.dtype], pointer(zeros), group_size,
    )  # fmt: skip


def cuda(
    kernel: str, function: Any, gpu: _cuda.Gpu, x: Tensor, codes: Tensor, scales: Tensor, zeros: Any, bias: Any,
    group_size: int,
) -> Tensor:  # fmt: skip
    """Sizes and pointers for csrc/cuda/int8_linear."""
    n, k = codes.shape
    m = x.numel() // max(k, 1)
    if kernel == "ring":
        found = _cuda_ring.plan(gpu, max(m, 1), n, k, _cuda_ring.codes(scales, zeros, group_size, x.shape[-1], 16))
        assert found is not None, "cuda_rejects was not asked"
        plan = found
    else:
        plan = _cuda.codes_plan(kernel, gpu, m, n, k, lane_columns=16)
    return _cuda.cuda_call(
        function, plan, x, n, bias, codes.data_ptr(), scales.data_ptr(), DTYPE_CODES[scales.dtype], pointer(zeros),
        group_size,
    )  # fmt: skip


def cuda_rejects(
    kernel: str, x: Tensor, codes: Tensor, scales: Tensor, zeros: Any, bias: Any, group_size: int
) -> str | None:
    """Why a CUDA kernel cannot run on these arguments."""
    if reason := _cuda.rejects_groups(group_size, x.shape[-1], 16):
        return reason
    if kernel == "ring":
        described = _cuda_ring.codes(scales, zeros, group_size, x.shape[-1], 16)
        return _cuda_ring.rejects(x, codes, codes.shape[1], described, (scales, zeros))
    return None


def cuda_yields(kernel: str, gpu: _cuda.Gpu, x: Tensor, codes: Tensor, *rest: Any) -> str | None:
    """Why a CUDA kernel leaves these arguments to a later one."""
    k = x.shape[-1]
    return _cuda.yields(kernel, gpu, x.numel() // max(k, 1), codes.shape[0], k)


OP = linear_op(
    "int8_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int group_size) -> Tensor",
    check=check,
    dequantize=lambda x, codes, scales, zeros, bias, group_size: dequantize(codes, scales, zeros, group_size),
)
OP.native(native)
_cuda.add_rows(OP, cuda, cuda_rejects, cuda_yields)
_triton.add_row(OP)
OP.kernel("reference", "any")(reference)
