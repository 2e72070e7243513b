"""bitmask_linear in Triton: a column's kept value stands where the bits before it in its row say how many there are.

    index[n, k] = row_offsets[n] + (bits set in columns 0..k-1 of row n)

Within a step that is a running sum over bytes and the bits below one in its byte; from step to step a number per row
is carried along.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmkern.ops._triton_linear import linear
from llmkern.ops.sparse24_linear.triton import operand


@triton.jit
def ones(byte):
    """Number of bits set in 0..255."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@triton.jit
def count(bits, end, seen, WIDTH: tl.constexpr):
    """Bits set in columns 0..end-1 of each row, added to `seen`, int32 [N]."""
    for start in range(0, end, WIDTH):
        at = start // 8 + tl.arange(0, WIDTH // 8)
        byte = tl.load(bits[:, None] + at[None, :], mask=(at * 8 < end)[None, :], other=0).to(tl.int32)
        inside = (1 << tl.minimum(tl.maximum(end - at * 8, 0), 8)) - 1
        seen += tl.sum(ones(byte & inside[None, :]), axis=1)
    return seen


@triton.jit
def load(
    values, bits, start, limit, seen, zero, OPERAND: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Dense columns [N, WIDTH], and how many values the rows have up to their end."""
    columns = start + tl.arange(0, WIDTH)
    if WHOLE:
        at = start // 8 + tl.arange(0, WIDTH // 8)
        if EVEN:
            byte = tl.load(bits[:, None] + at[None, :]).to(tl.int32)
        else:
            byte = tl.load(bits[:, None] + at[None, :], mask=(at * 8 < limit)[None, :], other=0).to(tl.int32)
        many = ones(byte)
        before = tl.cumsum(many, axis=1) - many
        # Halves, quarters, bits, with the bits set below each: joined, so that a byte's columns stay in its thread.
        before = tl.join(before, before + ones(byte & 15))
        byte = tl.join(byte & 15, byte >> 4)
        before = tl.join(before, before + ones(byte & 3))
        byte = tl.join(byte & 3, byte >> 2)
        before = tl.join(before, before + (byte & 1))
        byte = tl.join(byte & 1, byte >> 1)
        before = tl.reshape(before, (values.shape[0], WIDTH))
        kept = tl.reshape(byte, (values.shape[0], WIDTH)) != 0
        added = tl.sum(many, axis=1)
        if not EVEN:
            kept = kept & (columns < limit)[None, :]
    else:
        byte = tl.load(bits[:, None] + (columns // 8)[None, :], mask=(columns < limit)[None, :], other=0).to(tl.int32)
        one = (byte >> (columns % 8)[None, :]) & 1
        before = tl.cumsum(one, axis=1) - one
        kept = one != 0
        added = tl.sum(one, axis=1)
    tile = tl.load(values[:, None] + seen[:, None] + before, mask=kept, other=0)
    if values.dtype.element_ty == tl.int8:
        return operand(tile, OPERAND), seen + added
    return tile.to(OPERAND), seen + added


def run(
    x: Tensor, values: Tensor, bits: Tensor, row_offsets: Tensor, scales: Tensor | None, bias: Tensor | None,
    group_size: int,
) -> Tensor:  # fmt: skip
    """The op; see `reference`."""
    return linear(
        x, load, values, bits.shape[0], bias, group_size, stride=0, scales=scales, second=bits, offsets=row_offsets,
        count=count,
    )  # fmt: skip
