"""sparsegpt_block in Triton: gptq_block's kernel, with columns chosen by score or by the mask."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.ops._columns import by_layer
from llmkern.ops.gptq_block.triton import solve_block


@by_layer
def run(
    w: Tensor, wc: Tensor, v: Tensor, diagonal: Tensor, mask: Tensor | None, prune_n: int, prune_m: int,
    scales: Tensor | None, zeros: Tensor | None, groups: Tensor | None, bits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op; see `reference`."""
    if mask is not None:
        return solve_block(w, wc, v, None, mask, 0, 0, scales, zeros, groups, bits, None), mask.clone()
    keep = torch.empty_like(w, dtype=torch.bool)
    return solve_block(w, wc, v, diagonal, None, prune_n, prune_m, scales, zeros, groups, bits, keep), keep
