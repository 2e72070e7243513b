"""y = x wᵀ + bias in Triton for any packed w: the loop over columns, the scales, and the split of few rows.

    sums[n, m] = Σ over columns of a group (codes of w)[n, k] * x[m, k]        tensor cores, exact operands
    y[m, n]    = Σ over groups sums[n, m] * scale[n, group]  + bias[n]         fp32

Weights are turned into a tile in registers by the op's `load`, and are the left operand, which tensor cores take from
there. Codes less their zero point are exact in bf16, so no weight is rounded: scales multiply the sums of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.ops import _triton, _tuning
from llmkern.ops._linear import groups
from llmkern.ops._tiles import Kind, Tiles, power_of_two, tiles

BAND = 8  # tiles of w's rows that take turns with all tiles of x, so that both stay in the L2 cache
REDUCE = (16, 128)  # rows of x and of w of a program that adds up partial sums


@triton.jit
def small_float(u, offset):
    """u - offset in fp32, int32 u in 0..255, offset within ±1024: u becomes the low bits of 2^23, not a conversion."""
    return (u | 0x4B000000).to(tl.float32, bitcast=True) - (offset + 8388608).to(tl.float32)


@triton.jit
def store_rows(
    sums, scales, x_scales, bias, y, row, rows, token, tokens, m, n, n_groups, ONE_GROUP: tl.constexpr,
    X_ONE_GROUP: tl.constexpr,
):  # fmt: skip
    """y[tokens, rows] of sums [N, M], with the scales that are one for all columns."""
    out = sums.to(tl.float32)
    if X_ONE_GROUP:
        out *= tl.load(x_scales + token)[None, :]
    if ONE_GROUP:
        if scales is not None:
            out *= tl.load(scales + row).to(tl.float32)[:, None]
    if bias is not None:
        out += tl.load(bias + row).to(tl.float32)[:, None]
    at = y + tokens.to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(at, out.to(y.dtype.element_ty), mask=(rows < n)[:, None] & (tokens < m)[None, :])


@triton.jit
def product(
    x, w, second, offsets, scales, zeros, x_scales, bias, y, partial,
    m, n, k, group_size, n_groups, w_stride, second_stride, steps, per_group, per_split,
    load: tl.constexpr, count: tl.constexpr, OPERAND: tl.constexpr, ONE_GROUP: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr, ONE_STEP: tl.constexpr, SPLIT: tl.constexpr, X_GROUPS: tl.constexpr,
    ZERO_LATER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    """One tile of y, or a part of its sums. OPERAND is the type of both operands; of int8, sums are int32.

    `load(w, second, start, limit, seen, zero, ...)` gives columns start..start+BLOCK_K of w, zeros from `limit` on, and
    the number of values seen so far, which a bitmask's next step starts from (`count` gives the first).
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    band = tl.program_id(0) // (BAND * tiles_m)
    width = tl.minimum(tl.cdiv(n, BLOCK_N) - band * BAND, BAND)
    inside = tl.program_id(0) % (BAND * tiles_m)
    rows = (band * BAND + inside % width) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = (inside // width) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(rows, n - 1).to(tl.int64)  # beyond the end: the last again, which is not stored
    token = tl.minimum(tokens, m - 1).to(tl.int64)

    INTEGER: tl.constexpr = OPERAND == tl.int8
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    first_step = tl.program_id(1) * per_split
    last_step = tl.minimum(first_step + per_split, steps)
    x_row = x + token * k
    w_row = w + row * w_stride
    if offsets is not None:
        w_row = w + tl.load(offsets + row)
    second_row = w_row
    if second is not None:
        second_row = second + row * second_stride
    seen = tl.zeros([BLOCK_N], tl.int32)
    if count is not None:
        if WHOLE:
            before = first_step * BLOCK_K
        else:
            before = first_step // per_group * group_size + first_step % per_group * BLOCK_K
        seen = count(second_row, before, seen, BLOCK_K)
    zero = tl.zeros([BLOCK_N], tl.int32)
    if ONE_GROUP and zeros is not None:
        zero = tl.load(zeros + row).to(tl.int32)

    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_M], SUM)
    x_sums = tl.zeros([BLOCK_M], tl.int32)
    for step in range(first_step, last_step):
        if WHOLE:
            start, limit, group = step * BLOCK_K, k, step // per_group
        else:
            group = step // per_group
            start = group * group_size + step % per_group * BLOCK_K
            limit = tl.minimum(k, (group + 1) * group_size)
        columns = start + tl.arange(0, BLOCK_K)
        if EVEN:
            x_tile = tl.load(x_row[None, :] + columns[:, None])
        else:
            x_tile = tl.load(x_row[None, :] + columns[:, None], mask=(columns < limit)[:, None], other=0)
        if not ONE_GROUP and zeros is not None:
            zero = tl.load(zeros + row * n_groups + group).to(tl.int32)
        w_tile, seen = load(w_row, second_row, start, limit, seen, zero, OPERAND, BLOCK_K, WHOLE, EVEN)
        sums = tl.dot(w_tile, x_tile.to(OPERAND), sums, input_precision="ieee", out_dtype=SUM)
        if ZERO_LATER:
            x_sums += tl.sum(x_tile.to(tl.int32), axis=0)
        if not ONE_GROUP:
            part = sums
            if ZERO_LATER:
                part = sums - zero[:, None] * x_sums[None, :]
            part = part.to(tl.float32)
            if X_GROUPS:
                part *= tl.load(x_scales + token * n_groups + group)[None, :]
            part *= tl.load(scales + row * n_groups + group).to(tl.float32)[:, None]
            if ONE_STEP or not INTEGER:
                total += part
                sums = tl.zeros([BLOCK_N, BLOCK_M], SUM)
                x_sums = tl.zeros([BLOCK_M], tl.int32)
            else:  # integers of a group are added as such
                ends = (step + 1) % per_group == 0 or step + 1 == last_step
                total += tl.where(ends, part, 0.0)
                sums = tl.where(ends, 0, sums)
                x_sums = tl.where(ends, 0, x_sums)

    if ONE_GROUP:
        if ZERO_LATER:
            sums -= zero[:, None] * x_sums[None, :]
    else:
        sums = total
    if SPLIT:
        at = partial + tl.program_id(1).to(tl.int64) * m * n + tokens.to(tl.int64)[None, :] * n + rows[:, None]
        tl.store(at, sums, mask=(rows < n)[:, None] & (tokens < m)[None, :])
    else:
        store_rows(
            sums, scales, x_scales, bias, y, row, rows, token, tokens, m, n, n_groups, ONE_GROUP,
            INTEGER and not X_GROUPS,
        )  # fmt: skip


