"""What a layer can make up for of the errors before it: its inputs are no longer those of the dense model.

The dense model hands the layer x' where the compressed one hands it x. What the layer should give is still W x', so
its weight on x should be the least-squares one of both: the W* that minimises Σ |W x' - W* x|², which is

    W* = W + W C (H + λ)⁻¹,   C = Σ (x' - x) xᵀ,   H = Σ x xᵀ

and |W x' - Q x|² is then |(W* - Q) x|² but for what no Q can change, so solvers take W* for the weight. The objective
is GPTAQ's (Li et al., arXiv 2504.02692), which corrects column by column; the closed form, and a strength against
fitting what the calibration alone has, are QEP's (Arai and Ichikawa, arXiv 2504.09629). The ridge λ that grows with the
features per token is ours: C has the noise of so many tokens, which H⁻¹ makes large where H is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import _large
from llmkern._dense import product
from llmkern.solvers.hessian import Hessian

# Of a product of `add`: what it adds is made anew, and added, at a time. Copies of all tokens would be a large part of
# what a calibration takes.
COLUMNS, TOKENS = 1024, 1024
RIDGE = 2.0  # λ over the mean of diag(H), times tokens per feature


class InputShift:
    """Σ (x' - x) xᵀ over tokens, fp32 [K, K]; rows are features of x' - x, columns those of x."""

    def __init__(self, k: int, device: torch.device | str | None = None) -> None:
        self.k = k
        self.tokens = 0
        self.sum = _large.zeros(k, device)

    def add(self, dense: Tensor, x: Tensor, weight: Tensor | None = None, *, rough: bool = False) -> None:
        """Add tokens: x [T, K] of the compressed model, and the same of the dense one, any float dtype.

        weight: fp32 [T, 1], how often each token counts; None is once. rough: three digits of what TOKENS tokens add
        will do (other tokens would move an entry ten times as much), so a CPU may multiply in bf16 where that is
        faster. A NaN or infinity is found by `corrected`: on a GPU looking at values would wait for it.
        """
        for start in range(0, len(x), TOKENS):
            rows = slice(start, start + TOKENS)
            part = x[rows].float()
            moved = dense[rows].float() - part
            if weight is not None:
                moved *= weight[rows]
            moved = moved.T.contiguous()
            for column in range(0, self.k, COLUMNS):
                columns = slice(column, column + COLUMNS)
                self.sum[columns] += product(moved[columns], part, rough=rough)
        self.tokens += len(x)


def corrected(weight: Tensor, hessian: Hessian, shift: InputShift, strength: float = 1.0, damp: float = 0.01) -> Tensor:
    """W* of weight [N, K], fp32, with the Hessian of the same tokens; a new tensor.

    strength: of the correction, 0 (none) to 1 (all of it). damp: the least λ, relative to the mean of diag(H).
    ValueError for another K, other tokens, or inputs that were not finite.
    """
    w = weight.float()
    if w.shape[1] != shift.k or hessian.k != shift.k:
        got = f"weight is [N, K]={list(w.shape)}, the Hessian of K={hessian.k}, the shift of K={shift.k}"
        raise ValueError(f"corrected: {got}")
    if hessian.tokens != shift.tokens:
        raise ValueError(f"corrected: the Hessian has {hessian.tokens} tokens, the shift {shift.tokens}")
    if not torch.isfinite(shift.sum).all():
        raise ValueError("corrected: the dense model's input has non-finite values, or differs by infinity")
    factor = hessian.factor(None, max(damp, RIDGE * shift.k / shift.tokens))
    # H + λ = U D Uᵀ with U unit upper triangular and D the squared diagonal.
    right = {"left": False, "unitriangular": True}
    change = torch.linalg.solve_triangular(factor.unit.T, product(w, shift.sum), upper=False, **right)
    change /= factor.diagonal.square()
    change = torch.linalg.solve_triangular(factor.unit, change, upper=True, **right)
    return w + strength * change
