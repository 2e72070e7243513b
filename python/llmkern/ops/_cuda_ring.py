"""Sizes of `cuda.ring`, the kernel for few rows of x, and what it cannot run; see csrc/cuda/linear/launch_ring.h."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern.ops._cuda import Gpu, Plan, active_clusters

SHARED_BYTES = 227 * 1024
WARPS, DEPTHS = 16, {1: 3, 2: 2}  # of a block; slots of a warp, by tiles of 8 rows of x


class Weights(NamedTuple):
    """What the kernel has of a weight: rows of a tile, columns of a unit, bytes of a slot; columns of a group, bytes of
    a scale (0: none), whether there are zeros, and whether the first scale is at a multiple of 16 bytes.
    """

    rows: int
    chunk: int
    slot_bytes: int
    group_size: int
    scale_size: int
    zeros: bool
    aligned: bool


def codes(scales: Tensor, zeros: Tensor | None, group_size: int, k: int, lane_columns: int) -> Weights:
    """int4 or int8 weights. With groups smaller than a chunk, slots hold scales and zeros of every lane."""
    chunk = 4 * lane_columns
    of_lanes = group_size < k and group_size % chunk != 0
    slot = 2048 + (512 * (1 + (zeros is not None)) if of_lanes else 0)
    return Weights(32, chunk, slot, group_size, scales.element_size(), zeros is not None, scales.data_ptr() % 16 == 0)


def kept(values: Tensor, scales: Tensor | None, group_size: int) -> Weights:
    """2:4 weights with values in x's type, or int4."""
    size, aligned = (0, False) if scales is None else (scales.element_size(), scales.data_ptr() % 16 == 0)
    rows, slot = (32, 1024 + 512) if values.dtype == torch.int32 else (16, 2048 + 256)
    return Weights(rows, 128, slot, group_size, size, False, aligned)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def shared_bytes(m: int, k: int, w: Weights, splits: int, block_groups: int, rounds: int) -> int:
    """Shared memory of a block: its part of x, slots, scales and zeros, sums; in a cluster those of all its tiles."""
    token_tiles = 2 if m > 8 else 1
    depth, chunks = DEPTHS[token_tiles], -(-k // w.chunk)
    part, group_warps = -(-chunks // splits), WARPS // block_groups
    grouped = w.scale_size > 0 and w.group_size < k
    of_lanes = grouped and w.group_size % w.chunk != 0
    small = 0
    if not of_lanes and (grouped or w.zeros):
        wide, narrow = -(-part // group_warps), chunks // splits // group_warps
        groups = -(-((wide - 1) * w.chunk) // w.group_size) + 1 if grouped else 1
        scales = 0
        if grouped:
            fits = units_fit(k, w, chunks, splits, group_warps)
            scales = _up(groups * w.scale_size + (0 if fits else 4), 16)
            scales += 0 if scales % 32 else 16
        zeros = 4 * (_up(groups + 3, 4) // 4 | 1) if w.zeros else 0
        small = w.rows * (scales + zeros) * (1 + (-(-depth // narrow) if narrow else depth))
    sums = 4 * 8 * w.rows  # of a tile by 8 rows of x; a block keeps 16 rows' at a time where x takes more room
    return (
        min(m, 8 * token_tiles) * (_up(2 * part * w.chunk, 128) + 16)
        + WARPS * (depth * w.slot_bytes + small + (sums if token_tiles == 1 else 512))
        + sums * token_tiles * rounds
        + 8 * (1 + WARPS * depth)
    )


def units_fit(k: int, w: Weights, chunks: int, splits: int, group_warps: int) -> bool:
    """Whether every warp's scales of a row start at a multiple of 16 bytes."""
    if not w.aligned or -(-k // w.group_size) * w.scale_size % 16:
        return False
    for split in range(splits):
        first = chunks * split // splits
        mine = chunks * (split + 1) // splits - first
        for warp in range(group_warps):
            chunk = first + mine * warp // group_warps
            if chunk * w.chunk // w.group_size * w.scale_size % 16:
                return False
    return True


@lru_cache(4096)
def plan(gpu: Gpu, m: int, n: int, k: int, w: Weights) -> Plan | None:
    """Groups of warps in a block (row_tiles), and blocks of a cluster that divide K; None where no cluster holds x.

    The fewest chunks for a warp, where the end of a tile costs about as much as a chunk, and a cluster more.
    """
    token_tiles = 2 if m > 8 else 1
    tiles, chunks = -(-n // w.rows), -(-k // w.chunk)
    plans: dict[tuple[float, int, int], Plan] = {}
    for splits in (1, 2, 4, 8):
        if splits > chunks:
            break
        blocks = min(tiles, active_clusters(gpu, splits))
        for groups in (1, 2, 4)[: 1 if splits > 1 else 3]:
            rounds = -(-tiles // (blocks * groups))
            # Warps without a tile ask for nothing: where there is one round, nearly all should have one.
            idle = groups > 1 and rounds == 1 and 10 * tiles < 9 * blocks * groups
            if idle or shared_bytes(m, k, w, splits, groups, rounds if splits > 1 else 0) > SHARED_BYTES:
                continue
            cost = rounds * (-(-chunks // (splits * (WARPS // groups))) + 1) + 2 * (splits > 1)
            plans[cost, splits, groups] = Plan(groups, token_tiles, splits)
    return plans[min(plans)] if plans else None


def rejects(x: Tensor, weight: Tensor, row_bytes: int, w: Weights, small: tuple[Tensor | None, ...]) -> str | None:
    """Why the kernel cannot run: it copies 16 bytes at a time and words of scales, and keeps its part of x."""
    k = x.shape[-1]
    if not k or k % 8 or row_bytes % 16:
        return f"needs rows of x and w that are multiples of 16 bytes, got {2 * k} and {row_bytes}"
    if x.data_ptr() % 16 or weight.data_ptr() % 16:
        return "needs x and w at multiples of 16 bytes"
    for tensor in small:
        if tensor is not None and (tensor.nbytes % 4 or tensor.data_ptr() % 4):
            return f"needs scales and zeros of whole words, got {tensor.nbytes} bytes"
    m = max(x.numel() // k, 1)
    if plan(Gpu((9, 0), 132), m, weight.shape[0], k, w) is None:
        return f"has no room for x of K={k}"
    return None


def rejects_kept(
    x: Tensor, values: Tensor, positions: Tensor, scales: Tensor | None, group_size: int, w: Weights
) -> str | None:
    """The same for 2:4 weights, of which it takes whole chunks of whole tiles."""
    n, k = values.shape[0], x.shape[-1]
    if values.dtype not in (x.dtype, torch.int32):
        return f"needs values in x's type or int4 codes, got {values.dtype}"
    if not k or k % w.chunk or n % w.rows:
        return f"needs K in multiples of {w.chunk} and N in multiples of {w.rows}, got K={k}, N={n}"
    if scales is not None and group_size < k and group_size % w.chunk:
        return f"needs groups of a multiple of {w.chunk} columns or one per row, got group_size={group_size}"
    if positions.data_ptr() % 16:
        return "needs positions at multiples of 16 bytes"
    return rejects(x, values, 16, w, (scales,))
