"""Least-squares restoration: what remains of a layer makes up for what was removed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmkern._dense import full_fp32, product
from llmkern.solvers import Hessian


class Restored(NamedTuple):
    """A layer's correction: weight fp32 [N, K] and bias fp32 [N] (None without one) to add.

    before, after: the squared error on the data it was fitted to, relative to the squared norm of what is wanted.
    """

    weight: Tensor
    bias: Tensor | None
    before: float
    after: float
    notes: tuple[str, ...]


class Fit:
    """The correction D of least Σ ‖e - D x‖² + λ ‖D‖² over tokens: x is what the layer still reads, e what it lacks.

    With e = W_R x_R, the removed part, D is W_R H_RK (H_KK + λ)⁻¹, and W_K + D the (W H)_K H_KK⁻¹ of least squares but
    for the damping, which draws to the weights as they were and not to 0.
    """

    def __init__(self, n: int, k: int, device: torch.device, bias: bool) -> None:
        """bias: whether a constant is fitted too."""
        self.hessian = Hessian(k, device)
        self.cross = torch.zeros(n, k, device=device)
        self.bias = bias
        self.x_sum = torch.zeros(k, dtype=torch.float64, device=device)
        self.e_sum = torch.zeros(n, dtype=torch.float64, device=device)
        self.missing = self.wanted = 0.0

    def add(self, x: Tensor, e: Tensor, wanted: Tensor) -> None:
        """Tokens x [T, K] and e [T, N], and wanted [T, N], what the whole layer gives. ValueError if not finite."""
        x, e = x.float(), e.float()
        self.hessian.add(x)
        self.cross += product(e.T.contiguous(), x)
        self.x_sum += x.sum(0, dtype=torch.float64)
        self.e_sum += e.sum(0, dtype=torch.float64)
        self.missing += float(e.square().sum(dtype=torch.float64))
        self.wanted += float(wanted.float().square().sum(dtype=torch.float64))

    def solve(self, damp: float) -> Restored:
        """λ = damp * mean(diag H). ValueError where H is not positive definite even with more."""
        hessian, cross, missing = self.hessian, self.cross, self.missing
        tokens = hessian.tokens
        x_mean, e_mean = self.x_sum / tokens, self.e_sum / tokens
        if self.bias:
            # A constant takes the means; what is left is a fit of what varies.
            matrix = hessian.matrix().double() - x_mean.outer(x_mean)
            matrix.diagonal().clamp_(min=0)
            hessian = Hessian.from_matrix(matrix, tokens)
            cross = (cross.double() - tokens * e_mean.outer(x_mean)).float()
            missing -= tokens * float(e_mean.square().sum())
        factor = hessian.factor(None, damp)
        upper = factor.unit * factor.diagonal
        with full_fp32():
            half = torch.linalg.solve_triangular(upper.T, cross, upper=False, left=False)
            weight = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
        gained = 2 * (weight * cross).sum(dtype=torch.float64)
        gained -= (product(weight, hessian.raw()) * weight).sum(dtype=torch.float64)
        bias = (e_mean - weight.double() @ x_mean).float() if self.bias else None
        wanted = max(self.wanted, 1e-300)
        after = max(missing - float(gained), 0.0) / wanted
        return Restored(weight, bias, self.missing / wanted, after, factor.notes)
