"""gptq_block in plain torch: the definition, not a fast path."""

import torch
from torch import Tensor


def quantize(w: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Nearest value of the grid (c - zero) * scale, c an integer in [-2^(bits-1), 2^(bits-1) - 1]. Ties go to even."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    z = 0 if zero is None else zero.float()
    return (torch.clamp(torch.round(w / scale) + z, low, high) - z) * scale


def reference(
    w: Tensor, wc: Tensor, v: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor, mask: Tensor | None,
    bits: int,
) -> Tensor:  # fmt: skip
    """Columns left to right: quantize the compensated column, feed its difference from the original to those after.

    Returns q [N, B], the chosen values.
    """
    wc, q = wc.clone(), torch.empty_like(w)
    for j in range(w.shape[1]):
        g = int(groups[j])
        value = quantize(wc[:, j], scales[:, g], None if zeros is None else zeros[:, g], bits)
        q[:, j] = value if mask is None else torch.where(mask[:, j], value, 0.0)
        wc[:, j + 1 :] += (w[:, j] - q[:, j]).unsqueeze(1) * v[j, j + 1 :]
    return q
