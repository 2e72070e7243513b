"""gptq_block and sparsegpt_block in Triton: one program for a few rows, columns left to right.

    wc[:, j] + Σ_{i<j} (w - q)[:, i] V'[i, j]

The differences w - q of the columns before j are in registers, spread over the lanes, and their product with a column
of V' is one sum over lanes. A column's own values come from memory, so that none is picked out of registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.ops._columns import by_layer
from llmkern.ops._tiles import power_of_two

MANY_ROWS = 8192  # from here on a program takes ROWS of them
ROWS = 4
WARP = 512  # columns of a row that a warp holds


@triton.jit
def nearest(value):
    """Round half to even for |value| <= 2^22: adding 1.5 * 2^23 leaves no bits for a fraction."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def quantize(value, scale, zero, BITS: tl.constexpr):
    """Nearest value of the grid, as the reference's `quantize`; zero in fp32."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    steps = tl.div_rn(value, scale)
    # Beyond ±1024 every code is at an end of its range, whatever the zero point.
    code = tl.clamp(nearest(tl.clamp(steps, -1024.0, 1024.0)) + zero, -HALF * 1.0, HALF - 1.0)
    return tl.where(steps == steps, (code - zero) * scale, steps)


@triton.jit
def compensated(moved, wc, vt, row, j, b, columns):
    """Column j of `wc` with the feedback of the differences `moved` [R, WIDTH] of the columns before it."""
    v = tl.load(vt + j * moved.shape[1] + columns)
    return tl.load(wc + row * b + j) + tl.sum(moved * v[None, :], axis=1)


@triton.jit
def choose(
    moved, w, wc, vt, diagonal, row, start, b, columns, PRUNE_N: tl.constexpr, PRUNE_M: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Which columns of start..start+PRUNE_M stay, bool [R, SLOTS].

    A column's score is that of its value while all columns of the group are free, which is what the feedback gives when
    each takes the value that it is given: the same sums as those of the columns that are fixed.
    """
    slot = tl.arange(0, SLOTS)
    score = tl.full([moved.shape[0], SLOTS], float("inf"), tl.float32)
    for i in range(PRUNE_M):
        j = start + i
        value = compensated(moved, wc, vt, row, j, b, columns)
        moved = tl.where((columns == j)[None, :], (tl.load(w + row * b + j) - value)[:, None], moved)
        value *= tl.load(diagonal + j)
        score = tl.where((slot == i)[None, :], (value * value)[:, None], score)
    other, own = score[:, None, :], score[:, :, None]
    goes_first = (other < own) | ((other == own) & (slot[None, None, :] < slot[None, :, None]))
    return tl.sum(goes_first.to(tl.int32), axis=2) >= PRUNE_N


@triton.jit
def solve(
    w, wc, vt, diagonal, mask, scales, zeros, groups, q, keep, n, b, n_groups, BITS: tl.constexpr,
    PRUNE_N: tl.constexpr, PRUNE_M: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a block of b columns. PRUNE_M 0: by the mask, if any; BITS 0: no grid.

    vt [b, WIDTH] is V' above its diagonal, transposed: the rest is zeros, so that no column feeds those before it.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(rows, n - 1).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = (rows < n)[:, None] & (columns < b)[None, :]
    moved = tl.zeros([ROWS, WIDTH], tl.float32)
    chosen = tl.zeros([ROWS, WIDTH], tl.float32)
    slot = tl.arange(0, SLOTS)
    kept = tl.zeros([ROWS], tl.int64)  # a bit per column of the current group
    for j in range(b):
        if PRUNE_M > 0:
            if j % PRUNE_M == 0:
                stays = choose(moved, w, wc, vt, diagonal, row, j, b, columns, PRUNE_N, PRUNE_M, SLOTS)
                kept = tl.sum(stays.to(tl.int64) << slot[None, :].to(tl.int64), axis=1)
                at = keep + row[:, None] * b + j + slot[None, :]
                tl.store(at, stays.to(tl.uint8), mask=(rows < n)[:, None] & (slot < PRUNE_M)[None, :])
        value = compensated(moved, wc, vt, row, j, b, columns)
        if BITS > 0:
            group = tl.load(groups + j)
            zero = tl.zeros([ROWS], tl.float32)
            if zeros is not None:
                zero = tl.load(zeros + row * n_groups + group).to(tl.float32)
            value = quantize(value, tl.load(scales + row * n_groups + group), zero, BITS)
        if PRUNE_M > 0:
            value = tl.where(((kept >> (j % PRUNE_M)) & 1) != 0, value, 0.0)
        elif mask is not None:
            value = tl.where(tl.load(mask + row * b + j) != 0, value, 0.0)
        here = (columns == j)[None, :]
        moved = tl.where(here, (tl.load(w + row * b + j) - value)[:, None], moved)
        chosen = tl.where(here, value[:, None], chosen)
    tl.store(q + row[:, None] * b + columns[None, :], chosen, mask=inside)


def shape_of_program(n: int, b: int, prune_m: int) -> tuple[int, int, int]:
    """(rows, columns with those that pad, warps) of a program for a block [n, b]."""
    width = power_of_two(b)
    rows = ROWS if n >= MANY_ROWS and width <= WARP // ROWS and prune_m <= 8 else 1
    return rows, width, min(max(width // WARP, 1), 16)


def solve_block(
    w: Tensor, wc: Tensor, v: Tensor, diagonal: Tensor | None, mask: Tensor | None, prune_n: int, prune_m: int,
    scales: Tensor | None, zeros: Tensor | None, groups: Tensor | None, bits: int, keep: Tensor | None,
) -> Tensor:  # fmt: skip
    """q [N, B]; `keep` is filled when columns are chosen here (prune_m > 0)."""
    n, b = w.shape
    q = torch.empty_like(w)
    if q.numel():
        rows, width, warps = shape_of_program(n, b, prune_m)
        vt = torch.nn.functional.pad(v.triu(1).T, (0, width - b)).contiguous()
        solve[(-(-n // rows),)](
            w, wc, vt, diagonal, None if mask is None else mask.view(torch.uint8),
            scales, zeros, groups, q, None if keep is None else keep.view(torch.uint8), n, b,
            1 if scales is None else scales.shape[1], BITS=bits, PRUNE_N=prune_n, PRUNE_M=prune_m,
            SLOTS=power_of_two(max(prune_m, 1)), ROWS=rows, WIDTH=width, num_warps=warps,
        )  # fmt: skip
    return q


@by_layer
def run(
    w: Tensor, wc: Tensor, v: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor, mask: Tensor | None,
    bits: int,
) -> Tensor:  # fmt: skip
    """The op; see `reference`."""
    return solve_block(w, wc, v, None, mask, 0, 0, scales, zeros, groups, bits, None)
