"""sparse24_linear in plain torch: the definition, not a fast path."""

import torch
from torch import Tensor

from llmkern.ops._linear import expand_groups, product


def unpack_positions(positions: Tensor, n_quads: int) -> Tensor:
    """uint8 [N, ceil(Q/2)] -> int64 [N, Q, 2]: where in its four columns each kept value stands.

    A nibble per quad of four columns, low nibble first; in it the first position in bits 0-1, the second in 2-3.
    """
    nibbles = torch.stack([positions & 15, positions >> 4], dim=-1).flatten(1)[:, :n_quads]
    return torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()


def scatter(kept: Tensor, positions: Tensor, k: int) -> Tensor:
    """Kept values [N, 2Q] and their positions -> dense [N, K] with zeros elsewhere."""
    n, n_quads = kept.shape[0], kept.shape[1] // 2
    dense = kept.new_zeros((n, n_quads, 4))
    dense.scatter_(2, unpack_positions(positions, n_quads), kept.view(n, n_quads, 2))
    return dense.flatten(1)[:, :k]


def dequantize(
    values: Tensor, positions: Tensor, scales: Tensor | None, group_size: int, k: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Dense [N, K]; int8 values are multiplied by their group's scale, groups running over the dense columns."""
    dense = scatter(values.to(dtype), positions, k)
    return dense if scales is None else dense * expand_groups(scales.to(dtype), group_size, k)


def reference(
    x: Tensor, values: Tensor, positions: Tensor, scales: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """y[..., n] = sum_k x[..., k] * w[n, k] + bias[n] where w keeps two of every four columns."""
    return product(x, dequantize(values, positions, scales, group_size, x.shape[-1]), bias)
