"""bitmask_linear in plain torch: the definition, not a fast path."""

import torch
from torch import Tensor

from llmkern.ops._linear import expand_groups, product


def unpack_bits(bits: Tensor, k: int) -> Tensor:
    """uint8 [N, ceil(K/8)] -> bool [N, K], least significant bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :k].bool()


def dequantize(
    values: Tensor, bits: Tensor, scales: Tensor | None, group_size: int, k: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Dense [N, K]: the kept values in row-major order where a bit is set, zeros elsewhere, times group scales."""
    keep = unpack_bits(bits, k)
    dense = torch.zeros(keep.shape, dtype=dtype, device=values.device)
    dense[keep] = values.to(dtype)
    return dense if scales is None else dense * expand_groups(scales.to(dtype), group_size, k)


def reference(
    x: Tensor, values: Tensor, bits: Tensor, row_offsets: Tensor, scales: Tensor | None, bias: Tensor | None,
    group_size: int,
) -> Tensor:  # fmt: skip
    """y[..., n] = sum_k x[..., k] * w[n, k] + bias[n] where w keeps only the columns whose bit is set."""
    return product(x, dequantize(values, bits, scales, group_size, x.shape[-1]), bias)
