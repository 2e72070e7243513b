"""What the CUDA rows share: what a GPU lacks, which kernel and which sizes suit it, and the pointers of a call.

Kernels read the canonical layout of packed weights, so a weight on a GPU is the same tensors as anywhere, once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import _features
from llmkern._registry import Op
from llmkern.ops._linear import DTYPE_CODES

HALVES = (torch.bfloat16, torch.float16)
# Of the rows; which of them runs, `best` says.
ORDER = ("wgmma", "mma", "ring", "stream", "wgmma_int8", "mma_int8", "stream_int8", "block")
OLDEST = dict.fromkeys(ORDER, (8, 0)) | dict.fromkeys(("wgmma", "ring", "wgmma_int8"), (9, 0))  # compute capability
STREAM_WARPS = 8  # csrc/cuda/linear/stream.h
RING_MAJORS = (9, 10)  # with shared memory of 227 KB for a block, and clusters
WGMMA_SPLITS = (1, 2, 3, 4, 6, 8)  # others leave as many multiprocessors over
WGMMA_TOKEN_TILES = {16: (4, 6, 8, 10, 12, 16), 8: (8, 16, 32)}  # by row tiles, csrc/cuda/linear/launch_wgmma.h


class Gpu(NamedTuple):
    """What the choice of a kernel depends on."""

    capability: tuple[int, int]
    multiprocessors: int


class Plan(NamedTuple):
    """Sizes of a launch: tiles of 16 rows of w and of 8 rows of x in a block; blocks that divide K (a cluster)."""

    row_tiles: int
    token_tiles: int
    splits: int


@lru_cache
def gpu_of(index: int) -> Gpu:
    """The GPU of this number."""
    found = torch.cuda.get_device_properties(index)
    return Gpu((found.major, found.minor), found.multi_processor_count)


def device_of(x: Tensor) -> Gpu:
    """The GPU that x is on."""
    return gpu_of(x.device.index)


@lru_cache
def lacking(kernel: str) -> str:
    """Why no GPU here can run this kernel; empty if one can."""
    if not torch.cuda.is_available():
        return "this machine has no CUDA device that torch can use"
    refusals = [_refused(kernel, gpu_of(i)) for i in range(torch.cuda.device_count())]
    return "" if "" in refusals else refusals[0]


def _refused(kernel: str, gpu: Gpu) -> str:
    """Why this GPU cannot run the kernel; empty if it can."""
    major, minor = OLDEST[kernel]
    if kernel.startswith("wgmma") and gpu.capability[0] != 9:
        return f"needs compute capability 9.0, got {_name(gpu)}"
    if kernel == "ring" and gpu.capability[0] not in RING_MAJORS:
        return f"needs 227 KB of shared memory in a block and clusters, which capability {_name(gpu)} lacks"
    if gpu.capability < (major, minor):
        return f"needs compute capability {major}.{minor} or newer, got {_name(gpu)}"
    return ""


@lru_cache(4096)
def stream_plan(gpu: Gpu, m: int, n: int, k: int, lane_columns: int) -> Plan:
    """Sizes of `cuda.stream`. lane_columns: columns of K in 16 bytes of w (32 for int4, 16 for int8).

    More rows of w in a block read x less often, fewer give more blocks. K is divided until every multiprocessor has
    two small blocks or a large one, as long as each warp has a chunk.
    """
    bits = 128 // lane_columns
    row_tiles = 4 if m > 8 else 2 if m > 8 // bits else 1
    token_tiles = 2 if m > 8 else 1
    blocks = _blocks(n, row_tiles) * -(-m // (8 * token_tiles))
    wanted = gpu.multiprocessors * (2 if row_tiles == 1 else 1)
    return Plan(row_tiles, token_tiles, cluster(gpu, blocks, wanted, k // (STREAM_WARPS * 4 * lane_columns)))


def mma_plan(gpu: Gpu, m: int, n: int, k: int) -> Plan:
    """Sizes of `cuda.mma`: 64 rows of w by 32 of x, or 128 by 64 (csrc/cuda/linear/launch_mma.h).

    Small blocks where x has no more rows, or where nothing else gives every multiprocessor a block: there are no
    clusters before 9.0. Rows of x are divided evenly, so that a row more than a block takes is not a block more for it.
    """
    row_tiles, most, columns = 8, 8, 64
    if m <= 32 or (gpu.capability < (9, 0) and _blocks(n, 8) * -(-m // 64) < gpu.multiprocessors):
        row_tiles, most, columns = 4, 4, 128
    token_blocks = -(-m // (8 * most))
    token_tiles = -(-m // (8 * token_blocks))
    blocks = _blocks(n, row_tiles) * token_blocks
    # Small blocks ask for little at a time: two for each multiprocessor.
    return Plan(row_tiles, token_tiles, _idle(gpu, blocks if row_tiles == 8 else blocks // 2, k // (4 * columns)))


def wgmma_plan(gpu: Gpu, m: int, n: int, k: int, lane_columns: int) -> Plan:
    """Sizes of `cuda.wgmma`: those that need the fewest clocks, see `_wgmma_clocks`.

    Blocks of 256 rows of w, or of 128 where there are not enough of the others; the smallest for the rows of x where
    one block takes them all, so that a row more costs a little more. From 129 rows of x on, 128 rows of w by 256 of x
    too, whose weights are decoded half as often.
    """
    plans = []
    for row_tiles, all_tiles in WGMMA_TOKEN_TILES.items():
        enough = next((tiles for tiles in all_tiles if m <= 8 * tiles), all_tiles[-1])
        for tiles in all_tiles:
            if tiles == enough or (m > 128 and tiles >= 8):
                parts = (1,) if tiles > 16 else WGMMA_SPLITS
                plans += [Plan(row_tiles, tiles, splits) for splits in parts if splits == 1 or 256 * splits <= k]
    return min(plans, key=lambda plan: _wgmma_clocks(gpu, plan, m, n, k, 1024 // lane_columns))


def _wgmma_clocks(gpu: Gpu, plan: Plan, m: int, n: int, k: int, row_bytes: int) -> float:
    """About how long `cuda.wgmma` takes. row_bytes: of 64 columns of a row of w.

    A stage of 64 columns waits for the tensor cores (2048 products in a clock, and a little of what decodes for them),
    the instructions that decode it, one warp's chain of decoding and multiplying, or L2, which gives every
    multiprocessor 24 bytes in a clock, and a few of them up to 40; with more than 128 rows of x two blocks share them.
    Blocks that divide K pass all sums through shared memory, to and fro.
    """
    pair = 2 if plan.token_tiles > 16 else 1
    rows, tokens = 16 * plan.row_tiles, 8 * plan.token_tiles
    tiles = -(-n // (pair * rows)) * -(-m // tokens)
    room = active_clusters(gpu, pair * plan.splits)
    busy = min(tiles, room) * pair * plan.splits
    received = min(40.0, 24.0 * gpu.multiprocessors / busy)
    came = 128 * tokens / pair + row_bytes * rows
    decoding = rows * (2.6 + row_bytes / 56)
    stage = max(rows * tokens / 32 + decoding / 10, decoding, 650, came / received)
    end = 500 + rows * tokens * (1 / 4 if plan.splits > 1 else 1 / 16) + (1500 if plan.splits > 1 else 0)
    return -(-tiles // room) * (-(-k // (64 * plan.splits)) * stage + end)


def _blocks(n: int, row_tiles: int) -> int:
    return -(-n // (16 * row_tiles))


def active_clusters(gpu: Gpu, blocks: int) -> int:
    """How many clusters of so many blocks run at once, one block to a multiprocessor. A cluster is within a GPC, whose
    number of them is no multiple of 4: on an H200 66 clusters of 2, 30 of 4, 15 of 8 (cudaOccupancyMaxActiveClusters).
    """
    return max(1, gpu.multiprocessors * (132 if blocks <= 2 else 120) // 132 // blocks)


def cluster(gpu: Gpu, blocks: int, wanted: int, most: int) -> int:
    """Blocks of a cluster that divide K: doubled while there are fewer blocks than wanted and K has parts for more, as
    long as all clusters run at once.
    """
    splits = 1
    while (
        gpu.capability >= (9, 0)
        and splits < 8
        and blocks * splits < wanted
        and 2 * splits <= most
        and blocks <= active_clusters(gpu, 2 * splits)
    ):
        splits *= 2
    return splits


def _idle(gpu: Gpu, blocks: int, most: int) -> int:
    """The same while at least half of the multiprocessors have no block."""
    return cluster(gpu, blocks, gpu.multiprocessors // 2 + 1, most)


@lru_cache(4096)
def codes_plan(kernel: str, gpu: Gpu, m: int, n: int, k: int, lane_columns: int) -> Plan:
    """Sizes for int4 and int8 weights with x kept, see `stream_plan`."""
    m = max(m, 1)
    if kernel == "stream":
        return stream_plan(gpu, m, n, k, lane_columns)
    return mma_plan(gpu, m, n, k) if kernel == "mma" else wgmma_plan(gpu, m, n, k, lane_columns)


def _name(gpu: Gpu) -> str:
    return f"{gpu.capability[0]}.{gpu.capability[1]}"


def best(gpu: Gpu, m: int, n: int, k: int) -> str:
    """Which kernel suits a product with M rows of x kept as they are and int4 or int8 weights.

    Up to 16 rows every weight is used in one product as soon as it arrives. From there on products of a warpgroup are
    needed to keep up with memory, where there are any: they take 64 rows of x in the time of reading int4 weights.
    """
    if m <= 16:
        return "ring" if gpu.capability[0] in RING_MAJORS else "stream"
    return "wgmma" if gpu.capability[0] == 9 else "mma"


def best_integer(gpu: Gpu, m: int) -> str:
    """Which kernel suits a product with M rows of x quantized to int8.

    Products of a warpgroup, where there are any, read weights as fast as anything else does.
    """
    if gpu.capability[0] == 9:
        return "wgmma"
    return "stream" if m <= 16 else "mma"


def yields(kernel: str, gpu: Gpu, m: int, n: int, k: int) -> str | None:
    """Why `kernel` leaves a product with x kept to a later row."""
    return leaves_to(best(gpu, m, n, k), kernel, m)


def integer_yields(kernel: str, gpu: Gpu, m: int) -> str | None:
    """Why `kernel` leaves a product with quantized x to a later row."""
    few = "stream" if m <= 16 else "mma"
    if kernel.endswith("_int8"):
        # Codes that have to become bytes first: as they come, where rows of x are few.
        return leaves_to(f"{'stream' if m <= 16 else best_integer(gpu, m)}_int8", kernel, m)
    return leaves_to(best_integer(gpu, m) if kernel == "wgmma" else few, kernel, m)


def leaves_to(better: str, kernel: str, m: int) -> str | None:
    """Why `kernel` leaves m rows of x to a later row; to an earlier one, which did not run, it cannot."""
    if ORDER.index(better) <= ORDER.index(kernel):
        return None
    return f"leaves {m} rows of x to cuda.{better}"


@lru_cache(4096)
def integer_tile_plan(gpu: Gpu, kernel: str, m: int, n: int, k: int, groups: int) -> Plan:
    """Sizes of `cuda.mma` and `cuda.wgmma` with quantized x: 128 rows of w and as many rows of x as can be kept busy.

    With several groups per row the sums of a group and those of the row wait in registers, which leaves fewer for rows
    of x. `cuda.wgmma` divides them evenly among blocks, so that a row too many costs no whole block.
    """
    rows = -(-n // 128)
    if kernel == "wgmma" and groups == 1:
        # csrc/cuda/linear/integer_copied.h: 256 rows of w, or 128 by 256 rows of x where those are enough blocks.
        if m > 128 and rows * -(-m // 256) >= gpu.multiprocessors * 3 // 4:
            return Plan(8, 32, 1)
        # Small tiles while all run at once.
        token_blocks = -(-m // 64) if m > 64 and _blocks(n, 16) * -(-m // 64) <= gpu.multiprocessors else -(-m // 128)
        token_tiles = next(tiles for tiles in (4, 8, 12, 16) if m <= 8 * tiles * token_blocks)
        return Plan(16, token_tiles, _idle(gpu, _blocks(n, 16) * token_blocks, k // 512))
    if kernel == "wgmma":
        token_blocks = -(-m // 96)
        token_tiles = next(tiles for tiles in (4, 8, 12) if m <= 8 * tiles * token_blocks)
    else:
        token_tiles = 4 if m <= 32 else 8 if groups > 1 or rows * -(-m // 128) < gpu.multiprocessors else 16
    blocks = rows * -(-m // (8 * token_tiles))
    return Plan(8, token_tiles, _idle(gpu, blocks, k // 512))


@lru_cache(4096)
def nibble_plan(gpu: Gpu, m: int, n: int, k: int) -> Plan:
    """Sizes of `cuda.wgmma_int8` (csrc/cuda/linear/integer_nibbles.h): 128 rows of w by 64 or 128 of x."""
    token_tiles = 8 if m <= 64 or _blocks(n, 8) * -(-m // 128) <= gpu.multiprocessors // 2 else 16
    return Plan(8, token_tiles, _idle(gpu, _blocks(n, 8) * -(-m // (8 * token_tiles)), k // 512))


def quantizes_inside(m: int, k: int) -> bool:
    """Whether `cuda.stream` quantizes x itself rather than after a kernel that does.

    Every block then reads all of its rows of x once more, for which half of what a launch costs is the measure.
    """
    return m <= 8 and m * k <= 32768


def integer_workspace(x: Tensor, m: int, k: int, x_groups: int, groups: int) -> Tensor:
    """Room for x [M, K] as int8 in rows of a multiple of 64, its scales [M, x_groups] and sums [M, groups].

    From torch's allocator, so that a CUDA graph that is being captured owns it: csrc/cuda/linear/integer.h fills it.
    """
    return x.new_empty(m * (-(-k // 64) * 64 + 4 * (x_groups + groups)), dtype=torch.uint8)


def inside_aligned(x: Tensor, weight: Tensor, k: int, row_bytes: int) -> bool:
    """Whether rows of x [..., K] and of the weight start at multiples of 16 bytes, which `quantizes_inside` needs."""
    whole = k % 8 == 0 and row_bytes % 16 == 0
    return whole and x.is_contiguous() and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0


def rejects_groups(group_size: int, k: int, multiple: int) -> str | None:
    """Why a kernel cannot run whose scales are those of `multiple` neighbouring columns."""
    if group_size < k and group_size % multiple:
        return f"needs groups of a multiple of {multiple} columns or one per row, got group_size={group_size}"
    return None


def add_rows(
    op: Op, call: Callable[..., Any], rejects: Callable[..., str | None] | None = None,
    yields: Callable[..., str | None] | None = None, *, dtypes: tuple[torch.dtype, ...] = HALVES,
) -> None:  # fmt: skip
    """One row per CUDA kernel of this op that is built.

    `call(kernel, function, gpu, x, ...)` runs the native `function`; `rejects(kernel, x, ...)` is asked first, and
    `yields(kernel, gpu, x, ...)` whether a later row suits it better. dtypes: those of x that its kernels take.
    """
    if _features.cuda is None:
        op.kernel("cuda.native", "cuda", reason=_features.cuda_error)(call)
        return
    built = getattr(_features.cuda, op.name)
    for kernel in ORDER:
        if function := getattr(built, kernel, None):
            op.kernel(
                f"cuda.{kernel}", "cuda", lacking=partial(lacking, kernel),
                rejects=partial(_rejects, rejects, dtypes, kernel),
                yields=partial(_yields, yields, kernel) if yields else None,
            )(partial(_run, call, kernel, function))  # fmt: skip


def _rejects(
    more: Callable[..., str | None] | None, dtypes: tuple[torch.dtype, ...], kernel: str, x: Tensor, *args: Any
) -> str | None:
    if reason := _refused(kernel, device_of(x)):
        return reason
    if x.dtype not in dtypes:
        return f"needs {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} x, got {x.dtype}"
    return more(kernel, x, *args) if more else None


def _yields(more: Callable[..., str | None], kernel: str, x: Tensor, *args: Any) -> str | None:
    return more(kernel, device_of(x), x, *args)


def _run(call: Callable[..., Any], kernel: str, function: Callable[..., None], x: Tensor, *args: Any) -> Any:
    return call(kernel, function, device_of(x), x, *args)


def call(function: Callable[..., None], on: Tensor, *args: Any) -> None:
    """`function(*args, stream)` with the current stream of the device that `on` is on."""
    stream = torch.cuda.current_stream(on.device).cuda_stream if on.is_cuda else 0
    with torch.cuda.device_of(on):  # launches go to the current device; nothing to do for an emulated one
        function(*args, stream)


def cuda_call(
    function: Callable[..., None], plan: Plan, x: Tensor, n: int, bias: Tensor | None, *weight: Any
) -> Tensor:
    """Call a native linear kernel: `function(x, bias, y, m, n, k, stream, plan, *weight)` on the current stream.

    As `_linear.native_call`, whose `weight` it takes. Nothing waits; a launch that fails is a RuntimeError.
    """
    rows = x.contiguous()
    bias_at = bias_dtype = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_at, bias_dtype = bias.data_ptr(), DTYPE_CODES[bias.dtype]
    y = x.new_empty(*x.shape[:-1], n)
    if size := y.numel():
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        with torch.cuda.device_of(x):  # launches go to the current device; nothing to do for an emulated one
            function(
                rows.data_ptr(), DTYPE_CODES[x.dtype], bias_at, bias_dtype, y.data_ptr(), size // n, n, x.shape[-1],
                stream, *plan, *weight,
            )  # fmt: skip
    return y
