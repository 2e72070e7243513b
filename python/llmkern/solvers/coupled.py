"""The column loop and coordinate descent for rows that are coupled by an `OutputHessian`.

With O = U Uᵀ, U upper triangular, and U' = U / diag(U) by columns, the row to round is
w_i + Σ_{i'<i} (w_i' - q_i') U'_i'i, and inside it GPTQ's columns: the feedback of `solvers.columns` along both sides.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from llmkern import ops
from llmkern._dense import product, side_by_side
from llmkern.solvers.columns import blocks
from llmkern.solvers.descent import Descent
from llmkern.solvers.grid import Grid
from llmkern.solvers.hessian import Factor
from llmkern.solvers.output import OutputHessian

# Rows that one kernel call rounds, without feedback between them: a vector of fp32.
ROWS = 16


def coupled_columns(w: Tensor, factor: Factor, grid: Grid, mask: Tensor | None, output: OutputHessian) -> Tensor:
    """GPTQ over all columns of w [N, K], in the factor's order, with feedback between rows as well; natural order."""

    def solve(index: int, at: slice) -> Tensor:
        kept = None if mask is None else mask[at]
        return _coupled_part(w[at], factor, grid.rows(at), kept, output.factor(index))

    return torch.cat(side_by_side(w, [partial(solve, *part) for part in enumerate(output.places)]))


def _coupled_part(w: Tensor, factor: Factor, grid: Grid, mask: Tensor | None, output: Factor) -> Tensor:
    """The same for rows that are coupled.

    Columns go outside, rows inside: each step is then a product with what is left of one matrix or the other.
    """
    n, k = w.shape
    order, rank = output.order, factor.order
    assert order is not None  # it was asked for
    w, grid = w[order], grid.rows(order)
    mask = None if mask is None else mask[order]
    if rank is not None:
        w = w.index_select(1, rank)
        mask = None if mask is None else mask.index_select(1, rank)
    groups = grid.groups(rank, k)
    steps = [(rows, grid.rows(rows)) for rows in blocks(n, ROWS)]
    q, error = torch.empty_like(w), torch.empty_like(w)
    for at in blocks(k):
        before, unit = w[:, at].contiguous(), factor.unit[at, at].contiguous()
        carried = product(error[:, : at.start], factor.unit[: at.start, at]) if at.start else torch.zeros_like(before)
        moved = torch.empty_like(before)
        for rows, part in steps:
            target = before[rows]
            if rows.start:
                target = torch.addmm(target, output.unit[: rows.start, rows].T, moved[: rows.start])
            kept = None if mask is None else mask[rows, at].contiguous()
            chosen = ops.gptq_block(
                target, target + carried[rows], unit, part.scales, part.zeros, groups[at], kept, grid.bits
            )
            moved[rows] = before[rows] - chosen
            error[rows, at] = target - chosen
            q[rows, at] = chosen
    result = torch.empty_like(w)
    if rank is not None:
        q = q.index_select(1, rank.argsort())
    result[order] = q
    return result


def coupled_descent(
    w: Tensor, q: Tensor, damped: Tensor, grid: Grid, mask: Tensor | None, passes: int, output: OutputHessian | None
) -> Tensor:
    """Coordinate descent over the codes of q [N, K] on tr(O (w - q) damped (w - q)ᵀ), natural order; returns the new q.

    Without `output` O is 1 and rows do not matter to each other. With it ROWS rows at a time go towards what is best
    for each while all others stay as they are. They may all make up for one error then, so a step that does not lower
    the objective is not taken.
    """
    if not passes:
        return q
    if output is None:
        return Descent(damped).run(q, product(w - q, damped), grid, mask, passes)
    descent = Descent(damped, again=True)

    def descended(index: int, at: slice) -> Tensor:
        kept = None if mask is None else mask[at]
        return _descend_part(w[at], q[at], descent, grid.rows(at), kept, passes, output.damped(index))

    return torch.cat(side_by_side(w, [partial(descended, *part) for part in enumerate(output.places)]))


def _descend_part(
    w: Tensor, q: Tensor, descent: Descent, grid: Grid, mask: Tensor | None, passes: int, coupled: Tensor
) -> Tensor:
    """The same for rows that `coupled`, their part of O, couples."""
    q, moved = q.clone(), w - q
    image = product(moved, descent.damped)
    for rows in blocks(len(w), ROWS):
        own = coupled[rows, rows]
        others = product(coupled[rows], moved) - own @ moved[rows]
        # On its own a row would best be off by what undoes `others`: the slope from where it is to there.
        slope = product(coupled[rows], image) / own.diagonal().unsqueeze(1)
        kept = None if mask is None else mask[rows]
        step = descent.run(q[rows], slope, grid.rows(rows), kept, passes)
        after = w[rows] - step
        seen = image[rows] - product(moved[rows] - after, descent.damped)
        if _felt(after, seen, own, others) < _felt(moved[rows], image[rows], own, others):
            q[rows], moved[rows], image[rows] = step, after, seen
    return q


def _felt(difference: Tensor, image: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """What tr(O D H Dᵀ) has of some rows' D, a scalar: `own` is their block of O, `others` is O D of the other rows.

    image: D H.
    """
    return ((own @ difference + 2 * others) * image).sum(dtype=torch.float64)
