"""sparsegpt: prune a layer column by column with error feedback (Frantar and Alistarh, arXiv 2301.00774)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmkern.formats import _base
from llmkern.solvers._checks import (
    Pattern,
    as_hessian,
    as_matrix,
    check_bits,
    check_choice,
    check_damp,
    count_or,
    live,
)
from llmkern.solvers.admm import admm_mask
from llmkern.solvers.columns import gptq_columns, sparsegpt_columns
from llmkern.solvers.coupled import coupled_columns
from llmkern.solvers.grid import CLIPS, Grid, find_grid
from llmkern.solvers.hessian import Hessian
from llmkern.solvers.output import OutputHessian, check_output
from llmkern.solvers.polish import DESCENT, SCALE_STEPS, polish
from llmkern.solvers.refit import refit as refit_kept
from llmkern.solvers.solution import Solution, pack_kept, pack_quantized, relative_loss

# Conjugate gradients from SparseGPT's own weights then have 96 to 99.8 % of what exact least squares gains over them
# (measured on SmolLM2's layers; 10 steps have 90 to 99 %).
REFIT_STEPS = 15
COUPLED_STEPS = 25  # one system of all rows takes more of them


def sparsegpt(
    weight: Tensor, hessian: Hessian | Tensor, *, sparsity: float | str = 0.5, bits: int | None = None,
    group_size: int | None = 128, refit: bool = True, damp: float = 0.01, clip: str | None = "hessian",
    descent: int | None = None, scale_dtype: torch.dtype = torch.float32, mask: str | None = None,
    output: OutputHessian | None = None, scale_refit: int | None = None, loss: bool = True,
) -> Solution:  # fmt: skip
    """Prune weight [N, K] so that the layer's output on its calibration input changes least; with bits, quantize too.

    sparsity: the fraction of weights to prune, or "n:m" to prune n of every m columns (a short last group keeps no
    more than a whole one). refit: solve the kept weights again by least squares once the mask is known. With `bits`
    (2 to 8, symmetric): codes by GPTQ on the fixed mask from the refit weights, in activation order, then `scale_refit`
    and `descent` as in `gptq` (None is 2 for the latter); without refit the published single pass, which prunes and
    quantizes together and leaves both unused. mask: how it is chosen, "sparsegpt" (the paper's way, block after block)
    or "admm" (all weights together, see `llmkern.solvers.admm`; needs refit); None is "admm" where it can be. output:
    as in `gptq`; it needs refit. group_size, clip, damp, scale_dtype, loss and errors as in `gptq`.
    """
    w = as_matrix("sparsegpt", weight)
    pattern = Pattern.parse("sparsegpt", sparsity)
    if bits is not None:
        check_bits("sparsegpt", bits)
        group_size = _base.resolve_group_size("sparsegpt", group_size, w.shape[1])
    check_choice("sparsegpt", "clip", clip, CLIPS)
    check_damp("sparsegpt", damp)
    descent = count_or("sparsegpt", "descent", descent, DESCENT)
    scale_refit = count_or("sparsegpt", "scale_refit", scale_refit, 0 if output is None else SCALE_STEPS)
    if output is not None and not refit:
        raise ValueError("sparsegpt: output needs refit=True, got refit=False")
    check_output("sparsegpt", output, w)
    by_admm = _by_admm(mask, refit)
    state = as_hessian("sparsegpt", hessian, w)
    factor = state.factor(None, damp)
    found = factor.notes
    target = live(w, state)
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": True, "clip": clip}
    options |= {"scale_dtype": scale_dtype}
    grid: Grid | None = None
    if bits is not None and not refit:
        grid = find_grid(target, factor.costs(), **options)
    if by_admm:
        q, kept, lost = target, admm_mask(target, state, factor.damp, pattern, output), math.nan
    else:
        q, kept, lost = sparsegpt_columns(target, factor, pattern, grid)
    if refit:
        lost = math.nan
        damped = state.damped(factor.damp)
        q = refit_kept(target, q, kept, damped, REFIT_STEPS if output is None else COUPLED_STEPS, output)
        if bits is not None:
            again = state.factor("activation", damp)
            grid = find_grid(q, again.costs(), **options)
            found = (*found, *(note for note in again.notes if note not in found))
            if output is None:
                q, _ = gptq_columns(q, again, grid, kept, rough=True)
            else:
                q = coupled_columns(q, again, grid, kept, output)
            q, grid = polish(target, q, grid, damped, kept, scale_refit, descent, output)
    if grid is not None:
        packed, notes = pack_quantized(q, grid, kept)
    else:
        if weight.dtype != torch.float32:
            q, lost = q.to(weight.dtype).float(), math.nan
        packed, notes = pack_kept(q, kept, weight.dtype), ()
    relative = relative_loss(w, q, state, lost) if loss else math.nan
    return Solution(q, packed, kept, relative, factor.damp, (*found, *notes))


def _by_admm(mask: str | None, refit: bool) -> bool:
    """Whether the mask comes from ADMM; ValueError if it cannot."""
    check_choice("sparsegpt", "mask", mask, ("admm", "sparsegpt", None))
    if mask == "admm" and not refit:
        raise ValueError('sparsegpt: mask="admm" needs refit=True, got refit=False')
    return refit and mask != "sparsegpt"
