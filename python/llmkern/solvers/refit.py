"""Least-squares refit of the kept weights on a fixed mask."""

from __future__ import annotations

from collections.abc import Callable

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
    return torch.cat(
        [_refit(w[at], start[at], mask[at], damped, coupled, steps) for at, coupled in parts_of_rows(w, output)]
    )


def parts_of_rows(w: Tensor, output: OutputHessian | None) -> list[tuple[slice, Tensor | None]]:
    """The rows of w [N, K] that are solved for together, and what couples them, damped (None: nothing does)."""
    if output is not None:
        return [(at, output.damped(part)) for part, at in enumerate(output.places)]
    step = ROWS if on_host(w) else max(len(w), 1)
    return [(slice(start, start + step), None) for start in range(0, len(w), step)]


def _refit(w: Tensor, start: Tensor, mask: Tensor, damped: Tensor, coupled: Tensor | None, steps: int) -> Tensor:
    kept = mask.to(w.dtype)
    inverse = kept / damped.diagonal()
    if coupled is not None:
        inverse /= coupled.diagonal().unsqueeze(1)

    def image_of(x: Tensor) -> Tensor:
        image = product(x, damped)
        return (image if coupled is None else product(coupled, image)).mul_(kept)

    x = start * kept
    return conjugate_gradients(x, image_of(w - x), inverse, image_of, steps, together=coupled is not None)


def conjugate_gradients(
    x: Tensor, residual: Tensor, inverse: Tensor, image_of: Callable[[Tensor], Tensor], steps: int, *, together: bool
) -> Tensor:
    """x [N, P], overwritten, after some steps towards a residual of 0: a system per row, or one of all rows together.

    residual: of x, overwritten. inverse: the preconditioner, a diagonal. image_of: the system's matrix times a vector,
    a new tensor.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((0, 1) if together else 1, keepdim=True)

    direction = residual * inverse
    energy = dot(residual, direction)
    # What is left of a residual is rounding then, and a step along it, in the end, 0 divided by 0.
    converged = energy * torch.finfo(x.dtype).eps ** 2
    for _ in range(steps):
        image = image_of(direction)
        curvature = dot(direction, image)
        step = torch.where((curvature > 0) & (energy > converged), energy / curvature, 0.0)
        x.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        scaled = residual * inverse
        fresh = dot(residual, scaled)
        direction = scaled.addcmul_(torch.where(energy > 0, fresh / energy, 0.0), direction)
        energy = fresh
    return x
