"""What follows the column loop of a quantized layer: better scales for its codes, better codes for its scales."""

from __future__ import annotations

from torch import Tensor

from llmkern.solvers.coupled import coupled_descent
from llmkern.solvers.grid import Grid
from llmkern.solvers.output import OutputHessian
from llmkern.solvers.scales import refit_scales

# Passes over the codes, and steps of conjugate gradients over the scales, where rows are coupled. On a real model 10 or
# 20 steps gave the same perplexity as 5 up to its noise (0.6 %), none before the passes 1 % more.
DESCENT, SCALE_STEPS = 2, 5


def polish(
    w: Tensor, q: Tensor, grid: Grid, damped: Tensor, mask: Tensor | None, scale_refit: int, descent: int,
    output: OutputHessian | None,
) -> tuple[Tensor, Grid]:  # fmt: skip
    """q [N, K] and its grid once neither costs more of tr(O (w - q) damped (w - q)ᵀ), natural order.

    scale_refit: steps of conjugate gradients over the scales, before and after `descent`, passes over the codes.
    """
    q, grid = refit_scales(w, q, grid, damped, scale_refit, output)
    if not descent:
        return q, grid
    q = coupled_descent(w, q, damped, grid, mask, descent, output)
    return refit_scales(w, q, grid, damped, scale_refit, output)
