"""sparse24_int4_linear in plain torch: the definition, not a fast path."""

import torch
from torch import Tensor

from llmkern.ops._linear import expand_groups, product
from llmkern.ops.int4_linear.reference import unpack_words
from llmkern.ops.sparse24_linear.reference import scatter


def dequantize(
    words: Tensor, positions: Tensor, scales: Tensor, group_size: int, k: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Dense [N, K]: the kept int4 codes times the scale of their group of dense columns, zeros elsewhere."""
    codes = unpack_words(words, 2 * -(-k // 4)).to(dtype)
    return scatter(codes, positions, k) * expand_groups(scales.to(dtype), group_size, k)


def reference(
    x: Tensor, words: Tensor, positions: Tensor, scales: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """y[..., n] = sum_k x[..., k] * w[n, k] + bias[n] where w keeps two int4 codes of every four columns."""
    return product(x, dequantize(words, positions, scales, group_size, x.shape[-1]), bias)
