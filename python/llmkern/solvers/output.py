"""OutputHessian: which errors of a layer's outputs the model's loss feels, and the column loop that goes by it.

A layer's own squared error, tr(D H Dᵀ) with D = W - Q, takes all outputs for equally important and independent. The
loss of the whole model is, to second order and with Kronecker factors (K-FAC: Martens and Grosse, arXiv 1503.05671;
for rounding: YAQA, Tseng et al., arXiv 2505.22988), tr(O D H Dᵀ) with O = E[g gᵀ], g the gradient by the outputs. Rows
then are coupled as columns are, so the same feedback works along both sides: with O = U Uᵀ, U upper triangular, and
U' = U / diag(U) by columns, the row to round is w_i + Σ_{i'<i} (w_i' - q_i') U'_i'i, and inside it GPTQ's columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import ops
from llmkern._dense import one_thread, product
from llmkern.solvers.columns import blocks, descend
from llmkern.solvers.grid import Grid
from llmkern.solvers.hessian import Factor, Hessian

# Rows that are coupled; more would cost memory, N * PART numbers of every layer at once.
PART = 512
# Of the mean diagonal: gradients of a few thousand tokens, and the assumption of Kronecker factors, are rough. Of 0.1,
# 0.4, 1 and 3 this gave the least perplexity on a real model.
DAMP = 1.0
# Rows that one kernel call rounds, without feedback between them: a vector of fp32.
ROWS = 16


class OutputHessian:
    """Σ g gᵀ over tokens, fp32, for gradients g of N outputs; blocks of PART outputs, nothing between them."""

    def __init__(self, n: int, device: torch.device | str | None = None) -> None:
        self.n = n
        self.places = blocks(n, PART)
        self.parts = [Hessian(at.stop - at.start, device) for at in self.places]

    @property
    def tokens(self) -> int:
        """How many tokens were added."""
        return self.parts[0].tokens

    def to(self, device: torch.device) -> OutputHessian:
        """The same sums on another device; itself where they are there."""
        if device == self.parts[0].device:
            return self
        moved = OutputHessian(self.n, "meta")
        moved.parts = [Hessian.from_partial(part.partial().to(device), part.tokens) for part in self.parts]
        return moved

    def add(self, gradient: Tensor) -> None:
        """Add the tokens of gradient [..., N], any float dtype. ValueError for a NaN or infinity in it."""
        for at, part in zip(self.places, self.parts, strict=True):
            part.add(gradient[..., at])

    def damped(self, part: int) -> Tensor:
        """[P, P] of one block of outputs, damped."""
        return self.parts[part].damped(DAMP)

    def factor(self, part: int) -> Factor:
        """The Cholesky factor of one block of outputs, damped, in order of falling diagonal."""
        return self.parts[part].factor("activation", DAMP)


def check_output(name: str, output: OutputHessian | None, w: Tensor) -> None:
    """ValueError unless `output` fits w [N, K] and has seen tokens."""
    if output is None:
        return
    if output.n != len(w):
        raise ValueError(f"{name}: weight is [N, K]={list(w.shape)}, but output is of N={output.n}")
    if output.parts[0].device != w.device:
        raise ValueError(f"{name}: weight is on {w.device}, but output is on {output.parts[0].device}")
    if not output.tokens:
        raise ValueError(f"{name}: output has seen zero tokens")


def coupled_columns(w: Tensor, factor: Factor, grid: Grid, mask: Tensor | None, output: OutputHessian) -> Tensor:
    """GPTQ over all columns of w [N, K], in the factor's order, with feedback between rows as well; natural order."""
    parts = []
    for index, at in enumerate(output.places):
        kept = None if mask is None else mask[at]
        rows = output.factor(index)
        with one_thread():
            parts.append(_coupled_part(w[at], factor, grid.rows(at), kept, rows))
    return torch.cat(parts)


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
    q, error = torch.empty_like(w), torch.empty_like(w)
    for at in blocks(k):
        before, unit = w[:, at].contiguous(), factor.unit[at, at].contiguous()
        carried = product(error[:, : at.start], factor.unit[: at.start, at]) if at.start else torch.zeros_like(before)
        moved = torch.empty_like(before)
        for rows in blocks(n, ROWS):
            target = before[rows]
            if rows.start:
                target = torch.addmm(target, output.unit[: rows.start, rows].T, moved[: rows.start])
            kept = None if mask is None else mask[rows, at].contiguous()
            part = grid.rows(rows)
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


def further(
    w: Tensor, q: Tensor, damped: Tensor, grid: Grid, mask: Tensor | None, passes: int, output: OutputHessian | None
) -> Tensor:
    """Coordinate descent over the codes of q [N, K] on tr(O (w - q) damped (w - q)ᵀ), natural order; returns the new q.

    Without `output` O is 1 and rows do not matter to each other. With it ROWS rows at a time go towards what is best
    for each while all others stay as they are. They may all make up for one error then, so a step that does not lower
    the objective is not taken.
    """
    if output is None:
        return descend(w, q, damped, grid, mask, passes)
    q = q.clone()
    for index, at in enumerate(output.places):
        coupled = output.damped(index)
        moved = (w - q)[at]
        with one_thread():
            for rows in blocks(at.stop - at.start, ROWS):
                here = slice(at.start + rows.start, at.start + rows.stop)
                own = coupled[rows, rows]
                others = product(coupled[rows], moved).sub_(own @ moved[rows])
                pull = others + own @ moved[rows] - own.diagonal().unsqueeze(1) * moved[rows]
                kept = None if mask is None else mask[here]
                target = w[here] + pull / own.diagonal().unsqueeze(1)
                step = descend(target, q[here], damped, grid.rows(here), kept, passes)
                after = w[here] - step
                if _felt(after, own, others, damped) < _felt(moved[rows], own, others, damped):
                    q[here], moved[rows] = step, after
    return q


def _felt(difference: Tensor, own: Tensor, others: Tensor, damped: Tensor) -> Tensor:
    """What tr(O D H Dᵀ) has of some rows' D, a scalar: `own` is their block of O, `others` is O D of the other rows."""
    return ((own @ difference + 2 * others) * product(difference, damped)).sum(dtype=torch.float64)
