"""sparse24_linear: y = x @ Wᵀ + bias with 2:4 sparse weights, values fp32, bf16, fp16 or int8 with scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.ops import _cuda, _cuda_ring, _cuda_sparse, _triton
from llmkern.ops._linear import DTYPE_CODES, check_input, check_scales, linear_op, native_call, pointer
from llmkern.ops.sparse24_linear.reference import dequantize, reference


def check(
    x: Tensor, values: Tensor, positions: Tensor, scales: Tensor | None, bias: Tensor | None, group_size: int
) -> int:
    """Raise on bad arguments; return N. Positions are trusted here: Sparse24Weight.from_tensors validates them."""
    name = "sparse24_linear"
    check_values(name, values, scales)
    if values.ndim != 2:
        raise ValueError(f"{name}: values must be [N, 2 * ceil(K/4)], got {list(values.shape)}")
    n = values.shape[0]
    check_input(name, x, {"values": values, "positions": positions, "scales": scales}, n, bias)
    k = x.shape[-1]
    if values.shape[1] != 2 * -(-k // 4):
        raise ValueError(
            f"{name}: x is [..., K={k}], which needs values [N, {2 * -(-k // 4)}], got {list(values.shape)}"
        )
    check_positions(name, positions, n, k)
    check_scales(name, scales, None, n, k, group_size)
    return n


def check_values(name: str, values: Tensor, scales: Tensor | None) -> None:
    """Raise unless values are a float dtype without scales, or int8 with scales."""
    if values.dtype not in DTYPE_CODES:
        raise TypeError(f"{name}: values must be float32, bfloat16, float16 or int8, got {values.dtype}")
    if (values.dtype == torch.int8) != (scales is not None):
        raise ValueError(f"{name}: scales go with int8 values and only with them, got {values.dtype} values")


def check_positions(name: str, positions: Tensor, n: int, k: int) -> None:
    """Raise unless positions are uint8 [N, ceil(ceil(K/4) / 2)]."""
    if positions.dtype != torch.uint8:
        raise TypeError(f"{name}: positions must be uint8, got {positions.dtype}")
    if positions.shape != (n, -(-k // 8)):
        raise ValueError(f"{name}: positions must be [N={n}, {-(-k // 8)}] for K={k}, got {list(positions.shape)}")


def native(function: Any, x: Tensor, values: Tensor, positions: Tensor, scales: Any, bias: Any, group_size: int) -> Any:
    """Pointers for csrc/cpu/sparse24_linear."""
    return native_call(
        function, x, values.shape[0], bias,
        values.data_ptr(), DTYPE_CODES[values.dtype], positions.data_ptr(),
        pointer(scales), 0 if scales is None else DTYPE_CODES[scales.dtype], group_size,
    )  # fmt: skip


def cuda(
    kernel: str, function: Any, gpu: _cuda.Gpu, x: Tensor, values: Tensor, positions: Tensor, scales: Any, bias: Any,
    group_size: int,
) -> Tensor:  # fmt: skip
    """Sizes and pointers for csrc/cuda/sparse24_linear."""
    n, k, m = values.shape[0], x.shape[-1], _cuda_sparse.rows_of(x)
    if kernel == "ring":
        found = _cuda_ring.plan(gpu, max(m, 1), n, k, _cuda_ring.kept(values, scales, group_size))
        assert found is not None, "cuda_rejects was not asked"
        plan = found
    else:
        plan = _cuda_sparse.kept_plan(kernel, gpu, m, n, k, scaled=scales is not None)
    return _cuda.cuda_call(
        function, plan, x, n, bias, values.data_ptr(), DTYPE_CODES[values.dtype], positions.data_ptr(),
        pointer(scales), 0 if scales is None else DTYPE_CODES[scales.dtype], group_size,
    )  # fmt: skip


def cuda_rejects(
    kernel: str, x: Tensor, values: Tensor, positions: Tensor, scales: Any, bias: Any, group_size: int
) -> str | None:
    """Why a CUDA kernel cannot run on these arguments."""
    if reason := _cuda_sparse.rejects_values(values, x):
        return reason
    if kernel == "ring":
        return _cuda_ring.rejects_kept(
            x, values, positions, scales, group_size, _cuda_ring.kept(values, scales, group_size)
        )
    if reason := _cuda_sparse.rejects_wgmma(kernel, x, values, positions, None if scales is None else group_size):
        return reason
    return None if scales is None else _cuda.rejects_groups(group_size, x.shape[-1], _cuda_sparse.PART_COLUMNS)


def cuda_yields(kernel: str, gpu: _cuda.Gpu, x: Tensor, *_: Any) -> str | None:
    """Why a CUDA kernel that can run leaves these arguments to a later one."""
    return _cuda_sparse.yields(kernel, gpu, x, wgmma=True)


OP = linear_op(
    "sparse24_linear(Tensor x, Tensor values, Tensor positions, Tensor? scales, Tensor? bias, int group_size) "
    "-> Tensor",
    check=check,
    dequantize=lambda x, values, positions, scales, bias, group_size: dequantize(
        values, positions, scales, group_size, x.shape[-1]
    ),
)
OP.native(native)
_cuda.add_rows(OP, cuda, cuda_rejects, cuda_yields)
_triton.add_row(OP)
OP.kernel("reference", "any")(reference)
