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
from llmkern._dense import on_host, product, squared
from llmkern.solvers._checks import Pattern
from llmkern.solvers.grid import Grid
from llmkern.solvers.hessian import Factor

# Values [N, B] and the places they are at, whole groups (the last of K may be short) -> their grid.
FindGrid = Callable[[Tensor, slice], Grid]
BLOCK = 128  # columns per kernel call: the papers' block size
CANCELLED = 1e-2  # below this share of the damped energy, the undamped one is a difference of nearly equal numbers


def blocks(k: int, width: int = BLOCK, multiple: int = 1) -> list[slice]:
    """Slices of at most `width` columns that cover K, all but the last a multiple of `multiple` wide."""
    width = max(width // multiple, 1) * multiple
    return [slice(start, min(start + width, k)) for start in range(0, k, width)]


def compensated(w: Tensor, difference: Tensor, factor: Factor, at: slice) -> Tensor:
    """Columns `at` of w, contiguous, with the feedback of the differences of all columns before them."""
    if at.start == 0:
        return w[:, at].contiguous()
    return product(difference[:, : at.start], factor.unit[: at.start, at]).add_(w[:, at])


def optimal(w: Tensor, wc: Tensor, unit: Tensor) -> Tensor:
    """What columns [N, B] would be if all of them were still free, given the compensation by those before.

    `unit` is their block of V'. GPTQ as published keeps these values in place of `wc`.
    """
    # Forward substitution, move_j = (wc - w)_j - Σ_{i<j} move_i V'_ij: the columns of a w of 0 that keeps every value.
    move = (wc - w).contiguous()
    ones = w.new_ones(len(unit))
    everywhere = torch.ones_like(move, dtype=torch.bool)
    solved, _ = ops.sparsegpt_block(
        torch.zeros_like(move), move, unit.contiguous(), ones, everywhere, 0, 0, None, None, None, 0
    )
    return solved.add_(w)


def gptq_columns(
    w: Tensor, factor: Factor, grid: Grid, mask: Tensor | None = None, *, dynamic: FindGrid | None = None,
    width: int = BLOCK,
) -> tuple[Tensor, float]:  # fmt: skip
    """GPTQ over all columns of w [N, K]; w, mask and the result are in natural order, whatever the factor's.

    Returns q and its `undamped` energy. With `dynamic`, groups are of consecutive places of the factor's order, and
    the grid of the groups that start in a block is overwritten by `dynamic(values, places)` when the block begins, from
    the values compensated so far, as published.
    """
    k = w.shape[1]
    if factor.order is not None:
        w = w.index_select(1, factor.order)
        mask = None if mask is None else mask.index_select(1, factor.order)
    q, difference = torch.empty_like(w), torch.empty_like(w)
    groups = grid.groups(None if dynamic else factor.order, k)
    energy = w.new_zeros((), dtype=torch.float64)
    for at in blocks(k, width):
        if dynamic is None:
            wc = compensated(w, difference, factor, at)
        else:
            wc = _start_groups(w, difference, factor, grid, at, dynamic)
        before = w[:, at].contiguous()
        unit = factor.unit[at, at].contiguous()
        kept = None if mask is None else mask[:, at].contiguous()
        chosen = ops.gptq_block(before, wc, unit, grid.scales, grid.zeros, groups[at], kept, grid.bits)
        moved = before - chosen
        q[:, at], difference[:, at] = chosen, moved
        energy += _block_energy(moved, wc, before, unit, factor.diagonal[at])
    if factor.order is not None:
        q = q.index_select(1, factor.order.argsort())
    return q, undamped(energy, difference, factor)


def _start_groups(w: Tensor, difference: Tensor, factor: Factor, grid: Grid, at: slice, find: FindGrid) -> Tensor:
    """Fill the grid of the groups that start inside columns `at`; returns those columns compensated."""
    k, size, width = w.shape[1], grid.group_size, at.stop - at.start
    first, last = -(-at.start // size), -(-at.stop // size)
    wide = at if first == last else slice(at.start, min(last * size, k))
    wc = compensated(w, difference, factor, wide)
    if first < last:
        values = optimal(w[:, wide], wc, factor.unit[wide, wide])
        found = find(values[:, first * size - at.start :].contiguous(), slice(first * size, wide.stop))
        grid.scales[:, first:last] = found.scales
        if grid.collapsed is not None and found.collapsed is not None:
            grid.collapsed[:, first:last] = found.collapsed
        if grid.zeros is not None and found.zeros is not None:
            grid.zeros[:, first:last] = found.zeros
    return wc[:, :width].contiguous()


def _block_energy(moved: Tensor, wc: Tensor, before: Tensor, unit: Tensor, diagonal: Tensor) -> Tensor:
    """What a block adds to tr(D H Dᵀ) of the damped Hessian, as |D V|² by columns of V; a scalar."""
    error = product(moved, unit).add_(wc).sub_(before).mul_(diagonal)
    return squared(error)


def undamped(energy: Tensor, difference: Tensor, factor: Factor) -> float:
    """tr(D H Dᵀ) of the undamped Hessian from that of the damped one; NaN where nearly all of it is damping."""
    without = energy - factor.added * squared(difference)
    return float(torch.where(without > CANCELLED * energy, without, torch.nan))


def sparsegpt_columns(
    w: Tensor, factor: Factor, pattern: Pattern, grid: Grid | None = None, *, width: int = BLOCK
) -> tuple[Tensor, Tensor, float]:
    """SparseGPT over all columns of w [N, K] in natural order; returns q, the mask (True = kept) and q's `undamped`.

    Unstructured masks are chosen per block over all rows together, so that exactly the asked-for share of all weights
    goes; n:m masks inside the kernel. With a grid, kept values are quantized in the same pass.
    """
    n, k = w.shape
    q, difference = torch.empty_like(w), torch.empty_like(w)
    keep = torch.empty_like(w, dtype=torch.bool)
    groups = None if grid is None else grid.groups(None, k)
    energy = w.new_zeros((), dtype=torch.float64)
    for at in _pattern_blocks(k, pattern, width):
        before, wc = w[:, at].contiguous(), compensated(w, difference, factor, at)
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
        moved = before - chosen
        q[:, at], difference[:, at] = chosen, moved
        energy += _block_energy(moved, wc, before, unit, diagonal)
    return q, keep, undamped(energy, difference, factor)


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


def descend(w: Tensor, q: Tensor, damped: Tensor, grid: Grid, mask: Tensor | None, passes: int) -> Tensor:
    """Coordinate descent over the codes of q [N, K] on tr((w - q) damped (w - q)ᵀ), natural order; returns the new q.

    Each column takes the grid value nearest to its optimum with all others fixed, which can only lower the objective:
    the column update of gptq_block, with rows of the Hessian (columns divided by its diagonal) for the feedback.
    """
    q = q.clone()
    k = w.shape[1]
    groups = grid.groups(None, k)
    diagonal = damped.diagonal()
    slope = product(w - q, damped)  # minus half the gradient
    for index in range(passes):
        for at in blocks(k):
            before = q[:, at].contiguous()
            target = before + slope[:, at] / diagonal[at]
            unit = (damped[at, at] / diagonal[at]).contiguous()
            kept = None if mask is None else mask[:, at].contiguous()
            chosen = ops.gptq_block(before, target, unit, grid.scales, grid.zeros, groups[at], kept, grid.bits)
            q[:, at] = chosen
            rest = slice(at.stop if index == passes - 1 else 0, k)
            slope[:, rest] += product(before - chosen, damped[at, rest])
    return q
