"""Solution: what every solver returns, and how its weight is packed and judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern._dense import half_is_fast, on_host, product
from llmkern.formats import BitmaskWeight, Int4Weight, Int8Weight, PackedWeight, Sparse24Int4Weight, Sparse24Weight
from llmkern.formats._base import row_parts
from llmkern.formats.sparse24 import kept_bits
from llmkern.solvers.grid import Grid
from llmkern.solvers.hessian import BLOCK, Hessian
from llmkern.solvers.problem import Problem


@dataclass(frozen=True, eq=False)
class Solution:
    """A solved layer.

    weight: fp32 [N, K], what `packed` unpacks to. packed: the smallest of the packed formats that holds it exactly,
    None if none does. mask: bool [N, K], True = kept, None if nothing was pruned. loss: tr((W-Q) H (W-Q)ᵀ) /
    tr(W H Wᵀ) on the undamped Hessian, NaN where the solver was told not to find it. damp: the damping that was used,
    relative to mean(diag H). notes: whatever differs from what was asked for; a note of type Problem is more than a
    fact.
    """

    weight: Tensor
    packed: PackedWeight | None
    mask: Tensor | None
    loss: float
    damp: float
    notes: tuple[str, ...]


def relative_loss(weight: Tensor, solved: Tensor, hessian: Hessian, lost: float = math.nan) -> float:
    """tr((W-Q) H (W-Q)ᵀ) / tr(W H Wᵀ); 0 if both are 0. `lost`: the numerator, where it is known already."""
    if math.isnan(lost):
        lost = energy(weight - solved, hessian)
    whole = rough_energy(weight, hessian)
    if whole <= 0:
        return 0.0 if lost <= 0 else math.inf
    return max(lost, 0.0) / whole


def energy(x: Tensor, hessian: Hessian) -> float:
    """tr(X H Xᵀ) of fp32 x [N, K]; H is symmetric, so its blocks above the diagonal count twice."""
    matrix, k = hessian.raw(), x.shape[1]
    # Narrower blocks do less and copy more; on a GPU launches count.
    width = k if k <= 3 * BLOCK else 2 * BLOCK if on_host(x) else max(2 * BLOCK, -(-k // 4))
    total = x.new_zeros((), dtype=torch.float64)
    for start in range(0, k, width):
        at = slice(start, start + width)
        part = x[:, at].contiguous()
        moved = product(part, matrix[at, at])
        if start:
            moved.add_(product(x[:, :start], matrix[:start, at]), alpha=2)
        total += torch.dot(moved.view(-1), part.view(-1)).double()
    return float(total)


def rough_energy(x: Tensor, hessian: Hessian) -> float:
    """`energy` to about four digits, at half its price where a CPU multiplies bf16 faster than fp32.

    The diagonal, where a feature far greater than others has its share, is in fp32; what bf16 rounds of the rest is of
    either sign, and averages out over the matrix.
    """
    if not (on_host(x) and half_is_fast()):
        return energy(x, hessian)
    matrix, width = hessian.raw(), BLOCK
    starts = range(0, x.shape[1], width)
    above = [matrix[: at + width, at : at + width].bfloat16().triu_(1 - at) for at in starts]
    total = x.new_zeros((), dtype=torch.float64)
    for rows in x.split(4 * BLOCK):  # half of it stays in cache
        half = rows.bfloat16()
        for part, own, columns in zip(above, matrix.diagonal().split(width), rows.split(width, 1), strict=True):
            columns = columns.contiguous()
            moved = (half[:, : len(part)] @ part).float().addcmul_(columns, own, value=0.5)
            total += 2 * torch.dot(moved.view(-1), columns.view(-1)).double()
    return float(total)


def pack_quantized(q: Tensor, grid: Grid, mask: Tensor | None) -> tuple[PackedWeight, tuple[str, ...]]:
    """The smallest packed weight that holds q [N, K], whose values are on `grid`; and notes on what it took."""
    stored = 4 if grid.bits <= 4 else 8
    notes: tuple[str, ...] = () if grid.bits == stored else (f"{grid.bits}-bit codes are stored as int{stored}",)
    notes += _about_groups(q, grid)
    scales, size = grid.scales.to(grid.scale_dtype), grid.group_size
    if mask is not None and grid.zeros is None:
        if is_24(mask) and (size % 4 == 0 or size >= q.shape[1]):
            if stored == 4:
                return Sparse24Int4Weight.pack(q, mask=mask, group_size=size, scales=scales), notes
            return Sparse24Weight.pack(q, mask=mask, dtype=torch.int8, group_size=size, scales=scales), notes
        if stored == 8:
            return BitmaskWeight.pack(q, mask=mask, dtype=torch.int8, group_size=size, scales=scales), notes
    if mask is not None:
        notes = (*notes, f"packed as dense int{stored} codes: no sparse format holds this mask with these codes")
    kind = Int4Weight if stored == 4 else Int8Weight
    return kind.pack(q, group_size=size, scales=scales, zeros=grid.zeros), notes


def _about_groups(q: Tensor, grid: Grid) -> tuple[str, ...]:
    """Groups whose scale collapsed, and those that hold only zeros for another reason."""
    count = grid.scales.numel()
    # Every group of zeros has scale 1, and hardly any other group: the values are looked at only where they may be 0.
    ones, lost = grid.scales == 1, torch.zeros_like(grid.scales, dtype=torch.bool)
    if grid.collapsed is not None:
        lost = grid.collapsed
    notes: tuple[str, ...] = ()
    if collapsed := int(lost.count_nonzero()):
        dtype = str(grid.scale_dtype).removeprefix("torch.")
        notes += (Problem(f"{collapsed} of {count} groups collapsed: their scale is below the range of {dtype}"),)
    if int(ones.count_nonzero()):
        padded = torch.nn.functional.pad(q, (0, -q.shape[1] % grid.group_size))
        zeros = (padded.view(*ones.shape, -1) == 0).all(-1) & ones & ~lost
        if empty := int(zeros.count_nonzero()):
            notes += (f"{empty} of {count} groups hold only zeros",)
    return notes


def pack_kept(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> PackedWeight:
    """A pruned weight [N, K] with its values in `dtype`: Sparse24Weight where the mask is 2:4, else BitmaskWeight."""
    kind = Sparse24Weight if is_24(mask) else BitmaskWeight
    return kind.pack(weight.to(dtype), mask=mask)


def is_24(mask: Tensor) -> bool:
    """True if no four consecutive columns (from a multiple of 4) keep more than two."""
    if not mask.numel():
        return True
    most = 0
    for rows in row_parts(mask):
        bits = kept_bits(mask[rows])
        # Bits 0 and 2, and bits 1 and 3, as two numbers of two bits; then their sum.
        pairs = (bits & 5) + (bits >> 1 & 5)
        most = max(most, int(((pairs & 3) + (pairs >> 2)).max()))
    return most <= 2
