"""Coordinate descent over the codes of a layer, with the column loop's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import ops
from llmkern._dense import add_product, product
from llmkern._pages import large_empty
from llmkern.solvers.columns import blocks, due
from llmkern.solvers.grid import Grid

# Columns per kernel call for few rows: what the kernel does inside is then faster than small products between calls.
WIDE = 768


class Descent:
    """Coordinate descent on tr((w - q) damped (w - q)ᵀ) over the codes of q, natural order.

    Each column takes the grid value nearest to its optimum with all others fixed, which can only lower the objective:
    the column update of gptq_block, with rows of the Hessian (columns divided by its diagonal) for the feedback.

    damped: [K, K]. again: there will be many calls of few rows, for which taking `damped` apart would cost as much as
    the rest, so its parts (as much memory again) are kept.
    """

    def __init__(self, damped: Tensor, *, again: bool = False) -> None:
        k = len(damped)
        self.damped, self.parts = damped, blocks(k, WIDE) if again else blocks(k)
        self._inverse = 1 / damped.diagonal()
        self._units = [(damped[at, at] * self._inverse[at]).contiguous() for at in self.parts]
        self._dues = [due(self.parts, done) for done in range(1, len(self.parts) + 1)]
        self._kept = [damped[done, come].contiguous() for done, come in self._dues] if again else []

    def run(self, q: Tensor, slope: Tensor, grid: Grid, mask: Tensor | None, passes: int) -> Tensor:
        """The new q [N, K] after some passes over its columns.

        slope: (w - q) damped, minus half the gradient; overwritten.
        """
        groups = grid.groups(None, q.shape[1])
        start = q
        for number in range(1, passes + 1):
            if number > 1:
                slope -= product(q - start, self.damped)
            start, q = q, large_empty(*q.shape, like=q).copy_(q)
            ahead = slope.clone() if number < passes else slope  # with what this pass has done before a block
            for index, at in enumerate(self.parts):
                before = start[:, at].contiguous()
                target = torch.addcmul(before, ahead[:, at], self._inverse[at])
                kept = None if mask is None else mask[:, at].contiguous()
                unit = self._units[index]
                q[:, at] = ops.gptq_block(before, target, unit, grid.scales, grid.zeros, groups[at], kept, grid.bits)
                done, come = self._dues[index]
                if come.start < come.stop:
                    piece = self._kept[index] if self._kept else self.damped[done, come]
                    add_product(ahead[:, come], start[:, done], piece, less=q[:, done])
        return q
