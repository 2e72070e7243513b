"""int8_dynamic_linear: int8_linear with x quantized per token to int8 on the fly; int32 accumulation (W8A8)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.ops import _cuda, _triton
from llmkern.ops._linear import DTYPE_CODES, groups, linear_op, pointer
from llmkern.ops.int8_dynamic_linear.reference import reference
from llmkern.ops.int8_linear import check_int8, native
from llmkern.ops.int8_linear.reference import dequantize

# 127 * 255 * K must stay below 2^31 when a zero point widens the weight's range.
MAX_K = 2**31 // (127 * 255)


def check(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int) -> int:
    """Raise on bad arguments; return N."""
    if x.ndim and x.shape[-1] > MAX_K:
        raise ValueError(f"int8_dynamic_linear: K={x.shape[-1]} could overflow int32 sums; the limit is {MAX_K}")
    return check_int8("int8_dynamic_linear", x, codes, scales, zeros, bias, group_size)


def cuda(
    kernel: str, function: Any, gpu: _cuda.Gpu, x: Tensor, codes: Tensor, scales: Tensor, zeros: Any, bias: Any,
    group_size: int,
) -> Tensor:  # fmt: skip
    """Sizes, room for quantized x, and pointers for csrc/cuda/int8_dynamic_linear."""
    n, k = codes.shape
    m = x.numel() // max(k, 1)
    if kernel == "stream":
        plan = _cuda.stream_plan(gpu, m, n, k, lane_columns=16)
        inside = _cuda.quantizes_inside(m, k) and _cuda.inside_aligned(x, codes, k, k)
    else:
        plan = _cuda.integer_tile_plan(gpu, kernel, m, n, k, groups(k, group_size))
        inside = False
    workspace = None if inside else _cuda.integer_workspace(x, m, k, 1, groups(k, group_size))
    return _cuda.cuda_call(
        function, plan, x, n, bias, codes.data_ptr(), scales.data_ptr(), DTYPE_CODES[scales.dtype], pointer(zeros),
        group_size, pointer(workspace),
    )  # fmt: skip


def cuda_rejects(
    kernel: str, x: Tensor, codes: Tensor, scales: Tensor, zeros: Any, bias: Any, group_size: int
) -> str | None:
    """Why a CUDA kernel cannot run on these arguments."""
    if codes.shape[1] == 0:
        return "needs K of at least 1, got K=0"
    return _cuda.rejects_groups(group_size, codes.shape[1], 128 if kernel == "wgmma" else 64)


def cuda_yields(kernel: str, gpu: _cuda.Gpu, x: Tensor, codes: Tensor, *rest: Any) -> str | None:
    """Why a CUDA kernel leaves these arguments to a later one."""
    return _cuda.integer_yields(kernel, gpu, x.numel() // codes.shape[1])


OP = linear_op(
    "int8_dynamic_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int group_size) -> Tensor",
    check=check,
    dequantize=lambda x, codes, scales, zeros, bias, group_size: dequantize(codes, scales, zeros, group_size),
)
OP.native(native)
_cuda.add_rows(OP, cuda, cuda_rejects, cuda_yields)
_triton.add_row(OP)
OP.kernel("reference", "any")(reference)
