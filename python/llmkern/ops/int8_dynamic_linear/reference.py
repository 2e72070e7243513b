"""int8_dynamic_linear in plain torch: the definition, not a fast path."""

import math

import torch
from torch import Tensor

from llmkern.ops._linear import expand_groups, groups


def quantize_rows(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (codes [M, K] fp32 integers in [-127, 127], scales [M, G]), symmetric, per row and group of K.

    scale = absmax / 127 in fp32 (a group of zeros has scale 0 and codes 0); code = round half to even of x * (127 /
    absmax).
    """
    m, k = x.shape
    pad = -k % group_size
    grouped = torch.nn.functional.pad(x.float(), (0, pad)).view(m, groups(k, group_size), group_size)
    absmax = grouped.abs().amax(-1, keepdim=True)
    inverse = torch.where(absmax > 0, torch.full_like(absmax, 127.0) / absmax, absmax)  # 127.0 / t rounds twice
    codes = torch.round(grouped * inverse).clamp(-127, 127)
    return codes.view(m, k + pad)[:, :k], (absmax / 127.0)[..., 0]


def integer_product(
    x: Tensor, weight_codes: Tensor, scales: Tensor, bias: Tensor | None, x_group: int, group_size: int
) -> Tensor:
    """Exact integer dot products per weight group, scaled by x's and the weight's scales, summed in fp32.

    x [..., K] is quantized per row and per `x_group` columns (K, or the weight's group size); weight_codes [N, K] are
    integers with their zero point already subtracted; scales [N, G].
    """
    k, n = x.shape[-1], weight_codes.shape[0]
    rows = x.reshape(math.prod(x.shape[:-1]), k)
    codes, x_scales = quantize_rows(rows, x_group)
    y = rows.new_zeros((rows.shape[0], n), dtype=torch.float32)
    for g in range(scales.shape[1]):
        at = slice(g * group_size, min(k, (g + 1) * group_size))
        dots = codes[:, at].double() @ weight_codes[:, at].double().T
        y += dots.float() * x_scales[:, g * group_size // x_group, None] * scales[:, g].float()
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], n)


def reference(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """int8_linear with each row of x first quantized to int8 by its absmax; int32 accumulation."""
    centred = codes.float()
    if zeros is not None:
        centred = centred - expand_groups(zeros.float(), group_size, codes.shape[1])
    return integer_product(x, centred, scales, bias, max(x.shape[-1], 1), group_size)
