"""What rows of gptq_block and sparsegpt_block share.

Of the CUDA rows: sizes of a launch, and blocks wider than the kernel's. Of the others: layers one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern._dense import product
from llmkern.ops import _cuda
from llmkern.ops._linear import pointer

MAX_COLUMNS, WARPS = 128, 8  # csrc/cuda/columns


def by_layer(call: Callable[..., Any]) -> Callable[..., Any]:
    """A row's `call` on matrices [N, B], made to take layers of them [L, N, B] too: one by one, and stacked.

    `call` takes w before any other tensor. Of the others only the vector `groups` is all layers' own; what the op's
    check leaves alone, as a grid that bits=0 does not use, may have any shape.
    """

    @wraps(call)
    def run(*args: Any) -> Any:
        w = next(arg for arg in args if isinstance(arg, Tensor))
        if w.ndim == 2:
            return call(*args)
        split = [isinstance(arg, Tensor) and arg.ndim > 1 and len(arg) == len(w) for arg in args]
        results = [
            call(*(arg[layer] if divided else arg for arg, divided in zip(args, split, strict=True)))
            for layer in range(len(w))
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))

    return run


class ColumnPlan(NamedTuple):
    """Sizes of a launch: lanes of a warp that share a row, rows that a lane has a part of, warps of a block."""

    lanes: int
    rows: int
    warps: int


def column_plan(gpu: _cuda.Gpu, layers: int, n: int, b: int, prune_m: int) -> ColumnPlan:
    """Sizes of `cuda.block` for layers of n rows of b columns; prune_m 0: nothing is chosen inside.

    All rows should be in work at once, as the time of a block of few rows is that of its columns one after the other.
    More lanes per row keep more multiprocessors busy where rows are few; fewer repeat less where they are many.
    A block is of one layer, whose blocks share its rows evenly.
    """
    if prune_m not in (0, 4):
        lanes, rows = 4, 1
    elif b <= 4:
        lanes, rows = 1, 1
    else:
        share = -(-layers * n // gpu.multiprocessors)
        sizes = ((8, 1), (4, 1), (4, 2), (2, 2))
        lanes, rows = next((size for size in sizes if share <= WARPS * _warp_rows(*size)), sizes[-1])
    warp = _warp_rows(lanes, rows)
    warps = min(WARPS, -(-layers * n // (gpu.multiprocessors * warp)))
    blocks = -(-n // (warps * warp))
    return ColumnPlan(lanes, rows, -(-n // (blocks * warp)))


def _warp_rows(lanes: int, rows: int) -> int:
    return 32 // lanes * rows


def run_columns(
    function: Callable[..., None], gpu: _cuda.Gpu, w: Tensor, wc: Tensor, v: Tensor, diagonal: Tensor | None,
    mask: Tensor | None, prune_n: int, prune_m: int, scales: Tensor | None, zeros: Tensor | None,
    groups: Tensor | None, bits: int, *, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """q and, if asked for, the mask, by the native `function`; a block wider than its own goes in several.

    Shapes are the op's, of one layer or of several, which go in one launch. Nothing waits; a launch that fails is a
    RuntimeError.
    """
    layers, (n, b) = len(w) if w.ndim == 3 else 1, w.shape[-2:]
    q = torch.empty_like(w)
    kept = torch.empty_like(w, dtype=torch.bool) if keep else None
    if mask is not None:
        prune_n = prune_m = 0
    if b > MAX_COLUMNS:
        unit = max(prune_m, 1)
        width = MAX_COLUMNS // unit * unit
        for start in range(0, b, width):
            at = slice(start, start + width)
            here = wc[..., at].contiguous()
            if start:
                here = product(w[..., :start] - q[..., :start], v[..., :start, at]).add_(here)
            chosen, stay = run_columns(
                function, gpu, w[..., at].contiguous(), here, v[..., at, at].contiguous(),
                None if diagonal is None else diagonal[..., at].contiguous(),
                None if mask is None else mask[..., at].contiguous(), prune_n, prune_m, scales, zeros,
                None if groups is None else groups[at], bits, keep=keep,
            )  # fmt: skip
            q[..., at] = chosen
            if kept is not None and stay is not None:
                kept[..., at] = stay
    elif w.numel():
        _cuda.call(
            function, w, w.data_ptr(), wc.data_ptr(), v.data_ptr(), pointer(diagonal), pointer(mask), prune_n, prune_m,
            pointer(scales), pointer(zeros), pointer(groups), q.data_ptr(), pointer(kept), layers, n, b,
            0 if scales is None else scales.shape[-1], bits, *column_plan(gpu, layers, n, b, prune_m),
        )  # fmt: skip
    return q, kept
