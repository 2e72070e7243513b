"""gptq: quantize a layer column by column with error feedback (Frantar et al., arXiv 2210.17323)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmkern.formats import _base
from llmkern.solvers._checks import (
    as_hessian,
    as_matrix,
    check_bits,
    check_choice,
    check_damp,
    check_keep_mask,
    count_or,
    live,
)
from llmkern.solvers.columns import gptq_columns
from llmkern.solvers.coupled import coupled_columns
from llmkern.solvers.grid import CLIPS, Grid, find_grid
from llmkern.solvers.hessian import Hessian
from llmkern.solvers.output import OutputHessian, check_output
from llmkern.solvers.polish import DESCENT, SCALE_STEPS, polish
from llmkern.solvers.solution import Solution, pack_quantized, relative_loss

ORDERS = ("static", "dynamic", None)


def gptq(
    weight: Tensor, hessian: Hessian | Tensor, *, bits: int = 4, group_size: int | None = 128, symmetric: bool = True,
    act_order: str | None = "static", clip: str | None = "hessian", damp: float = 0.01, mask: Tensor | None = None,
    descent: int | None = None, scale_dtype: torch.dtype = torch.float32, output: OutputHessian | None = None,
    scale_refit: int | None = None, loss: bool = True,
) -> Solution:  # fmt: skip
    """Quantize weight [N, K] to `bits` (2 to 8) so that the layer's output on its calibration input changes least.

    group_size: natural columns per scale, None for one group per row. act_order: "static" finds every group's scale
    beforehand and takes the columns in order of falling diag(H) (groups stay contiguous: no index at inference);
    None takes them in natural order; "dynamic" is the published algorithm without activation order, which finds a
    group's scale when it reaches it. clip: how scales are found, see `llmkern.solvers.grid.find_grid`. mask: bool
    [N, K], False = stays 0. scale_dtype: what scales are stored in; codes are chosen on the rounded scales. output:
    which errors of the outputs matter (`OutputHessian`); rows are then rounded with feedback between them as well. Not
    with act_order="dynamic".

    What follows the columns: scale_refit, steps of conjugate gradients over all scales (`llmkern.solvers.scales`), and
    descent, passes of coordinate descent over the codes, after which scales are refit again. None is 5 and 2 with
    `output`, and 0 without, where they would take several times as long as all else.

    loss: False leaves the solution's NaN: what it is relative to takes a product with the whole Hessian, which the
    published algorithms do not have (a quarter of the time at 4096 x 4096 on a CPU).

    Raises ValueError (or TypeError for a dtype) that names the argument; a Hessian that is not positive definite is
    retried as `Hessian.factor` says, and `damp` and `notes` of the solution tell.
    """
    w = as_matrix("gptq", weight)
    check_bits("gptq", bits)
    group_size = _base.resolve_group_size("gptq", group_size, w.shape[1])
    check_choice("gptq", "act_order", act_order, ORDERS)
    check_choice("gptq", "clip", clip, CLIPS)
    check_damp("gptq", damp)
    descent = count_or("gptq", "descent", descent, 0 if output is None else DESCENT)
    scale_refit = count_or("gptq", "scale_refit", scale_refit, 0 if output is None else SCALE_STEPS)
    mask = check_keep_mask("gptq", mask, w)
    if output is not None and act_order == "dynamic":
        raise ValueError('gptq: output needs groups found beforehand, got act_order="dynamic"')
    check_output("gptq", output, w)
    state = as_hessian("gptq", hessian, w)
    factor = state.factor("activation" if act_order == "static" else None, damp)
    target = live(w, state)
    importance = factor.costs()
    options: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "clip": clip, "scale_dtype": scale_dtype}
    kept = target if mask is None else target * mask
    grid = find_grid(kept, importance, group_size=group_size, **options)

    def find(values: Tensor, places: slice) -> Grid:
        return find_grid(values, importance[places], group_size=min(group_size, values.shape[1]), **options)

    dynamic = find if act_order == "dynamic" and group_size < w.shape[1] else None
    if output is None:
        q, lost = gptq_columns(target, factor, grid, mask, dynamic=dynamic, rough=act_order != "dynamic")
    else:
        q, lost = coupled_columns(target, factor, grid, mask, output), math.nan
    if scale_refit or descent:
        lost, damped = math.nan, state.damped(factor.damp)
        q, grid = polish(target, q, grid, damped, mask, scale_refit, descent, output)
    packed, notes = pack_quantized(q, grid, mask)
    relative = relative_loss(w, q, state, lost) if loss else math.nan
    return Solution(q, packed, mask, relative, factor.damp, (*factor.notes, *notes))
