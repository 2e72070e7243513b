"""int4_linear in plain torch: the definition, not a fast path."""

import torch
from torch import Tensor

from llmkern.ops._linear import expand_groups, product
from llmkern.ops.int8_dynamic_linear.reference import integer_product


def unpack_words(words: Tensor, k: int) -> Tensor:
    """int32 words [N, ceil(K/8)] -> signed codes int8 [N, K]; code u = q + 8, least significant nibble first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    nibbles = (words.unsqueeze(-1) >> shifts) & 15
    return (nibbles.flatten(1)[:, :k] - 8).to(torch.int8)


def centred_codes(words: Tensor, zeros: Tensor | None, group_size: int, k: int) -> Tensor:
    """[N, K] fp32 integers: q - zero."""
    codes = unpack_words(words, k).float()
    return codes if zeros is None else codes - expand_groups(zeros.float(), group_size, k)


def dequantize(
    words: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, k: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[N, K]: w[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]."""
    codes = centred_codes(words, zeros, group_size, k).to(dtype)
    return codes * expand_groups(scales.to(dtype), group_size, k)


def reference(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int,
    activations: str | None = None,
) -> Tensor:  # fmt: skip
    """y[..., n] = sum_k x[..., k] * w[n, k] + bias[n]; with activations="int8", x is quantized per row and group."""
    k = x.shape[-1]
    if activations == "int8":
        return integer_product(x, centred_codes(words, zeros, group_size, k), scales, bias, group_size, group_size)
    return product(x, dequantize(words, scales, zeros, group_size, k), bias)
