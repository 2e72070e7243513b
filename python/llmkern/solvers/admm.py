"""n:m masks by ADMM (ALPS: Meng et al., arXiv 2406.07831), in the space where every feature has unit energy."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.solvers._checks import Pattern
from llmkern.solvers.hessian import Hessian

# Chosen on held-out tokens of SmolLM2's layers: 30 steps of 1.1 are within 1 % of this, 8 steps are 10 % behind.
STEPS = 12
FIRST_PENALTY = 0.1  # of the mean eigenvalue
GROWTH = 1.3


def admm_mask(w: Tensor, hessian: Hessian, damp: float, pattern: Pattern) -> Tensor:
    """bool [N, K], True = kept: the n:m support on which a layer's output can be kept best.

    SparseGPT decides group after group, left to right. Here all groups are decided together: minimize
    (w - x) H (w - x)ᵀ over x and an n:m matrix z with x = z, alternating between a ridge solution for x, the projection
    of x + u onto n:m for z, and the sum u of their differences, while the penalty on x - z grows.
    """
    scale, energies, basis = hessian.spectrum(damp)
    scaled = w * scale
    target = (scaled @ basis).mul_(energies)
    penalty = FIRST_PENALTY * float(energies.mean())
    z, u = _project(scaled, pattern)[0], torch.zeros_like(scaled)
    mask = torch.ones_like(w, dtype=torch.bool)
    for _ in range(STEPS):
        x = ((z - u) @ basis).mul_(penalty).add_(target).div_(energies + penalty) @ basis.T
        z, mask = _project(x + u, pattern)
        u += x - z
        # u is the multiplier over the penalty, so it shrinks as the penalty grows.
        u /= GROWTH
        penalty *= GROWTH
    return mask


def _project(x: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The nearest n:m matrix, and its mask: of every m columns the m - n largest stay."""
    n, k = x.shape
    size = torch.nn.functional.pad(x.abs(), (0, -k % pattern.m), value=-1.0).view(n, -1, pattern.m)
    kept = size.topk(pattern.m - pattern.n, dim=-1).indices
    mask = torch.zeros_like(size, dtype=torch.bool).scatter_(2, kept, True).view(n, -1)[:, :k].contiguous()
    return x * mask, mask
