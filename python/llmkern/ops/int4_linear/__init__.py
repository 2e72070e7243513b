"""int4_linear: y = x @ Wᵀ + bias with int4 weights; activations kept, or int8 per group with activations="int8"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.ops import _cuda, _cuda_ring, _triton
from llmkern.ops._linear import DTYPE_CODES, check_input, check_scales, groups, linear_op, native_call, pointer
from llmkern.ops.int4_linear.reference import dequantize, reference

# For CUDA kernels that quantize x: what they keep of each 16 columns fits into the shared memory of every GPU.
MAX_INT8_K = 2**17


def check(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int,
    activations: str | None = None,
) -> int:  # fmt: skip
    """Raise on bad arguments; return N."""
    name = "int4_linear"
    if words.dtype != torch.int32:
        raise TypeError(f"{name}: words must be int32, got {words.dtype}")
    if words.ndim != 2:
        raise ValueError(f"{name}: words must be [N, ceil(K/8)], got {list(words.shape)}")
    n = words.shape[0]
    check_input(name, x, {"words": words, "scales": scales, "zeros": zeros}, n, bias)
    k = x.shape[-1]
    if words.shape[1] != -(-k // 8):
        raise ValueError(f"{name}: x is [..., K={k}], which needs words [N, {-(-k // 8)}], got {list(words.shape)}")
    check_scales(name, scales, zeros, n, k, group_size)
    if activations not in (None, "int8"):
        raise ValueError(f'{name}: activations must be None or "int8", got {activations!r}')
    return n


def native(
    function: Any, x: Tensor, words: Tensor, scales: Tensor, zeros: Any, bias: Any, group_size: int,
    activations: str | None = None,
) -> Tensor:  # fmt: skip
    """Pointers for csrc/cpu/int4_linear."""
    return native_call(
        function, x, words.shape[0], bias,
        words.data_ptr(), scales.data_ptr(), DTYPE_CODES[scales.dtype], pointer(zeros), group_size,
        activations == "int8",
    )  # fmt: skip


def cuda(
    kernel: str, function: Any, gpu: _cuda.Gpu, x: Tensor, words: Tensor, scales: Tensor, zeros: Any, bias: Any,
    group_size: int, activations: str | None = None,
) -> Tensor:  # fmt: skip
    """Sizes, room for quantized x, and pointers for csrc/cuda/int4_linear."""
    n, k = words.shape[0], x.shape[-1]
    if kernel.endswith("_int8"):
        return _cuda_int8(kernel, function, gpu, x, words, scales, zeros, bias, group_size)
    m = x.numel() // max(k, 1)
    if kernel == "ring":
        found = _cuda_ring.plan(gpu, max(m, 1), n, k, _cuda_ring.codes(scales, zeros, group_size, x.shape[-1], 32))
        assert found is not None, "cuda_rejects was not asked"
        plan = found
    else:
        plan = _cuda.codes_plan(kernel, gpu, m, n, k, lane_columns=32)
    return _cuda.cuda_call(
        function, plan, x, n, bias, words.data_ptr(), scales.data_ptr(), DTYPE_CODES[scales.dtype], pointer(zeros),
        group_size,
    )  # fmt: skip


def _cuda_int8(
    kernel: str, function: Any, gpu: _cuda.Gpu, x: Tensor, words: Tensor, scales: Tensor, zeros: Any, bias: Any,
    group_size: int,
) -> Tensor:  # fmt: skip
    """The same with activations="int8"."""
    n, k = words.shape[0], x.shape[-1]
    m, parts, inside = x.numel() // k, groups(k, group_size), False
    if kernel == "stream_int8":
        plan = _cuda.stream_plan(gpu, m, n, k, lane_columns=32)
        # A group of 128 columns is quantized where it is used, without reading x twice.
        pays = _cuda.quantizes_inside(m, k) if parts == 1 else group_size == 128 and m <= 8
        inside = pays and _cuda.inside_aligned(x, words, k, 4 * words.shape[1])
    elif kernel == "wgmma_int8":
        plan = _cuda.nibble_plan(gpu, m, n, k)
    else:
        plan = _cuda.integer_tile_plan(gpu, "mma", m, n, k, parts)
    workspace = None if inside else _cuda.integer_workspace(x, m, k, parts, parts)
    return _cuda.cuda_call(
        function, plan, x, n, bias, words.data_ptr(), scales.data_ptr(), DTYPE_CODES[scales.dtype], pointer(zeros),
        group_size, pointer(workspace),
    )  # fmt: skip


def cuda_rejects(
    kernel: str, x: Tensor, words: Tensor, scales: Tensor, zeros: Any, bias: Any, group_size: int,
    activations: str | None = None,
) -> str | None:  # fmt: skip
    """Why a CUDA kernel cannot run on these arguments."""
    if kernel.endswith("_int8"):
        if activations is None:
            return 'quantizes activations, which only activations="int8" asks for'
        if not 0 < x.shape[-1] <= MAX_INT8_K:
            return f"needs K of 1 to {MAX_INT8_K}, got K={x.shape[-1]}"
        if kernel == "wgmma_int8" and (reason := _rejects_wgmma_int8(x, words, zeros)):
            return reason
        return _cuda.rejects_groups(group_size, x.shape[-1], 128)
    if activations is not None:
        return f"keeps activations as they are, but activations={activations!r} is asked for"
    if reason := _cuda.rejects_groups(group_size, x.shape[-1], 32):
        return reason
    if kernel == "ring":
        described = _cuda_ring.codes(scales, zeros, group_size, x.shape[-1], 32)
        return _cuda_ring.rejects(x, words, 4 * words.shape[1], described, (scales, zeros))
    return None


def _rejects_wgmma_int8(x: Tensor, words: Tensor, zeros: Any) -> str | None:
    """What `cuda.wgmma_int8` leaves to `cuda.mma_int8`."""
    if zeros is not None:
        return "needs weights without zeros"
    if x.shape[-1] % 128:
        return f"needs K in multiples of 128, got K={x.shape[-1]}"
    return "needs words at a multiple of 16 bytes" if words.data_ptr() % 16 else None


def cuda_yields(kernel: str, gpu: _cuda.Gpu, x: Tensor, words: Tensor, *rest: Any) -> str | None:
    """Why a CUDA kernel leaves these arguments to a later one."""
    k = x.shape[-1]
    if kernel.endswith("_int8"):
        return _cuda.integer_yields(kernel, gpu, x.numel() // k)
    return _cuda.yields(kernel, gpu, x.numel() // max(k, 1), words.shape[0], k)


OP = linear_op(
    "int4_linear(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? bias, int group_size, "
    "str? activations=None) -> Tensor",
    check=check,
    dequantize=lambda x, words, scales, zeros, bias, group_size, activations=None: dequantize(
        words, scales, zeros, group_size, x.shape[-1]
    ),
)
OP.native(native)
_cuda.add_rows(OP, cuda, cuda_rejects, cuda_yields)
_triton.add_row(OP)
OP.kernel("reference", "any")(reference)
