"""scale_search in Triton: a program holds some groups of a row and tries every clip on them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.ops._linear import groups
from llmkern.ops._tiles import power_of_two
from llmkern.ops.gptq_block.triton import nearest, quantize

TILE = 1024  # elements of w that a program holds; longer groups are read again for each clip


@triton.jit
def search(
    w, importance, ratios, scales, zeros, k, group_size, n_groups, steps, BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of a row, WIDTH columns of each at a time."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    parts = tl.cdiv(n_groups, GROUPS)
    row = (tl.program_id(0) // parts).to(tl.int64)
    group = tl.program_id(0) % parts * GROUPS + tl.arange(0, GROUPS)
    begin = group * group_size
    end = tl.minimum(begin + group_size, k)
    inside = tl.arange(0, WIDTH)
    lows = tl.zeros([GROUPS, WIDTH], tl.float32)
    highs = tl.zeros([GROUPS, WIDTH], tl.float32)
    for chunk in range(0, group_size, WIDTH):
        column = begin[:, None] + chunk + inside[None, :]
        value = tl.load(w + row * k + column, mask=column < end[:, None], other=0.0)
        lows = tl.minimum(lows, value)
        highs = tl.maximum(highs, value)
    low = tl.min(lows, axis=1)
    high = tl.max(highs, axis=1)
    if SYMMETRIC:
        high = tl.maximum(high, -low)
        low = -high
    best = tl.full([GROUPS], float("inf"), tl.float32)
    best_scale = tl.full([GROUPS], 1.0, tl.float32)
    best_zero = tl.zeros([GROUPS], tl.float32)
    for i in range(steps):
        ratio = tl.load(ratios + i)
        scale = tl.div_rn((high - low) * ratio, 2.0 * HALF - 1.0)
        scale = tl.where(scale > 0, scale, 1.0)
        zero = tl.zeros([GROUPS], tl.float32)
        if not SYMMETRIC:
            zero = nearest(tl.div_rn(-low * ratio, scale)) - HALF
        errors = tl.zeros([GROUPS, WIDTH], tl.float32)
        for chunk in range(0, group_size, WIDTH):
            column = begin[:, None] + chunk + inside[None, :]
            there = column < end[:, None]
            value = tl.load(w + row * k + column, mask=there, other=0.0)
            weight = tl.load(importance + column, mask=there, other=0.0)
            off = value - quantize(value, scale[:, None], zero[:, None], BITS)
            errors += off * off * weight
        error = tl.sum(errors, axis=1)
        better = error < best
        best = tl.where(better, error, best)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    at = row * n_groups + group
    tl.store(scales + at, best_scale, mask=group < n_groups)
    tl.store(zeros + at, best_zero.to(tl.int8), mask=group < n_groups)


def run(
    w: Tensor, importance: Tensor, group_size: int, bits: int, symmetric: bool, steps: int, smallest: float
) -> tuple[Tensor, Tensor]:
    """The op; see `reference`."""
    n, k = w.shape
    g = groups(k, group_size)
    scales, zeros = w.new_empty((n, g)), w.new_empty((n, g), dtype=torch.int8)
    if scales.numel():
        # In double precision as the reference's, and then fp32, as torch multiplies an fp32 tensor by a Python number.
        ratios = 1 - torch.arange(steps, dtype=torch.float64, device=w.device) * (1 - smallest) / steps
        width = min(power_of_two(group_size), TILE)
        some = min(TILE // width, power_of_two(g))
        search[(n * -(-g // some),)](
            w, importance, ratios.float(), scales, zeros, k, group_size, g, steps, BITS=bits, SYMMETRIC=symmetric,
            GROUPS=some, WIDTH=width, num_warps=4,
        )  # fmt: skip
    return scales, zeros
