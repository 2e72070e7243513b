"""What the CUDA rows of the sparse ops share: which kernel suits how many rows of x, its sizes, and what it lacks."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from llmkern.ops import _cuda

TILE_ROWS = 128  # of w in a block of `cuda.mma`
WGMMA_COLUMNS = 128  # of K in a stage of `cuda.wgmma`: csrc/cuda/sparse/wgmma_feed.h
WGMMA_GROUP = 32  # columns of a product of `cuda.wgmma`
PART_COLUMNS = 16  # csrc/cuda/sparse/kept.h

MASK_CHUNK = 64  # csrc/cuda/bitmask_linear/masked_rows.h


def best(gpu: _cuda.Gpu, m: int, *, wgmma: bool) -> str:
    """The kernel for m rows of x; wgmma: whether the op has that one.

    Up to 16 rows every weight is used in one or two products as soon as it arrives.
    """
    if m <= 16:
        return "ring" if wgmma and gpu.capability[0] in _cuda.RING_MAJORS else "stream"
    return "wgmma" if wgmma and gpu.capability[0] == 9 else "mma"


def yields(kernel: str, gpu: _cuda.Gpu, x: Tensor, *, wgmma: bool) -> str | None:
    """Why `kernel` leaves x to a later row, if it does."""
    m = rows_of(x)
    return _cuda.leaves_to(best(gpu, m, wgmma=wgmma), kernel, m)


def rows_of(x: Tensor) -> int:
    """M of x [..., K]."""
    return x.numel() // max(x.shape[-1], 1)


@lru_cache(4096)
def kept_plan(kernel: str, gpu: _cuda.Gpu, m: int, n: int, k: int, *, scaled: bool) -> _cuda.Plan:
    """Sizes of the kernels over 2:4 weights, of which a warp takes 64 columns at a time, or 128 with scales."""
    chunk = 128 if scaled else 64
    if kernel == "stream":
        row_tiles, token_tiles = (2 if scaled else 4, 2) if m > 8 else (2 if m > 1 else 1, 1)
        wanted = gpu.multiprocessors * (2 if row_tiles == 1 else 1)
        most = -(-k // (chunk * _cuda.STREAM_WARPS))
    elif kernel == "wgmma":
        # A block fills a multiprocessor: a second round of them would cost more than dividing K gains.
        row_tiles, wanted, most = 16, gpu.multiprocessors // 2 + 1, k // (4 * WGMMA_COLUMNS)
        token_tiles = 16 if m > 64 else 8
    else:
        row_tiles, wanted, most = TILE_ROWS // 16, gpu.multiprocessors, k // (4 * chunk)
        token_tiles = 16 if m > 64 else 4 if m <= 32 else 8
    blocks = -(-n // (16 * row_tiles)) * -(-m // (8 * token_tiles))
    return _cuda.Plan(row_tiles, token_tiles, _cuda.cluster(gpu, blocks, wanted, most))


@lru_cache(4096)
def mask_plan(kernel: str, gpu: _cuda.Gpu, m: int, n: int, k: int) -> _cuda.Plan:
    """Sizes of the kernels of bitmask_linear, whose warps take 16 rows of w each."""
    if kernel == "stream":
        token_tiles = 2 if m > 8 else 1
        blocks = -(-n // 16) * -(-m // (8 * token_tiles))
        most = -(-k // (MASK_CHUNK * _cuda.STREAM_WARPS))
        return _cuda.Plan(1, token_tiles, _cuda.cluster(gpu, blocks, 2 * gpu.multiprocessors, most))
    token_tiles = 8 if m <= 64 else 16
    blocks = -(-n // TILE_ROWS) * -(-m // (8 * token_tiles))
    return _cuda.Plan(
        TILE_ROWS // 16, token_tiles, _cuda.cluster(gpu, blocks, gpu.multiprocessors, k // (4 * MASK_CHUNK))
    )


def rejects_values(values: Tensor, x: Tensor) -> str | None:
    """Why values of this type do not go with x: no product takes two types, and no rounding is silent."""
    if values.dtype in (x.dtype, torch.int8):
        return None
    return f"needs values in x's type or int8, got {values.dtype} values and {x.dtype} x"


def rejects_wgmma(
    kernel: str, x: Tensor, values: Tensor, positions: Tensor, group_size: int | None = None
) -> str | None:
    """Why `cuda.wgmma` cannot run: it copies whole stages, 16 bytes at a time; the others have a way without.

    group_size: of scaled values.
    """
    if kernel != "wgmma":
        return None
    k = x.shape[-1]
    if k % WGMMA_COLUMNS or not k:
        return f"needs K in multiples of {WGMMA_COLUMNS}, got K={k}"
    if x.data_ptr() % 16 or values.data_ptr() % 16 or positions.data_ptr() % 16:
        return "needs x and weights at multiples of 16 bytes"
    return None if group_size is None else _cuda.rejects_groups(group_size, k, WGMMA_GROUP)
