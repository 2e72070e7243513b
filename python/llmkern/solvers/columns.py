"""The column loops: blocks of columns go to the native kernels, what joins blocks is one GEMM each.

H = V Vᵀ with V upper triangular and V' = V / diag(V): the compensated value of column j is
w_j + Σ_{i<j} (w_i - q_i) V'_ij (see `llmkern.ops.gptq_block`), so a block needs one product of the differences so far
with V', and no matrix is updated behind the block.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from llmkern import ops
from llmkern._dense import add_product, on_host, product, squared, take_columns
from llmkern._pages import large_empty
from llmkern.solvers._checks import Pattern
from llmkern.solvers.grid import Grid
from llmkern.solvers.hessian import Factor

# Values [N, B] and the places they are at, whole groups (the last of K may be short) -> their grid.
FindGrid = Callable[[Tensor, slice], Grid]
BLOCK = 128  # columns per kernel call: the papers' block size
# Below this share of the damped energy, the undamped one is a difference of nearly equal numbers; the second where the
# feedback was rounded, and the damped energy with it.
CANCELLED, CANCELLED_ROUGH = 1e-2, 0.2


def blocks(k: int, width: int = BLOCK, multiple: int = 1) -> list[slice]:
    """Slices of at most `width` columns that cover K, all but the last a multiple of `multiple` wide."""
    width = max(width // multiple, 1) * multiple
    return [slice(start, min(start + width, k)) for start in range(0, k, width)]


def due(parts: list[slice], done: int) -> tuple[slice, slice]:
    """Columns whose differences go on when `done` blocks are finished, and those they go to (none after the last).

    A block's differences are not taken to all columns behind it at once: of t finished blocks the last p, p the
    greatest power of two that divides t, are taken to the p blocks that come next, in one product.

        blocks done   1    2    3    4    5    6    7
        from         [0]  0-1  [2]  0-3  [4]  4-5  [6]
        to           [1]  2-3  [3]  4-7  [5]  6-7  [7]

    That is every pair of blocks once, as a recursive halving of the columns has them: half of all the work is in one
    product of K/2 columns with K/2.
    """
    span = done & -done
    stop = parts[done - 1].stop
    return slice(parts[done - span].start, stop), slice(stop, parts[min(done + span, len(parts)) - 1].stop)


class Feedback:
    """The values of columns [N, K] compensated for the differences w - q of all columns before them, block by block."""

    def __init__(self, w: Tensor, factor: Factor, blocks: list[slice], *, rough: bool = False) -> None:
        self._rough = rough and on_host(w)
        # A block's are final when it begins, and what was chosen when it is done.
        self.values = large_empty(*w.shape, like=w).copy_(w)
        self._w, self._factor, self._blocks, self._done = w, factor, blocks, 0
        self._energy, self._squared = w.new_zeros(2, dtype=torch.float64).unbind()

    def finish(self, before: Tensor, compensated: Tensor, chosen: Tensor) -> None:
        """Take in what was chosen for the next block, all [N, B]; its `values` become these."""
        at = self._blocks[self._done]
        moved = before - chosen
        unit = self._factor.unit
        # What the block adds to tr(D H Dᵀ) of the damped Hessian: |D V|² by columns of V.
        error = product(moved, unit[at, at]).add_(compensated).sub_(before).mul_(self._factor.diagonal[at])
        self._energy += squared(error)
        self._squared += squared(moved)
        self.values[:, at] = chosen
        self._done += 1
        done, come = due(self._blocks, self._done)
        if come.start < come.stop:
            add_product(
                self.values[:, come], self._w[:, done], unit[done, come], less=self.values[:, done], rough=self._rough
            )

    def ahead(self, at: slice) -> Tensor:
        """Columns `at`, which may end behind the next block, with the feedback of the blocks that are done."""
        if at.start == 0:
            return self._w[:, at].contiguous()
        done = slice(0, at.start)
        return product(self._w[:, done] - self.values[:, done], self._factor.unit[done, at]).add_(self._w[:, at])

    def undamped(self) -> float:
        """tr(D H Dᵀ) of the undamped Hessian from that of the damped one; NaN where nearly all of it is damping."""
        without = self._energy - self._factor.added * self._squared
        least = CANCELLED_ROUGH if self._rough else CANCELLED
        return float(torch.where(without > least * self._energy, without, torch.nan))


def optimal(w: Tensor, wc: Tensor, unit: Tensor) -> Tensor:
    """What columns [N, B] would be if all of them were still free, given the compensation by those before.

    `unit` is their block of V'. GPTQ as published keeps these values in place of `wc`.
    """
    # move_j = (wc - w)_j - Σ_{i<j} move_i V'_ij, which is move V' = wc - w.
    eye = torch.eye(len(unit), device=unit.device)
    inverse = torch.linalg.solve_triangular(unit, eye, upper=True, unitriangular=True)
    return product(wc - w, inverse).add_(w)


def gptq_columns(
    w: Tensor, factor: Factor, grid: Grid, mask: Tensor | None = None, *, dynamic: FindGrid | None = None,
    width: int = BLOCK, rough: bool = False,
) -> tuple[Tensor, float]:  # fmt: skip
    """GPTQ over all columns of w [N, K]; w, mask and the result are in natural order, whatever the factor's.

    Returns q and its `undamped` energy. With `dynamic`, groups are of consecutive places of the factor's order, and
    the grid of the groups that start in a block is overwritten by `dynamic(values, places)` when the block begins, from
    the values compensated so far, as published. rough: the feedback between blocks may be rounded to bf16, which moves
    a value by far less than rounding it to the grid does; the energy is then right to about three digits.
    """
    k = w.shape[1]
    if factor.order is not None:
        w = take_columns(w, factor.order, large_empty(*w.shape, like=w))
        mask = None if mask is None else mask.index_select(1, factor.order)
    groups = grid.groups(None if dynamic else factor.order, k)
    parts = blocks(k, width)
    state = Feedback(w, factor, parts, rough=rough)
    for at in parts:
        before, wc = w[:, at].contiguous(), state.values[:, at].contiguous()
        if dynamic is not None:
            _start_groups(w, wc, state, factor, grid, at, dynamic)
        unit = factor.unit[at, at].contiguous()
        kept = None if mask is None else mask[:, at].contiguous()
        chosen = ops.gptq_block(before, wc, unit, grid.scales, grid.zeros, groups[at], kept, grid.bits)
        state.finish(before, wc, chosen)
    q = state.values
    if factor.order is not None:
        q = take_columns(q, factor.order.argsort(), w)
    return q, state.undamped()


def _start_groups(
    w: Tensor, wc: Tensor, state: Feedback, factor: Factor, grid: Grid, at: slice, find: FindGrid
) -> None:
    """Fill the grid of the groups that start inside columns `at`, whose compensated values are wc."""
    k, size = w.shape[1], grid.group_size
    first, last = -(-at.start // size), -(-at.stop // size)
    if first < last:
        wide = slice(at.start, min(last * size, k))
        values = optimal(w[:, wide], wc if wide == at else state.ahead(wide), factor.unit[wide, wide])
        found = find(values[:, first * size - at.start :].contiguous(), slice(first * size, wide.stop))
        grid.scales[:, first:last] = found.scales
        if grid.collapsed is not None and found.collapsed is not None:
            grid.collapsed[:, first:last] = found.collapsed
        if grid.zeros is not None and found.zeros is not None:
            grid.zeros[:, first:last] = found.zeros


def sparsegpt_columns(
    w: Tensor, factor: Factor, pattern: Pattern, grid: Grid | None = None, *, width: int = BLOCK
) -> tuple[Tensor, Tensor, float]:
    """SparseGPT over all columns of w [N, K] in natural order; returns q, the mask (True = kept) and q's `undamped`.

    Unstructured masks are chosen per block over all rows together, so that exactly the asked-for share of all weights
    goes; n:m masks inside the kernel. With a grid, kept values are quantized in the same pass.
    """
    n, k = w.shape
    keep = torch.empty_like(w, dtype=torch.bool)
    groups = None if grid is None else grid.groups(None, k)
    parts = _pattern_blocks(k, pattern, width)
    state = Feedback(w, factor, parts)
    for at in parts:
        before, wc = w[:, at].contiguous(), state.values[:, at].contiguous()
        unit, diagonal = factor.unit[at, at].contiguous(), factor.diagonal[at].contiguous()
        kept, prune_n, prune_m = None, pattern.n, pattern.m
        if tail := (at.stop - at.start) % max(pattern.m, 1):
            prune_n, prune_m = pattern.of_tail(tail), tail
        if not pattern.m:
            count = round(pattern.fraction * n * at.stop) - round(pattern.fraction * n * at.start)
            kept = keep_all_but((optimal(before, wc, unit) * diagonal).square_(), count)
        chosen, keep[:, at] = ops.sparsegpt_block(
            before, wc, unit, diagonal, kept, prune_n, prune_m,
            None if grid is None else grid.scales, None if grid is None else grid.zeros,
            None if groups is None else groups[at], 0 if grid is None else grid.bits,
        )  # fmt: skip
        state.finish(before, wc, chosen)
    return state.values, keep, state.undamped()


def _pattern_blocks(k: int, pattern: Pattern, width: int) -> list[slice]:
    """Blocks that hold whole groups of n:m, the short last group in a block of its own."""
    if not pattern.m:
        return blocks(k, width)
    whole = k - k % pattern.m
    return blocks(whole, width, pattern.m) + ([slice(whole, k)] if whole < k else [])


def keep_all_but(score: Tensor, count: int) -> Tensor:
    """bool like score [N, B]: False at the `count` least scores; of equal scores the first go."""
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    flat = score.flatten()
    if not on_host(score):  # a sort costs more than a threshold, but nobody waits for it
        keep = torch.ones_like(flat, dtype=torch.bool)
        return keep.scatter_(0, flat.argsort(stable=True)[:count], False).view(score.shape)
    # NumPy's partition is vectorized, torch's kthvalue is not.
    threshold = float(np.partition(flat.numpy(), count - 1)[count - 1])
    keep = score > threshold
    if more := score.numel() - count - int(keep.sum()):
        equal = (flat == threshold).nonzero().flatten()
        keep.view(-1)[equal[len(equal) - more :]] = True
    return keep
