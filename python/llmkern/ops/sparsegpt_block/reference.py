"""sparsegpt_block in plain torch: the definition, not a fast path."""

import torch
from torch import Tensor

from llmkern.ops.gptq_block.reference import quantize


def optimal_values(w: Tensor, wc: Tensor, v: Tensor) -> Tensor:
    """What each column of [N, m] would be if all of them were still free, given the columns fixed before.

    `wc` holds the compensation by the fixed columns alone; the columns' own moves follow by forward substitution with
    the unit upper triangular v [m, m].
    """
    moved = wc - w  # minus the difference each column would take
    for k in range(1, w.shape[1]):
        moved[:, k] -= moved[:, :k] @ v[:k, k]
    return w + moved


def reference(
    w: Tensor, wc: Tensor, v: Tensor, diagonal: Tensor, mask: Tensor | None, prune_n: int, prune_m: int,
    scales: Tensor | None, zeros: Tensor | None, groups: Tensor | None, bits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Columns left to right: pruned columns become 0, kept ones stay (or are quantized); differences feed forward.

    Without `mask`, of every `prune_m` columns the `prune_n` of least score (value * diagonal)^2 go; equal scores
    prune the first. Returns q [N, B] and mask [N, B] (True = kept).
    """
    wc, q = wc.clone(), torch.empty_like(w)
    keep = torch.ones_like(w, dtype=torch.bool) if mask is None else mask
    for j in range(w.shape[1]):
        if mask is None and j % prune_m == 0:
            at = slice(j, j + prune_m)
            score = (optimal_values(w[:, at], wc[:, at], v[at, at]) * diagonal[at]) ** 2
            keep[:, at].scatter_(1, score.argsort(dim=1, stable=True)[:, :prune_n], False)
        value = wc[:, j]
        if bits and groups is not None and scales is not None:
            g = int(groups[j])
            value = quantize(value, scales[:, g], None if zeros is None else zeros[:, g], bits)
        q[:, j] = torch.where(keep[:, j], value, 0.0)
        wc[:, j + 1 :] += (w[:, j] - q[:, j]).unsqueeze(1) * v[j, j + 1 :]
    return q, keep if mask is None else mask.clone()
