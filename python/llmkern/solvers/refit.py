"""Least-squares refit of the kept weights on a fixed mask."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern._dense import on_host, product
from llmkern.solvers.output import OutputHessian

ROWS = 512  # solved together on a CPU: enough for the products' speed, few enough that the rest stays in cache


def refit(
    w: Tensor, start: Tensor, mask: Tensor, damped: Tensor, steps: int, output: OutputHessian | None = None
) -> Tensor:
    """The weights x [N, K], 0 off the mask, of least tr(O (w - x) damped (w - x)ᵀ), O = `output` or 1, from `start`.

    Conjugate gradients, preconditioned by the diagonals: a system per row, many rows at once, with one GEMM per step;
    or a system per block of coupled rows, with two.
    """
    if output is None:
        rows = ROWS if on_host(w) else max(len(w), 1)
        parts = zip(w.split(rows), start.split(rows), mask.split(rows), strict=True)
        return torch.cat([_refit(*part, damped, None, steps) for part in parts])
    return torch.cat([
        _refit(w[at], start[at], mask[at], damped, output.damped(part), steps) for part, at in enumerate(output.places)
    ])  # fmt: skip


def _refit(w: Tensor, start: Tensor, mask: Tensor, damped: Tensor, coupled: Tensor | None, steps: int) -> Tensor:
    kept = mask.to(w.dtype)
    inverse = kept / damped.diagonal()
    if coupled is not None:
        inverse /= coupled.diagonal().unsqueeze(1)

    def image_of(x: Tensor) -> Tensor:
        image = product(x, damped)
        return (image if coupled is None else product(coupled, image)).mul_(kept)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1 if coupled is None else (0, 1), keepdim=True)

    x = start * kept
    residual = image_of(w - x)
    direction = residual * inverse
    energy = dot(residual, direction)
    for _ in range(steps):
        image = image_of(direction)
        curvature = dot(direction, image)
        # A system that has converged (or keeps nothing) has zero energy and no more steps to take.
        step = torch.where(curvature > 0, energy / curvature, 0.0)
        x.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        scaled = residual * inverse
        fresh = dot(residual, scaled)
        direction = scaled.addcmul_(torch.where(energy > 0, fresh / energy, 0.0), direction)
        energy = fresh
    return x
