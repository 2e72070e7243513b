"""magnitude: prune the weights of least absolute value, no calibration needed."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.solvers._checks import Pattern, as_hessian, as_matrix
from llmkern.solvers.columns import keep_all_but
from llmkern.solvers.hessian import Hessian
from llmkern.solvers.rtn import loss_without_factor
from llmkern.solvers.solution import Solution, pack_kept


def magnitude(weight: Tensor, hessian: Hessian | Tensor | None = None, *, sparsity: float | str = 0.5) -> Solution:
    """Prune weight [N, K] by |w|: a fraction of all its weights together, or n of every m columns ("n:m").

    Kept weights stay as they are. The Hessian is only used for `loss`; without it the loss is that of H = I.
    """
    w = as_matrix("magnitude", weight)
    state = None if hessian is None else as_hessian("magnitude", hessian, w)
    mask = keep_by_score(w.abs(), Pattern.parse("magnitude", sparsity))
    q = w * mask
    loss, notes = loss_without_factor(w, q, state)
    return Solution(q, pack_kept(q, mask, weight.dtype), mask, loss, 0.0, notes)


def keep_by_score(score: Tensor, pattern: Pattern, *, per_row: bool = False) -> Tensor:
    """bool like score [N, K]: all but those of least score, over the whole matrix, per row, or per group of n:m.

    Of equal scores the first go. A short last group of n:m keeps no more than a whole one.
    """
    n, k = score.shape
    if pattern.m:
        whole = k - k % pattern.m
        keep = score.new_ones(score.shape, dtype=torch.bool)
        grouped = score[:, :whole].reshape(n, -1, pattern.m)
        least = grouped.argsort(dim=-1, stable=True)[..., : pattern.n]
        keep[:, :whole] = grouped.new_ones(grouped.shape, dtype=torch.bool).scatter_(-1, least, False).view(n, whole)
        least = score[:, whole:].argsort(dim=-1, stable=True)[:, : pattern.of_tail(k - whole)]
        keep[:, whole:].scatter_(-1, least, False)
        return keep
    if not per_row:
        return keep_all_but(score, round(pattern.fraction * score.numel()))
    least = score.argsort(dim=-1, stable=True)[:, : round(pattern.fraction * k)]
    return score.new_ones(score.shape, dtype=torch.bool).scatter_(-1, least, False)
