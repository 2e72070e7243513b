"""int4_linear in Triton: a word is read once and becomes eight columns in the registers of its thread."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.ops._triton_linear import linear, small_float
from llmkern.ops.int8_dynamic_linear.triton import quantize_rows


@triton.jit
def nibbles(words, start, limit, WIDTH: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr):
    """u = q + 8 of codes start..start+WIDTH of each row, int32 [N, WIDTH]; anything in 0..15 from `limit` on.

    WHOLE: start is a multiple of 8.
    """
    if WHOLE:
        at = start // 8 + tl.arange(0, WIDTH // 8)
        if EVEN:
            word = tl.load(words[:, None] + at[None, :])
        else:
            word = tl.load(words[:, None] + at[None, :], mask=(at * 8 < limit)[None, :], other=0)
        # Halves, quarters, nibbles: joined, so that all eight stay in the thread that has read the word.
        word = tl.join(word, word >> 16)
        word = tl.join(word, word >> 8)
        word = tl.join(word, word >> 4)
        return tl.reshape(word & 15, (words.shape[0], WIDTH))
    at = start + tl.arange(0, WIDTH)
    word = tl.load(words[:, None] + (at // 8)[None, :], mask=(at < limit)[None, :], other=0)
    return (word >> (at % 8 * 4)[None, :]) & 15


@triton.jit
def load(
    words, second, start, limit, seen, zero, OPERAND: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Codes less their zero point, [N, WIDTH]: -15..15, exact in every operand's type. x is 0 from `limit` on."""
    u = nibbles(words, start, limit, WIDTH, WHOLE, EVEN)
    if OPERAND == tl.int8:
        return (u - (zero + 8)[:, None]).to(tl.int8), seen
    return small_float(u, (zero + 8)[:, None]).to(OPERAND), seen


def run(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int,
    activations: str | None = None,
) -> Tensor:  # fmt: skip
    """The op; see `reference`."""
    n, stride = words.shape
    if activations is None:
        return linear(x, load, words, n, bias, group_size, stride=stride, scales=scales, zeros=zeros)
    codes, x_scales = quantize_rows(x, group_size)
    return linear(
        codes, load, words, n, bias, group_size, stride=stride, scales=scales, zeros=zeros, operand=torch.int8,
        dtype=x.dtype, x_scales=x_scales,
    )  # fmt: skip
