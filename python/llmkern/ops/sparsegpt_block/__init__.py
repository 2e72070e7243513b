"""sparsegpt_block: the column updates of one block of columns, SparseGPT without an inverse.

The feedback is that of gptq_block; here columns are pruned: by a given mask (unstructured), or n of every m chosen
inside (SparseGPT, Frantar and Alistarh, arXiv 2301.00774), and kept values may be quantized in the same pass.
Layers of one shape go in one call as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern._registry import Op
from llmkern.ops import _cuda, _triton
from llmkern.ops._columns import by_layer, run_columns
from llmkern.ops._linear import pointer
from llmkern.ops.gptq_block import check_block, check_devices, check_grid, check_mask, layers
from llmkern.ops.sparsegpt_block.reference import reference

MAX_M = 64  # the native kernels keep one n:m group per row on the stack


def check(
    w: Tensor, wc: Tensor, v: Tensor, diagonal: Tensor, mask: Tensor | None, prune_n: int, prune_m: int,
    scales: Tensor | None, zeros: Tensor | None, groups: Tensor | None, bits: int,
) -> None:  # fmt: skip
    """As gptq_block, with diagonal fp32 [B] (diag of V); either mask, or B a multiple of prune_m; bits 0 or 2..8.

    With L layers diagonal is [L, B]. q and the mask are as w.
    """
    name = "sparsegpt_block"
    check_block(name, w, wc, v)
    b = w.shape[-1]
    check_devices(name, w, diagonal=diagonal)
    if diagonal.dtype != torch.float32 or diagonal.shape != (*w.shape[:-2], b) or not diagonal.is_contiguous():
        raise ValueError(
            f"{name}: diagonal must be contiguous float32 [{layers(w)}B={b}], "
            f"got {diagonal.dtype} {list(diagonal.shape)}"
        )
    check_mask(name, w, mask)
    if mask is None and not (0 <= prune_n <= prune_m and 1 <= prune_m <= MAX_M and b % prune_m == 0):
        raise ValueError(
            f"{name}: without a mask, n:m needs 0 <= n <= m <= {MAX_M} and m dividing B={b}, "
            f"got n={prune_n}, m={prune_m}"
        )
    if bits:
        if scales is None or groups is None:
            raise ValueError(f"{name}: bits={bits} needs scales and groups")
        check_grid(name, w, scales, zeros, groups, bits)


def native(
    function: Any, w: Tensor, wc: Tensor, v: Tensor, diagonal: Tensor, mask: Any, prune_n: int, prune_m: int,
    scales: Any, zeros: Any, groups: Any, bits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pointers for csrc/cpu/sparsegpt_block; one layer."""
    n, b = w.shape
    q, keep = torch.empty_like(w), torch.empty_like(w, dtype=torch.bool)
    function(
        w.data_ptr(), wc.data_ptr(), v.data_ptr(), diagonal.data_ptr(), pointer(mask), prune_n, prune_m,
        pointer(scales), pointer(zeros), pointer(groups), q.data_ptr(), keep.data_ptr(),
        n, b, 0 if scales is None else scales.shape[1], bits, torch.get_num_threads(),
    )  # fmt: skip
    return q, keep


def cuda(
    kernel: str, function: Any, gpu: _cuda.Gpu, w: Tensor, wc: Tensor, v: Tensor, diagonal: Tensor, mask: Any,
    prune_n: int, prune_m: int, scales: Any, zeros: Any, groups: Any, bits: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Sizes and pointers for csrc/cuda/sparsegpt_block."""
    return run_columns(
        function, gpu, w, wc, v, diagonal, mask, prune_n, prune_m, scales, zeros, groups, bits, keep=True
    )  # fmt: skip


OP: Op = Op(
    "sparsegpt_block(Tensor w, Tensor wc, Tensor v, Tensor diagonal, Tensor? mask, int prune_n, int prune_m, "
    "Tensor? scales, Tensor? zeros, Tensor? groups, int bits) -> (Tensor, Tensor)",
    check=check,
    fake=lambda checked, w, *rest: (torch.empty_like(w), torch.empty_like(w, dtype=torch.bool)),
)
OP.native(by_layer(native))
_cuda.add_rows(OP, cuda, dtypes=(torch.float32,))
_triton.add_row(OP)
OP.kernel("reference", "any")(by_layer(reference))
