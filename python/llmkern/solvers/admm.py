"""n:m masks by ADMM (ALPS: Meng et al., arXiv 2406.07831), in the space where every feature has unit energy."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import ops
from llmkern._dense import product
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
    target = product(scaled, basis).mul_(energies)
    penalty = FIRST_PENALTY * float(energies.mean())
    z, u = _project(scaled, pattern)[0], torch.zeros_like(scaled)
    mask = torch.ones_like(w, dtype=torch.bool)
    for _ in range(STEPS):
        x = product(z - u, basis).mul_(penalty).add_(target).div_(energies + penalty)
        x = product(x, basis.T)
        z, mask = _project(x + u, pattern)
        u += x - z
        # u is the multiplier over the penalty, so it shrinks as the penalty grows.
        u /= GROWTH
        penalty *= GROWTH
    return mask


def _project(x: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The nearest n:m matrix, and its mask: of every m columns the m - n largest stay (a short last group: `of_tail`).

    Groups as rows of m columns, with nothing to feed back: SparseGPT's column block of those.
    """
    k = x.shape[1]
    whole = k - k % pattern.m
    z, mask = _project_groups(x[:, :whole], pattern.n, pattern.m)
    if whole < k:
        tail, kept = _project_groups(x[:, whole:], pattern.of_tail(k - whole), k - whole)
        z, mask = torch.cat([z, tail], 1), torch.cat([mask, kept], 1)
    return z, mask


def _project_groups(x: Tensor, prune: int, width: int) -> tuple[Tensor, Tensor]:
    """x [N, a multiple of width] without its `prune` least values in every `width` columns, and the mask."""
    rows = x.reshape(-1, width).contiguous()
    unit = torch.eye(width, device=x.device)
    z, mask = ops.sparsegpt_block(
        rows, rows, unit, unit.diagonal().contiguous(), None, prune, width, None, None, None, 0
    )
    return z.view(x.shape), mask.view(x.shape)
