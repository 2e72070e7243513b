"""sparse24_int4_linear: y = x @ Wᵀ + bias with 2:4 sparse weights whose kept values are int4 codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.ops import _cuda, _cuda_ring, _cuda_sparse, _triton
from llmkern.ops._linear import DTYPE_CODES, check_input, check_scales, linear_op, native_call
from llmkern.ops.sparse24_int4_linear.reference import dequantize, reference
from llmkern.ops.sparse24_linear import check_positions


def check(x: Tensor, words: Tensor, positions: Tensor, scales: Tensor, bias: Tensor | None, group_size: int) -> int:
    """Raise on bad arguments; return N. Positions are trusted here: Sparse24Int4Weight.from_tensors validates them."""
    name = "sparse24_int4_linear"
    if words.dtype != torch.int32:
        raise TypeError(f"{name}: words must be int32, got {words.dtype}")
    if words.ndim != 2:
        raise ValueError(f"{name}: words must be [N, ceil(2 * ceil(K/4) / 8)], got {list(words.shape)}")
    n = words.shape[0]
    check_input(name, x, {"words": words, "positions": positions, "scales": scales}, n, bias)
    k = x.shape[-1]
    width = -(-2 * -(-k // 4) // 8)
    if words.shape[1] != width:
        raise ValueError(f"{name}: x is [..., K={k}], which needs words [N, {width}], got {list(words.shape)}")
    check_positions(name, positions, n, k)
    check_scales(name, scales, None, n, k, group_size)
    return n


def native(
    function: Any, x: Tensor, words: Tensor, positions: Tensor, scales: Tensor, bias: Any, group_size: int
) -> Any:
    """Pointers for csrc/cpu/sparse24_int4_linear."""
    return native_call(
        function, x, words.shape[0], bias,
        words.data_ptr(), positions.data_ptr(), scales.data_ptr(), DTYPE_CODES[scales.dtype], group_size,
    )  # fmt: skip


def cuda(
    kernel: str, function: Any, gpu: _cuda.Gpu, x: Tensor, words: Tensor, positions: Tensor, scales: Tensor, bias: Any,
    group_size: int,
) -> Tensor:  # fmt: skip
    """Sizes and pointers for csrc/cuda/sparse24_int4_linear."""
    n, k, m = words.shape[0], x.shape[-1], _cuda_sparse.rows_of(x)
    if kernel == "ring":
        found = _cuda_ring.plan(gpu, max(m, 1), n, k, _cuda_ring.kept(words, scales, group_size))
        assert found is not None, "cuda_rejects was not asked"
        plan = found
    else:
        plan = _cuda_sparse.kept_plan(kernel, gpu, m, n, k, scaled=True)
    return _cuda.cuda_call(
        function, plan, x, n, bias, words.data_ptr(), DTYPE_CODES[torch.int8], positions.data_ptr(),
        scales.data_ptr(), DTYPE_CODES[scales.dtype], group_size,
    )  # fmt: skip


def cuda_rejects(
    kernel: str, x: Tensor, words: Tensor, positions: Tensor, scales: Tensor, bias: Any, group_size: int
) -> str | None:
    """Why a CUDA kernel cannot run on these arguments."""
    if kernel == "ring":
        return _cuda_ring.rejects_kept(
            x, words, positions, scales, group_size, _cuda_ring.kept(words, scales, group_size)
        )
    if reason := _cuda_sparse.rejects_wgmma(kernel, x, words, positions, group_size):
        return reason
    return _cuda.rejects_groups(group_size, x.shape[-1], _cuda_sparse.PART_COLUMNS)


def cuda_yields(kernel: str, gpu: _cuda.Gpu, x: Tensor, *_: Any) -> str | None:
    """Why a CUDA kernel that can run leaves these arguments to a later one."""
    return _cuda_sparse.yields(kernel, gpu, x, wgmma=True)


OP = linear_op(
    "sparse24_int4_linear(Tensor x, Tensor words, Tensor positions, Tensor scales, Tensor? bias, int group_size) "
    "-> Tensor",
    check=check,
    dequantize=lambda x, words, positions, scales, bias, group_size: dequantize(
        words, positions, scales, group_size, x.shape[-1]
    ),
)
OP.native(native)
_cuda.add_rows(OP, cuda, cuda_rejects, cuda_yields)
_triton.add_row(OP)
OP.kernel("reference", "any")(reference)
