"""sparse24_int4_linear in Triton: words become kept codes, and these are spread over their quads, in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmkern.ops._triton_linear import linear, small_float
from llmkern.ops.int4_linear.triton import nibbles
from llmkern.ops.sparse24_linear.triton import kept_at, places, spread


@triton.jit
def load(
    words, positions, start, limit, seen, zero, OPERAND: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Dense columns [N, WIDTH] of kept codes and positions."""
    if WHOLE:
        u = nibbles(words, start // 2, (limit + 3) // 4 * 2, WIDTH // 2, WHOLE, EVEN)
        kept = small_float(u, tl.full([1, 1], 8, tl.int32)).to(OPERAND)
        return spread(kept, places(positions, start, limit, WIDTH, EVEN), start, limit, WIDTH, EVEN), seen
    at, there = kept_at(positions, start, limit, WIDTH)
    word = tl.load(words[:, None] + at // 8, mask=there, other=0)
    code = small_float((word >> (at % 8 * 4)) & 15, tl.full([1, 1], 8, tl.int32))
    return tl.where(there, code, 0.0).to(OPERAND), seen


def run(x: Tensor, words: Tensor, positions: Tensor, scales: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """The op; see `reference`."""
    n, stride = words.shape
    return linear(x, load, words, n, bias, group_size, stride=stride, scales=scales, second=positions)
