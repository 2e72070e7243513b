"""int8_linear in plain torch: the definition, not a fast path."""

import torch
from torch import Tensor

from llmkern.ops._linear import expand_groups, product


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[N, K]: w[n, k] = (codes[n, k] - zeros[n, k // g]) * scales[n, k // g]."""
    k = codes.shape[1]
    codes = codes.to(dtype)
    if zeros is not None:
        codes = codes - expand_groups(zeros.to(dtype), group_size, k)
    return codes * expand_groups(scales.to(dtype), group_size, k)


def reference(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """y[..., n] = sum_k x[..., k] * w[n, k] + bias[n], accumulated in fp32."""
    return product(x, dequantize(codes, scales, zeros, group_size), bias)
