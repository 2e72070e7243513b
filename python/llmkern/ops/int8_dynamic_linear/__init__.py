"""int8_dynamic_linear: int8_linear with x quantized per token to int8 on the fly; int32 accumulation (W8A8)."""

from __future__ import annotations

from torch import Tensor

from llmkern.ops import _triton
from llmkern.ops._linear import linear_op
from llmkern.ops.int8_dynamic_linear.reference import reference
from llmkern.ops.int8_linear import check_int8, native
from llmkern.ops.int8_linear.reference import dequantize

# 127 * 255 * K must stay below 2^31 when a zero point widens the weight's range.
MAX_K = 2**31 // (127 * 255)


def check(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int) -> int:
    """Raise on bad arguments; return N."""
    if x.ndim and x.shape[-1] > MAX_K:
        raise ValueError(f"int8_dynamic_linear: K={x.shape[-1]} could overflow int32 sums; the limit is {MAX_K}")
    return check_int8("int8_dynamic_linear", x, codes, scales, zeros, bias, group_size)


OP = linear_op(
    "int8_dynamic_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int group_size) -> Tensor",
    check=check,
    dequantize=lambda x, codes, scales, zeros, bias, group_size: dequantize(codes, scales, zeros, group_size),
)
OP.native(native)
_triton.add_row(OP)
OP.kernel("reference", "any")(reference)
