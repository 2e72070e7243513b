"""rtn: round to the nearest code, no calibration needed."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.formats import _base
from llmkern.solvers._checks import as_hessian, as_matrix, check_bits, check_choice
from llmkern.solvers.grid import CLIPS, find_grid
from llmkern.solvers.hessian import Hessian
from llmkern.solvers.solution import Solution, pack_quantized, relative_loss

NO_HESSIAN = "no Hessian given: loss is ‖W-Q‖²/‖W‖²"


def rtn(
    weight: Tensor, hessian: Hessian | Tensor | None = None, *, bits: int = 4, group_size: int | None = 128,
    symmetric: bool = True, clip: str | None = None, scale_dtype: torch.dtype = torch.float32,
) -> Solution:  # fmt: skip
    """Round weight [N, K] to the nearest code on each group's grid.

    `group_size=None` is one group per row; `clip` as in `gptq` ("hessian" needs one). The Hessian is otherwise only
    used for `loss`; without it the loss is that of H = I, and a note says so.
    """
    w = as_matrix("rtn", weight)
    check_bits("rtn", bits)
    group_size = _base.resolve_group_size("rtn", group_size, w.shape[1])
    check_choice("rtn", "clip", clip, CLIPS)
    state = None if hessian is None else as_hessian("rtn", hessian, w)
    if clip == "hessian" and state is None:
        raise ValueError('rtn: clip="hessian" needs a Hessian, got None')
    grid = find_grid(
        w, None if state is None else state.raw().diagonal(), bits=bits, group_size=group_size, symmetric=symmetric,
        clip=clip, scale_dtype=scale_dtype,
    )  # fmt: skip
    q = grid.nearest(w)
    packed, notes = pack_quantized(q, grid, None)
    loss, more = loss_without_factor(w, q, state)
    return Solution(q, packed, None, loss, 0.0, (*notes, *more))


def loss_without_factor(w: Tensor, q: Tensor, hessian: Hessian | None) -> tuple[float, tuple[str, ...]]:
    """The relative loss and a note if it is that of H = I."""
    if hessian is not None:
        return relative_loss(w, q, hessian), ()
    whole = float(w.square().sum(dtype=torch.float64))
    lost = float((w - q).square().sum(dtype=torch.float64))
    return (lost / whole if whole else 0.0), (NO_HESSIAN,)
