"""What the CUDA rows of the sparse ops share: which kernel suits how many rows of x, its sizes, and what it lacks."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from llmkern.ops import _cuda

TILE_ROWS = 128  # of w in a block of `cuda.mma`
PART_COLUMNS = 16  # csrc/cuda/sparse/kept.h

MASK_CHUNK = 64  # csrc/cuda/bitmask_linear/masked_rows.h


def best(gpu: _cuda.Gpu, m: int, *, wgmma: bool) -> str:
    """The kernel for m rows of x; wgmma: whether the op has that one.

    Up to 16 rows every weight is used in one or two products as soon as it arrives. Up to 64 the products of a warp
    suffice, of which sparse ones do twice the work of dense ones.
    """
    if m <= 16:
        return "stream"
    return "wgmma" if wgmma and gpu.capability[0] == 9 and m > 64 else "mma"


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
    else:
        row_tiles, wanted, most = TILE_ROWS // 16, gpu.multiprocessors, k // (4 * chunk)
        token_tiles = 16 if m > 64 else 4 if m <= 32 and kernel == "mma" else 8
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


def rejects_alignment(kernel: str, x: Tensor, values: Tensor, positions: Tensor, multiple: int) -> str | None:
    """Why `cuda.wgmma` cannot run: its x goes to shared memory 8 bytes at a time; the others have a way without."""
    if kernel != "wgmma":
        return None
    if x.shape[-1] % multiple:
        return f"needs K in multiples of {multiple}, got K={x.shape[-1]}"
    if x.data_ptr() % 16 or values.data_ptr() % 16 or positions.data_ptr() % 4:
        return "needs x and weights at multiples of 16 bytes"
    return None
