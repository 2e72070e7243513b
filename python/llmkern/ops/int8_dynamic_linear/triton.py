"""int8_dynamic_linear in Triton: x becomes int8 in one kernel, then int8 tensor cores; see `_triton_linear`.

absmax[m]  = max_k |x[m, k]|          scale = absmax / 127
code[m, k] = round half to even of x[m, k] * (127 / absmax)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.ops._linear import groups
from llmkern.ops._tiles import power_of_two
from llmkern.ops._triton_linear import linear
from llmkern.ops.gptq_block.triton import nearest
from llmkern.ops.int8_linear.triton import load

TILE = 1024  # elements of x that a program holds


@triton.jit
def quantize(x, codes, scales, k, group_size, n_groups, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Some groups of a row of x [M, K], WIDTH columns of each at a time: codes [M, K] and scales [M, G].

    Where the reference's codes are NaN (NaN or infinity in a group, or an absmax too small to divide by) they are 0
    here, and the scale is NaN.
    """
    parts = tl.cdiv(n_groups, GROUPS)
    m = (tl.program_id(0) // parts).to(tl.int64)
    group = tl.program_id(0) % parts * GROUPS + tl.arange(0, GROUPS)
    inside = tl.arange(0, WIDTH)
    begin = group * group_size
    end = tl.minimum(begin + group_size, k)
    largest = tl.zeros([GROUPS, WIDTH], tl.float32)
    for chunk in range(0, group_size, WIDTH):
        column = begin[:, None] + chunk + inside[None, :]
        value = tl.load(x + m * k + column, mask=column < end[:, None], other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    absmax = tl.max(largest, axis=1)
    inverse = tl.where(absmax > 0, tl.div_rn(127.0, tl.where(absmax > 0, absmax, 1.0)), 0.0)
    invalid = tl.zeros([GROUPS, WIDTH], tl.int32)
    for chunk in range(0, group_size, WIDTH):
        column = begin[:, None] + chunk + inside[None, :]
        value = tl.load(x + m * k + column, mask=column < end[:, None], other=0).to(tl.float32) * inverse[:, None]
        valid = value == value
        invalid |= (~valid).to(tl.int32)
        # Limited before rounding, with the same result: nothing can fuse the product into the rounding.
        code = nearest(tl.clamp(tl.where(valid, value, 0.0), -127.0, 127.0))
        tl.store(codes + m * k + column, code.to(tl.int8), mask=column < end[:, None])
    scale = tl.where(tl.max(invalid, axis=1) > 0, float("nan"), tl.div_rn(absmax, 127.0))
    tl.store(scales + m * n_groups + group, scale, mask=group < n_groups)


def quantize_rows(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., K] and scales fp32 [M, G] of x [..., K] per row and group; see the op's reference."""
    k = x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    m, n_groups = x.numel() // max(k, 1), groups(k, group_size)
    scales = torch.empty((m, n_groups), dtype=torch.float32, device=x.device)
    if codes.numel():
        width = min(power_of_two(group_size), TILE)
        some = min(TILE // width, power_of_two(n_groups))
        quantize[(m * -(-n_groups // some),)](
            x.contiguous(), codes, scales, k, group_size, n_groups, GROUPS=some, WIDTH=width, num_warps=4
        )
    return codes, scales


def run(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int) -> Tensor:
    """The op; see `reference`."""
    n, k = codes.shape
    x_codes, x_scales = quantize_rows(x, max(k, 1))
    return linear(
        x_codes, load, codes, n, bias, group_size, stride=k, scales=scales, zeros=zeros, operand=torch.int8,
        dtype=x.dtype, x_scales=x_scales,
    )  # fmt: skip
