"""Least-squares refit of the kept weights on a fixed mask."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern._dense import on_host, product
from llmkern.solvers.output import OutputHessian

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


def coupled_refit(w: Tensor, start: Tensor, mask: Tensor, damped: Tensor, output: OutputHessian, steps: int) -> Tensor:
    """As `refit`, with the rows coupled: the x of least tr(O (w - x) damped (w - x)ᵀ), O = `output`."""
    parts = []
    for index, at in enumerate(output.places):
        parts.append(_coupled_refit(w[at], start[at], mask[at], damped, output.damped(index), steps))
    return torch.cat(parts)


def _coupled_refit(w: Tensor, start: Tensor, mask: Tensor, damped: Tensor, output: Tensor, steps: int) -> Tensor:
    """Conjugate gradients on all rows as one system; two GEMMs per step."""
    kept = mask.to(w.dtype)
    inverse = kept / damped.diagonal() / output.diagonal().unsqueeze(1)
    x = start * kept
    residual = product(output, product(w - x, damped)).mul_(kept)
    direction = residual * inverse
    energy = _dot(residual, direction)
    for _ in range(steps):
        image = product(output, product(direction, damped)).mul_(kept)
        curvature = _dot(direction, image)
        step = torch.where(curvature > 0, energy / curvature, 0.0)
        x.add_(direction * step)
        residual.sub_(image * step)
        scaled = residual * inverse
        fresh = _dot(residual, scaled)
        direction = scaled.add_(direction * torch.where(energy > 0, fresh / energy, 0.0))
        energy = fresh
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))
