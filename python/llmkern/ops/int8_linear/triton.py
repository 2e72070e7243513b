"""int8_linear in Triton: a code is one byte, which becomes an exact operand; see `_triton_linear`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmkern.ops._triton_linear import linear, small_float


@triton.jit
def load(
    codes, second, start, limit, seen, zero, OPERAND: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Codes less their zero point, [N, WIDTH]; as they stand for int8 operands."""
    columns = start + tl.arange(0, WIDTH)
    if EVEN:
        code = tl.load(codes[:, None] + columns[None, :])
    else:
        code = tl.load(codes[:, None] + columns[None, :], mask=(columns < limit)[None, :], other=0)
    if OPERAND == tl.int8:
        return code, seen
    return small_float((code.to(tl.int32) & 255) ^ 128, (zero + 128)[:, None]).to(OPERAND), seen


def run(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int) -> Tensor:
    """The op; see `reference`."""
    n, k = codes.shape
    return linear(x, load, codes, n, bias, group_size, stride=k, scales=scales, zeros=zeros)
