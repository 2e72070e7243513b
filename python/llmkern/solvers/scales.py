"""Least-squares refit of the scales of a grid once its codes are chosen."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmkern._dense import product, rounded
from llmkern.ops._linear import expand_groups
from llmkern.solvers.grid import Grid
from llmkern.solvers.output import OutputHessian
from llmkern.solvers.refit import conjugate_gradients, parts_of_rows


def refit_scales(
    w: Tensor, q: Tensor, grid: Grid, damped: Tensor, steps: int, output: OutputHessian | None = None
) -> tuple[Tensor, Grid]:
    """The weights on the codes of q [N, K] with the scales of least tr(O (w - q) damped (w - q)ᵀ), and their grid.

    O is `output` or 1; natural order. The objective is a quadratic form of the scales, those of a row or of all coupled
    rows at once: `steps` of conjugate gradients, preconditioned by what each scale alone would do, in rough products (a
    few steps end far from where rounding would stop them). Scales are rounded to the grid's dtype. Rows stay as they
    were where that, in sum, does not lower the objective.
    """
    if not steps:
        return q, grid
    weights, scales = [], []
    for at, coupled in parts_of_rows(w, output):
        part = _Part(w[at], q[at], grid.rows(at), damped, coupled)
        found = part.refit(steps)
        weights.append(part.spread(found))
        scales.append(found)
    return torch.cat(weights), replace(grid, scales=torch.cat(scales))


class _Part:
    """Some rows, w and q [N, K]: what their weights are for given scales [N, G], and what that costs."""

    def __init__(self, w: Tensor, q: Tensor, grid: Grid, damped: Tensor, coupled: Tensor | None) -> None:
        self.w, self.grid, self.damped, self.coupled = w, grid, damped, coupled
        self.size, self.k = grid.group_size, w.shape[1]
        # Zero points are in these already; what is pruned is 0.
        self.codes = (q / expand_groups(grid.scales, self.size, self.k)).round_()

    def refit(self, steps: int) -> Tensor:
        """The better scales, fp32 [N, G]."""
        before, together = self.grid.scales, self.coupled is not None
        error = self.w - self.spread(before)
        image = self._image(error, self.damped, self.coupled)
        cost = self._cost(error, image)
        n, k = self.w.shape
        damped = rounded(self.damped, n * k * k)
        coupled = None if self.coupled is None else rounded(self.coupled, n * n * k)
        found = conjugate_gradients(
            before.clone(), self._gather(image), self._inverse(),
            lambda x: self._gather(self._image(self.spread(x), damped, coupled)), steps, together=together,
        )  # fmt: skip
        found = found.to(self.grid.scale_dtype).float()
        found = torch.where(torch.isfinite(found) & (found > 0), found, before)
        error = self.w - self.spread(found)
        return torch.where(self._cost(error, self._image(error, self.damped, self.coupled)) < cost, found, before)

    def spread(self, scales: Tensor) -> Tensor:
        """[N, K]: the weights of these scales [N, G]."""
        return expand_groups(scales, self.size, self.k).mul_(self.codes)

    def _gather(self, x: Tensor) -> Tensor:
        """[N, G], the transpose of `spread`: what a gradient by weights x [N, K] is by scales."""
        padded = torch.nn.functional.pad(x * self.codes, (0, -self.k % self.size))
        return padded.view(len(x), -1, self.size).sum(2)

    @staticmethod
    def _image(x: Tensor, damped: Tensor, coupled: Tensor | None) -> Tensor:
        image = product(x, damped)
        return image if coupled is None else product(coupled, image)

    def _cost(self, error: Tensor, image: Tensor) -> Tensor:
        """The objective, [N, 1]; [1, 1] of all rows together."""
        rows = (error * image).sum(1, dtype=torch.float64, keepdim=True)
        return rows if self.coupled is None else rows.sum(0, keepdim=True)

    def _inverse(self) -> Tensor:
        """One over the curvature of every scale alone; 0 where all codes are 0."""
        curvature = torch.empty_like(self.grid.scales)
        for group, codes in enumerate(self.codes.split(self.size, 1)):
            at = slice(group * self.size, group * self.size + codes.shape[1])
            curvature[:, group] = (product(codes.contiguous(), self.damped[at, at].contiguous()) * codes).sum(1)
        if self.coupled is not None:
            curvature *= self.coupled.diagonal().unsqueeze(1)
        return torch.where(curvature > 0, 1 / curvature, 0.0)
