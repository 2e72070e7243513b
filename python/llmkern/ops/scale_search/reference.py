"""scale_search in plain torch: the definition, not a fast path."""

import torch
from torch import Tensor

from llmkern.ops._linear import groups
from llmkern.ops.gptq_block.reference import quantize


def reference(
    w: Tensor, importance: Tensor, group_size: int, bits: int, symmetric: bool, steps: int, smallest: float
) -> tuple[Tensor, Tensor]:
    """For each row and group, the clip ratio r = 1 - i (1 - smallest) / steps, i = 0..steps-1, of least error.

    error = sum_k importance[k] (w_k - q_k)^2; the first of equals wins. Symmetric: scale = 2 r max|w| / (2^bits - 1),
    zero 0. Asymmetric: scale = r (max - min) / (2^bits - 1) over a range that holds 0, zero = round(-r min / scale) -
    2^(bits-1). A group of zeros has scale 1. Returns scales fp32 [N, G] and zeros int8 [N, G].
    """
    n, k = w.shape
    pad = -k % group_size
    grouped = torch.nn.functional.pad(w, (0, pad)).view(n, groups(k, group_size), group_size)
    weight = torch.nn.functional.pad(importance, (0, pad)).view(-1, group_size)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full_like(high, torch.inf)
    scales, zeros = torch.ones_like(high), torch.zeros_like(high, dtype=torch.int8)
    for i in range(steps):
        ratio = 1 - i * (1 - smallest) / steps
        scale = (high - low) * ratio / (2**bits - 1)
        scale = torch.where(scale > 0, scale, 1.0)
        zero = torch.zeros_like(scale) if symmetric else torch.round(-low * ratio / scale) - 2 ** (bits - 1)
        error = ((grouped - quantize(grouped, scale[..., None], zero[..., None], bits)) ** 2 * weight).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        zeros = torch.where(better, zero.to(torch.int8), zeros)
    return scales, zeros
