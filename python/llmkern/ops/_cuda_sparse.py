"""What the CUDA rows of the sparse ops share: which kernel suits how many rows of x, its sizes, and what it lacks."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.ops import _cuda

TILE_ROWS = 128  # of w in a block of `cuda.mma`
PART_COLUMNS = 16  # csrc/cuda/sparse/kept.h

MASK_CHUNK = 64  # csrc/cuda/bitmask_linear/masked_rows.h


def best(m: int) -> str:
    """The kernel for m rows of x: weights are streamed while two tiles of 8 rows of x hold them all."""
    return "stream" if m <= 16 else "mma"


def stream_plan(gpu: _cuda.Gpu, m: int, n: int, k: int, chunk: int, *, large: int) -> _cuda.Plan:
    """Sizes of `cuda.stream`. chunk: columns that a warp takes at a time; large: tiles of rows where x takes two."""
    row_tiles, token_tiles = (large, 2) if m > 8 else (2 if m > 1 else 1, 1)
    blocks = -(-n // (16 * row_tiles)) * -(-m // (8 * token_tiles))
    wanted = gpu.multiprocessors * (2 if row_tiles == 1 else 1)
    return _cuda.Plan(row_tiles, token_tiles, _splits(gpu, blocks, wanted, -(-k // (chunk * _cuda.STREAM_WARPS))))


def tile_plan(gpu: _cuda.Gpu, m: int, n: int, k: int, chunk: int) -> _cuda.Plan:
    """Sizes of `cuda.mma`: 32, 64 or 128 rows of x in a block, and K divided until the GPU is full."""
    token_tiles = 4 if m <= 32 else 8 if m <= 64 else 16
    blocks = -(-n // TILE_ROWS) * -(-m // (8 * token_tiles))
    return _cuda.Plan(TILE_ROWS // 16, token_tiles, _splits(gpu, blocks, gpu.multiprocessors, k // (4 * chunk)))


def mask_plan(gpu: _cuda.Gpu, kernel: str, m: int, n: int, k: int) -> _cuda.Plan:
    """Sizes of the kernels of bitmask_linear, whose warps take 16 rows of w each."""
    if kernel == "stream":
        token_tiles = 2 if m > 8 else 1
        blocks = -(-n // 16) * -(-m // (8 * token_tiles))
        most = -(-k // (MASK_CHUNK * _cuda.STREAM_WARPS))
        return _cuda.Plan(1, token_tiles, _splits(gpu, blocks, 2 * gpu.multiprocessors, most))
    token_tiles = 8 if m <= 64 else 16
    blocks = -(-n // TILE_ROWS) * -(-m // (8 * token_tiles))
    return _cuda.Plan(TILE_ROWS // 16, token_tiles, _splits(gpu, blocks, gpu.multiprocessors, k // (4 * MASK_CHUNK)))


def _splits(gpu: _cuda.Gpu, blocks: int, wanted: int, most: int) -> int:
    """Blocks of a cluster that divide K: doubled while there are fewer blocks than wanted and K has enough for more."""
    splits = 1
    while gpu.capability >= (9, 0) and splits < 8 and blocks * splits < wanted and 2 * splits <= most:
        splits *= 2
    return splits


def rejects_values(values: Tensor, x: Tensor) -> str | None:
    """Why values of this type do not go with x: no product takes two types, and no rounding is silent."""
    if values.dtype in (x.dtype, torch.int8):
        return None
    return f"needs values in x's type or int8, got {values.dtype} values and {x.dtype} x"