@triton.jit
def add_parts(
    partial, scales, x_scales, bias, y, m, n, splits, ONE_GROUP: tl.constexpr, X_ONE_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y of the partial sums [splits, M, N], added in their order."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, token = tl.minimum(rows, n - 1).to(tl.int64), tl.minimum(tokens, m - 1).to(tl.int64)
    at = partial + token[None, :] * n + row[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_M], partial.dtype.element_ty)
    for split in range(splits):
        sums += tl.load(at + tl.cast(split, tl.int64) * m * n)
    store_rows(sums, scales, x_scales, bias, y, row, rows, token, tokens, m, n, 1, ONE_GROUP, X_ONE_GROUP)


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}
KINDS: dict[torch.dtype, Kind] = {torch.float32: "float32", torch.int8: "int8"}


def operand_type(x: Tensor, values: torch.dtype) -> torch.dtype:
    """What both operands become: x's type if it holds the values exactly, as it does integer codes; else fp32."""
    return x.dtype if not values.is_floating_point or values == x.dtype else torch.float32


def linear(
    x: Tensor, load: Callable[..., Any], w: Tensor, n: int, bias: Tensor | None, group_size: int, *, stride: int,
    scales: Tensor | None, zeros: Tensor | None = None, second: Tensor | None = None, offsets: Tensor | None = None,
    count: Callable[..., Any] | None = None, operand: torch.dtype | None = None, dtype: torch.dtype | None = None,
    x_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K] times the packed w [n, K] that `load` reads, `stride` elements a row, plus bias; in `dtype` or x's.

    `second` and `offsets` are the other tensors of w. int8 x has `x_scales`, [M] or [M, G].
    """
    k = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], n), dtype=dtype or x.dtype)
    if y.numel() == 0:
        return y
    if k == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    if scales is None:
        group_size = k  # nothing to be scaled
    m = y.numel() // n
    operand = operand or operand_type(x, w.dtype)
    one_group = group_size >= k
    capability, kind = _triton.capability(x), KINDS.get(operand, "half")
    integer = operand == torch.int8
    x_groups = integer and x_scales is not None and x_scales.numel() > m
    bias = None if bias is None else bias.contiguous()
    x = x.contiguous()

    def launch(t: Tiles) -> None:
        partial = None
        if t.splits > 1:
            partial = x.new_empty((t.splits, m, n), dtype=torch.int32 if integer and one_group else torch.float32)
        product[(-(-m // t.block_m) * -(-n // t.block_n), t.splits)](
            x, w, second, offsets, scales, zeros, x_scales, bias, y, partial,
            m, n, k, group_size, groups(k, group_size), stride, 0 if second is None else second.shape[1],
            -(-k // t.block_k) if t.whole else groups(k, group_size) * t.per_group, t.per_group, t.per_split,
            load=load, count=count, OPERAND=TYPES[operand], ONE_GROUP=one_group, WHOLE=t.whole,
            EVEN=t.whole and k % t.block_k == 0, ONE_STEP=t.per_group == 1, SPLIT=t.splits > 1, X_GROUPS=x_groups,
            ZERO_LATER=integer and zeros is not None and w.dtype == torch.int8,
            BLOCK_M=t.block_m, BLOCK_N=t.block_n, BLOCK_K=t.block_k, BAND=BAND,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        if partial is not None:
            add_parts[(-(-n // REDUCE[1]), -(-m // REDUCE[0]))](
                partial, scales, x_scales, bias, y, m, n, t.splits, ONE_GROUP=one_group,
                X_ONE_GROUP=integer and not x_groups, BLOCK_M=REDUCE[0], BLOCK_N=REDUCE[1], num_warps=4,
            )  # fmt: skip

    usual = tiles(capability, m, n, k, group_size, kind, gathers=count is not None)
    key = (capability, power_of_two(m), n, k, group_size, id(load), operand, x_groups)
    launch(_tuning.chosen(key, usual, launch))
    return y
