"""wanda: prune by |w| times the norm of its input feature (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor

from llmkern.solvers._checks import Pattern, as_hessian, as_matrix
from llmkern.solvers.hessian import Hessian
from llmkern.solvers.magnitude import keep_by_score
from llmkern.solvers.solution import Solution, pack_kept, relative_loss


def wanda(weight: Tensor, hessian: Hessian | Tensor, *, sparsity: float | str = 0.5) -> Solution:
    """Prune weight [N, K] by |w| sqrt(diag H): a fraction of each row, or n of every m columns ("n:m").

    Kept weights stay as they are.
    """
    w = as_matrix("wanda", weight)
    state = as_hessian("wanda", hessian, w)
    score = w.abs() * state.raw().diagonal().sqrt()
    mask = keep_by_score(score, Pattern.parse("wanda", sparsity), per_row=True)
    q = w * mask
    return Solution(q, pack_kept(q, mask, weight.dtype), mask, relative_loss(w, q, state), 0.0, ())
