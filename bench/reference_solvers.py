"""GPTQ and SparseGPT as published, in plain PyTorch: the peer of `bench.solvers` and what the tests compare with.

Written from the papers (arXiv 2210.17323 and 2301.00774): Cholesky, inverse, Cholesky again, and one Python iteration
per column. Two blemishes of the authors' code are not repeated, so that results can be compared weight by weight: a
symmetric scale is 2 max|w| / (2^bits - 1) for every row, and an unstructured mask prunes exactly the asked-for share.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor


class Result(NamedTuple):
    """The chosen weight [N, K], the mask (True = kept) or None, and seconds: all, and of the column loops alone.

    The loops alone are those within blocks, without the product that joins blocks.
    """

    weight: Tensor
    mask: Tensor | None
    seconds: float
    loop_seconds: float


def find_params(w: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero [N, 1] of unsigned codes over the whole range of each row."""
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    return scale, zero


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest value of the grid."""
    return scale * (torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1) - zero)


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper U with H^-1 = Uᵀ U, of the damped Hessian."""
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(
        len(hessian), dtype=hessian.dtype, device=hessian.device
    )
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def gptq(
    weight: Tensor, hessian: Tensor, *, bits: int, group_size: int | None, symmetric: bool = True, damp: float = 0.01,
    act_order: bool = False, static_groups: bool = False, block: int = 128,
) -> Result:  # fmt: skip
    """GPTQ of weight [N, K] in the dtype of the inputs; `group_size=None` is one group per row."""
    begin = time.perf_counter()
    w, h = weight.clone(), hessian.clone()
    k = w.shape[1]
    scale, zero = find_params(w, bits, symmetric)
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    size = group_size or k
    static = [find_params(w[:, at : at + size], bits, symmetric) for at in range(0, k, size)] if static_groups else None
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(k, device=w.device)
    w, h = w[:, order], h[order][:, order]
    u = inverse_factor(h, damp)
    q = torch.zeros_like(w)
    loop_seconds = 0.0
    for start in range(0, k, block):
        stop = min(start + block, k)
        w1, q1, error = w[:, start:stop].clone(), torch.zeros_like(w[:, start:stop]), torch.zeros_like(w[:, start:stop])
        u1 = u[start:stop, start:stop]
        begin_loop = time.perf_counter()
        for i in range(stop - start):
            if static is not None:
                scale, zero = static[int(order[start + i]) // size]
            elif group_size is not None and (start + i) % size == 0:
                scale, zero = find_params(w[:, start + i : start + i + size], bits, symmetric)
            column = w1[:, i]
            q1[:, i] = quantize(column.unsqueeze(1), scale, zero, bits).flatten()
            step = (column - q1[:, i]) / u1[i, i]
            w1[:, i:] -= step.unsqueeze(1) @ u1[i, i:].unsqueeze(0)
            error[:, i] = step
        loop_seconds += time.perf_counter() - begin_loop
        q[:, start:stop] = q1
        w[:, stop:] -= error @ u[start:stop, stop:]
    return Result(q[:, order.argsort()], None, time.perf_counter() - begin, loop_seconds)


def sparsegpt(
    weight: Tensor, hessian: Tensor, *, sparsity: float = 0.0, prune_n: int = 0, prune_m: int = 0,
    bits: int | None = None, symmetric: bool = True, damp: float = 0.01, block: int = 128,
) -> Result:  # fmt: skip
    """SparseGPT of weight [N, K]: a share of every block, or `prune_n` of every `prune_m` columns.

    With `bits`, kept weights are quantized in the same pass on one group per row.
    """
    begin = time.perf_counter()
    w, h = weight.clone(), hessian.clone()
    n, k = w.shape
    scale, zero = find_params(w, bits or 8, symmetric)
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    u = inverse_factor(h, damp)
    keep = torch.ones_like(w, dtype=torch.bool)
    loop_seconds = 0.0
    for start in range(0, k, block):
        stop = min(start + block, k)
        w1, q1, error = w[:, start:stop].clone(), torch.zeros_like(w[:, start:stop]), torch.zeros_like(w[:, start:stop])
        begin_loop = time.perf_counter()
        u1 = u[start:stop, start:stop]
        keep1 = torch.ones_like(w1, dtype=torch.bool)
        if not prune_n:
            score = w1**2 / u1.diagonal() ** 2
            count = round(sparsity * n * stop) - round(sparsity * n * start)
            if count:
                keep1 = score > torch.sort(score.flatten()).values[count - 1]
        for i in range(stop - start):
            if prune_n and i % prune_m == 0:
                score = w1[:, i : i + prune_m] ** 2 / u1.diagonal()[i : i + prune_m] ** 2
                keep1[:, i : i + prune_m].scatter_(1, score.topk(prune_n, dim=1, largest=False).indices, False)
            column = w1[:, i]
            value = torch.where(keep1[:, i], column, 0.0)
            if bits is not None:
                value = quantize(value.unsqueeze(1), scale, zero, bits).flatten()
            q1[:, i] = value
            step = (column - value) / u1[i, i]
            w1[:, i:] -= step.unsqueeze(1) @ u1[i, i:].unsqueeze(0)
            error[:, i] = step
        loop_seconds += time.perf_counter() - begin_loop
        w[:, start:stop], keep[:, start:stop] = q1, keep1
        w[:, stop:] -= error @ u[start:stop, stop:]
    return Result(w, keep, time.perf_counter() - begin, loop_seconds)
