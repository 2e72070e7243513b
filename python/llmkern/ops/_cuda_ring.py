"""Sizes of `cuda.ring`, the kernel for few rows of x, and what it cannot run. Mirrors csrc/cuda/linear/launch_ring.h."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from llmkern.ops._cuda import Gpu, Plan

SHARED_BYTES = 227 * 1024
WARPS, DEPTHS = 16, {1: 3, 2: 2}  # of a block; slots of a warp, by tiles of 8 rows of x
TILE_ROWS = 32
# Multiprocessors that clusters of so many blocks can fill: a cluster is within a GPC, whose number of them is no
# multiple of 4.
CLUSTERED = {1: 1.0, 2: 1.0, 4: 128 / 132, 8: 112 / 132}


class Codes(NamedTuple):
    """What the kernel has of a weight: columns of a chunk; bytes of a scale; whether the scales' first is at a multiple
    of 16 bytes.
    """

    chunk: int
    group_size: int
    scale_size: int
    zeros: bool
    aligned: bool


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def shared_bytes(m: int, k: int, codes: Codes, splits: int, block_groups: int, rounds: int) -> int:
    """Shared memory of a block: its part of x, slots, scales and zeros, sums; in a cluster those of every
    tile (rounds).
    """
    token_tiles = 2 if m > 8 else 1
    depth, chunks = DEPTHS[token_tiles], -(-k // codes.chunk)
    part, group_warps = -(-chunks // splits), WARPS // block_groups
    grouped = codes.group_size < k
    of_lanes = grouped and codes.group_size % codes.chunk != 0
    small = 0
    if not of_lanes and (grouped or codes.zeros):
        wide, narrow = -(-part // group_warps), chunks // splits // group_warps
        groups = -(-((wide - 1) * codes.chunk) // codes.group_size) + 1 if grouped else 1
        scales = 0
        if grouped:
            fits = units_fit(k, codes, chunks, splits, group_warps)
            scales = _up(groups * codes.scale_size + (0 if fits else 4), 16)
            scales += 0 if scales % 32 else 16
        zeros = 4 * (_up(groups + 3, 4) // 4 | 1) if codes.zeros else 0
        small = 32 * (scales + zeros) * (1 + (-(-depth // narrow) if narrow else depth))
    slot = 3072 if of_lanes else 2048
    return (
        min(m, 8 * token_tiles) * (_up(2 * part * codes.chunk, 64) + 32)
        + WARPS * (depth * slot + small + 1024)
        + 1024 * token_tiles * rounds
        + 8 * (1 + WARPS * depth)
    )


def units_fit(k: int, codes: Codes, chunks: int, splits: int, group_warps: int) -> bool:
    """Whether every warp's scales of a row start at a multiple of 16 bytes."""
    if not codes.aligned or -(-k // codes.group_size) * codes.scale_size % 16:
        return False
    for split in range(splits):
        first = chunks * split // splits
        mine = chunks * (split + 1) // splits - first
        for warp in range(group_warps):
            chunk = first + mine * warp // group_warps
            if chunk * codes.chunk // codes.group_size * codes.scale_size % 16:
                return False
    return True


@lru_cache(4096)
def plan(gpu: Gpu, m: int, n: int, k: int, codes: Codes) -> Plan | None:
    """Groups of warps in a block (row_tiles), and blocks of a cluster that divide K; None where no cluster holds x.

    A group takes a tile of 32 rows at a time, and its end costs as much as a chunk: the fewest chunks for a warp.
    """
    token_tiles = 2 if m > 8 else 1
    tiles, chunks = -(-n // TILE_ROWS), -(-k // codes.chunk)
    plans: dict[tuple[int, int, int], Plan] = {}
    for splits, usable in CLUSTERED.items():
        if splits > chunks:
            break
        for groups in (1, 2, 4, 8)[: 1 if splits > 1 else 4]:
            blocks = min(tiles, max(1, int(gpu.multiprocessors * usable) // splits))
            rounds = -(-tiles // (blocks * groups))
            kept = -(-tiles // min(tiles, gpu.multiprocessors // splits)) if splits > 1 else 0
            if shared_bytes(m, k, codes, splits, groups, kept) > SHARED_BYTES:
                continue
            cost = rounds * (-(-chunks // (splits * (WARPS // groups))) + 1) + 4 * (splits > 1)
            plans[cost, splits, groups] = Plan(groups, token_tiles, splits)
    return plans[min(plans)] if plans else None


def rejects(x: Tensor, weight: Tensor, row_bytes: int, codes: Codes, small: tuple[Tensor | None, ...]) -> str | None:
    """Why the kernel cannot run: it copies 16 bytes at a time and words of scales, and keeps its part of x."""
    k = x.shape[-1]
    if k % 8 or row_bytes % 16:
        return f"needs rows of x and w that are multiples of 16 bytes, got {2 * k} and {row_bytes}"
    if x.data_ptr() % 16 or weight.data_ptr() % 16:
        return "needs x and w at multiples of 16 bytes"
    for tensor in small:
        if tensor is not None and (tensor.nbytes % 4 or tensor.data_ptr() % 4):
            return f"needs scales and zeros of whole words, got {tensor.nbytes} bytes"
    m = max(x.numel() // k, 1)
    if plan(Gpu((9, 0), 132), m, weight.shape[0], k, codes) is None:
        return f"has no room for x of K={k}"
    return None


def codes_of(scales: Tensor, zeros: Tensor | None, group_size: int, lane_columns: int) -> Codes:
    """The description of int4 or int8 weights."""
    return Codes(
        4 * lane_columns, group_size, scales.element_size(), zeros is not None, scales.data_ptr() % 16 == 0
    )
