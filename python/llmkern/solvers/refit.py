"""Least-squares refit of the kept weights on a fixed mask."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern._dense import on_host, product

ROWS = 512  # solved together on a CPU: enough for the products' speed, few enough that the rest stays in cache


def refit(w: Tensor, start: Tensor, mask: Tensor, damped: Tensor, steps: int) -> Tensor:
    """The weights x [N, K], 0 off the mask, of least (w - x) damped (w - x)ᵀ per row, from `start`.

    Conjugate gradients on many rows at once, preconditioned by the Hessian's diagonal; one GEMM per step.
    """
    rows = ROWS if on_host(w) else max(len(w), 1)
    parts = zip(w.split(rows), start.split(rows), mask.split(rows), strict=True)
    return torch.cat([_refit(*part, damped, steps) for part in parts])


def _refit(w: Tensor, start: Tensor, mask: Tensor, damped: Tensor, steps: int) -> Tensor:
    kept = mask.to(w.dtype)
    inverse = kept / damped.diagonal()
    x = start * kept
    residual = product(w - x, damped).mul_(kept)
    direction = residual * inverse
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        image = product(direction, damped).mul_(kept)
        curvature = (direction * image).sum(1, keepdim=True)
        # A row that has converged (or keeps nothing) has zero energy and no more steps to take.
        step = torch.where(curvature > 0, energy / curvature, 0.0)
        x.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        scaled = residual * inverse
        fresh = (residual * scaled).sum(1, keepdim=True)
        direction = scaled.addcmul_(torch.where(energy > 0, fresh / energy, 0.0), direction)
        energy = fresh
    return x
