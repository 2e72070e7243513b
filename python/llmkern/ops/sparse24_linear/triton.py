"""sparse24_linear in Triton: kept values are spread over their quads of columns in registers, then a dense product."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmkern.ops._triton_linear import linear, small_float


@triton.jit
def operand(values, OPERAND: tl.constexpr):
    """Kept values as operands, exactly."""
    if values.dtype == tl.int8:
        return small_float((values.to(tl.int32) & 255) ^ 128, 128 + tl.zeros_like(values).to(tl.int32)).to(OPERAND)
    return values.to(OPERAND)


@triton.jit
def places(positions, start, limit, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """The nibble of each quad of columns start..start+WIDTH, int32 [N, WIDTH / 4]; start is a multiple of 8."""
    at = start // 8 + tl.arange(0, WIDTH // 8)
    if EVEN:
        byte = tl.load(positions[:, None] + at[None, :]).to(tl.int32)
    else:
        byte = tl.load(positions[:, None] + at[None, :], mask=(at * 8 < limit)[None, :], other=0).to(tl.int32)
    return tl.reshape(tl.join(byte & 15, byte >> 4), (positions.shape[0], WIDTH // 4))


@triton.jit
def spread(kept, nibble, start, limit, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Two kept values of each quad [N, WIDTH / 2] -> [N, WIDTH] with zeros elsewhere; the first is the left one."""
    first, second = tl.split(tl.reshape(kept, (kept.shape[0], WIDTH // 4, 2)))
    low = nibble & 3
    high = nibble >> 2
    none = tl.zeros_like(first)
    # Joined, so that the four columns of a quad stay in the thread that has its values.
    even = tl.join(  # columns 0 and 2
        tl.where(low == 0, first, none), tl.where(low == 2, first, tl.where(high == 2, second, none))
    )
    odd = tl.join(  # columns 1 and 3
        tl.where(low == 1, first, tl.where(high == 1, second, none)), tl.where(high == 3, second, none)
    )
    dense = tl.join(even, odd)
    dense = tl.reshape(dense, (kept.shape[0], WIDTH))
    if not EVEN:  # the last quad may go on beyond K, with anything in it
        columns = start + tl.arange(0, WIDTH)
        dense = tl.where((columns < limit)[None, :], dense, tl.zeros_like(dense))
    return dense


@triton.jit
def kept_at(positions, start, limit, WIDTH: tl.constexpr):
    """Column by column, for a start anywhere: (index of the kept value, whether there is one), [N, WIDTH]."""
    columns = start + tl.arange(0, WIDTH)
    inside = (columns < limit)[None, :]
    byte = tl.load(positions[:, None] + (columns // 8)[None, :], mask=inside, other=0).to(tl.int32)
    nibble = (byte >> (columns // 4 % 2 * 4)[None, :]) & 15
    place = (columns % 4)[None, :]
    second = (nibble >> 2) == place
    return (columns // 4 * 2)[None, :] + second.to(tl.int32), inside & (second | ((nibble & 3) == place))


@triton.jit
def load(
    values, positions, start, limit, seen, zero, OPERAND: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Dense columns [N, WIDTH] of kept values and positions."""
    if WHOLE:
        at = start // 2 + tl.arange(0, WIDTH // 2)
        if EVEN:
            kept = tl.load(values[:, None] + at[None, :])
        else:
            kept = tl.load(values[:, None] + at[None, :], mask=(at // 2 * 4 < limit)[None, :], other=0)
        nibble = places(positions, start, limit, WIDTH, EVEN)
        return spread(operand(kept, OPERAND), nibble, start, limit, WIDTH, EVEN), seen
    at, there = kept_at(positions, start, limit, WIDTH)
    return operand(tl.load(values[:, None] + at, mask=there, other=0), OPERAND), seen


def run(
    x: Tensor, values: Tensor, positions: Tensor, scales: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """The op; see `reference`."""
    n, stride = values.shape
    return linear(x, load, values, n, bias, group_size, stride=stride, scales=scales, second=positions)
