"""The CUDA kernels for many rows of x on this CPU (see test_cuda_emulated.py), and which kernel suits which sizes."""

from __future__ import annotations

import ctypes
import importlib
import mmap
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, LinearCase
from emulation import GPU, OLD_GPU, run
from test_ops import expected, make_bias
from torch import Tensor

from llmkern import testing
from llmkern.ops import _cuda
from llmkern.ops._cuda import Gpu, Plan

OPS = ("int4_linear", "int8_linear")
# Every instance, with as many rows of x as it takes and with fewer; clusters of two to eight blocks.
PLANS = {
    "mma": [Plan(4, 4, 1), Plan(4, 3, 2), Plan(4, 1, 4), Plan(8, 8, 1), Plan(8, 5, 2), Plan(8, 6, 1), Plan(8, 7, 2)],
    "wgmma": [
        Plan(8, 8, 1),
        Plan(8, 8, 4),
        Plan(8, 16, 2),
        Plan(8, 32, 1),
        Plan(16, 4, 1),
        Plan(16, 6, 2),
        Plan(16, 8, 8),
        Plan(16, 10, 3),
        Plan(16, 12, 4),
        Plan(16, 16, 1),
        Plan(16, 16, 6),
        Plan(8, 32, 1),
    ],
}
KERNELS = tuple(PLANS)
by_dtype = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
by_kernel = pytest.mark.parametrize("kernel", KERNELS)
by_op = pytest.mark.parametrize("op", OPS)


def codes_cases(op: str) -> list[LinearCase]:
    """Odd sizes; rows that are and are not aligned; groups of a part of a stage, of a stage and of more; short ends."""
    return [
        LinearCase(op, 130, 75, group_size=32, scale_dtype=F16, symmetric=False),
        LinearCase(op, 131, 260, group_size=64, symmetric=False),
        LinearCase(op, 65, 352, group_size=96, scale_dtype=BF16, symmetric=False),
        LinearCase(op, 66, 1184, group_size=128, scale_dtype=BF16),
        LinearCase(op, 258, 544, symmetric=False),
        LinearCase(op, 1, 1),
    ]


@by_dtype
@by_kernel
@by_op
@pytest.mark.usefixtures("poisoned")
def test_every_instance(
    emulated: ModuleType, op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for at, plan in enumerate(PLANS[kernel]):
        monkeypatch.setattr(_cuda, "codes_plan", lambda *_, plan=plan, **__: plan)
        for case in codes_cases(op)[at % 2 :: 2]:
            m = 8 * plan.token_tiles + (1 if at % 2 else -3)
            x = torch.randn((m, case.k), generator=generator).to(dtype)
            bias = make_bias(case, generator, (F32, BF16, F16)[at % 3]) if at % 2 else None
            y = run(emulated, kernel, case, x, bias)
            testing.assert_within(y, *expected(case, x, bias), f"{plan}, {case}, M={m}")


@by_op
@pytest.mark.usefixtures("poisoned")
def test_one_ring_for_several_tiles(
    emulated: ModuleType, op: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of `cuda.wgmma` go from tile to tile and round and round their stages, the last one of a half of K."""
    for group_size, k, m, plan in (
        (128, 1696, 130, Plan(16, 6, 1)),
        (32, 1120, 130, Plan(16, 6, 1)),
        (32, 480, 300, Plan(8, 32, 1)),
        (None, 2080, 130, Plan(16, 6, 1)),
    ):
        monkeypatch.setattr(_cuda, "codes_plan", lambda *_, plan=plan, **__: plan)
        case = LinearCase(op, 300, k, group_size=group_size, symmetric=k == 1696)
        x = torch.randn((m, k), generator=generator).to(BF16)
        y = run(emulated, "wgmma", case, x, None)
        testing.assert_within(y, *expected(case, x, None), f"{case}")


@pytest.mark.parametrize("m", [1, 17, 33, 64, 65, 100, 130, 257])
@by_op
@pytest.mark.usefixtures("poisoned")
def test_rows_of_x(emulated: ModuleType, op: str, m: int, generator: torch.Generator) -> None:
    """The sizes that the Python side chooses, clusters included."""
    for at, (kernel, gpu) in enumerate((("mma", OLD_GPU), ("mma", GPU), ("wgmma", GPU))):
        case = LinearCase(op, 40 + at, 1056, group_size=(32, 128, None)[at], symmetric=at == 1)
        x = torch.randn((m, case.k), generator=generator).to((BF16, F16)[(m + at) % 2])
        y = run(emulated, kernel, case, x, None, gpu)
        testing.assert_within(y, *expected(case, x, None), f"{kernel}, {case}, M={m}")


def shifted(tensor: Tensor) -> Tensor:
    """The same values, contiguous, from one element behind a multiple of 16 bytes on."""
    room = tensor.new_empty(tensor.numel() + 16 // tensor.element_size() + 1)
    first = (-room.data_ptr() % 16) // tensor.element_size() + 1
    copy = room[first : first + tensor.numel()].view(tensor.shape)
    copy.copy_(tensor)
    assert copy.is_contiguous()
    assert copy.data_ptr() % 16 == tensor.element_size()
    return copy


@by_kernel
@by_op
@pytest.mark.usefixtures("poisoned")
def test_unaligned_views(emulated: ModuleType, op: str, kernel: str, generator: torch.Generator) -> None:
    case = LinearCase(op, 34, 160, group_size=32)
    module = importlib.import_module(f"llmkern.ops.{op}")
    function = getattr(getattr(emulated, op), kernel)
    x = torch.randn((40, case.k), generator=generator).to(BF16)
    _, codes, *rest = case.args(x, None)
    whole = module.cuda(kernel, function, GPU, x, codes, *rest)
    testing.assert_within(whole, *expected(case, x, None), f"{case}")
    assert torch.equal(module.cuda(kernel, function, GPU, shifted(x), codes, *rest), whole)
    assert torch.equal(module.cuda(kernel, function, GPU, x, shifted(codes), *rest), whole)


@by_kernel
@by_op
def test_writes_nothing_but_y(emulated: ModuleType, op: str, kernel: str, generator: torch.Generator) -> None:
    for n in (129, 130):
        case = LinearCase(op, n, 96, group_size=32)
        x = torch.randn((65, case.k), generator=generator).to(BF16)
        y = run(emulated, kernel, case, x, None)
        margin = torch.full((4096,), 7.0, dtype=BF16)
        room = torch.cat([margin, torch.full_like(y, 7.0).flatten(), margin])
        _, codes, scales, _, _, group_size = case.args(x, None)[:6]
        getattr(getattr(emulated, op), kernel)(
            x.data_ptr(), 1, 0, 0, room[len(margin) :].data_ptr(), len(x), n, case.k, 0,
            *_cuda.codes_plan(kernel, GPU, len(x), n, case.k, 32), codes.data_ptr(), scales.data_ptr(), 0, 0,
            group_size,
        )  # fmt: skip
        assert torch.equal(room, torch.cat([margin, y.flatten(), margin]))


def before_a_wall(tensor: Tensor) -> Tensor:
    """The same values at the end of mapped memory: a read of the byte after the last one ends the process."""
    size = max(tensor.numel() * tensor.element_size(), 1)
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size).view(tensor.shape)
    return copy.copy_(tensor)


@by_kernel
@by_op
def test_reads_nothing_behind_its_tensors(
    emulated: ModuleType, op: str, kernel: str, generator: torch.Generator
) -> None:
    module = importlib.import_module(f"llmkern.ops.{op}")
    for n, k, group_size in ((3, 32, 32), (130, 96, 32), (129, 75, 64), (64, 136, None)):
        case = LinearCase(op, n, k, group_size=group_size, scale_dtype=BF16, symmetric=False)
        x = torch.randn((35, k), generator=generator).to(BF16)
        args = [
            before_a_wall(arg) if isinstance(arg, Tensor) else arg for arg in case.args(x, make_bias(case, generator))
        ]
        y = module.cuda(kernel, getattr(getattr(emulated, op), kernel), GPU, *args)
        testing.assert_within(y, *expected(case, x, args[4]), f"{case}")


@by_kernel
@by_op
def test_no_rows_of_x(emulated: ModuleType, op: str, kernel: str) -> None:
    assert run(emulated, kernel, LinearCase(op, 5, 64), torch.zeros((2, 0, 64), dtype=BF16), None).shape == (2, 0, 5)


@by_dtype
@by_kernel
@by_op
def test_scales_of_any_size(
    emulated: ModuleType, op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Scales that are subnormal in fp16, next to nothing, zero, or NaN: of the first group of a row, and of another."""
    k, sizes = 192, torch.tensor([1e-6, 1.0, 2e-6, 0.0, 1e-5, 1.0, 1.0, 1e-2])
    n = len(sizes)
    case = LinearCase(op, n, k, group_size=64)
    module = importlib.import_module(f"llmkern.ops.{op}")
    x = torch.randn((40, k), generator=generator).to(dtype)
    _, codes, _, *rest = case.args(x, None)
    scales = sizes[:, None] * torch.tensor([1.0, 0.3, 5.0])
    scales[3] = torch.tensor([0.0, 0.2, 0.1])
    scales[5] = torch.tensor([1e-3, 0.0, 1e-3])
    scales[6, 1] = torch.nan
    scales[7, 0] = 1e-10
    y = module.cuda(kernel, getattr(getattr(emulated, op), kernel), GPU, x, codes, scales, *rest).double()
    assert y[:, 6].isnan().all()
    w = (
        module.dequantize(codes, scales, None, 64, k)
        if op == "int4_linear"
        else module.dequantize(codes, scales, None, 64)
    )
    exact = x.double() @ w.double().T
    error = (y - exact).abs().amax(0)
    rounding = torch.finfo(dtype).eps * exact.abs().amax(0) + torch.finfo(dtype).smallest_normal * 1e-3
    assert (error <= rounding)[torch.arange(n) != 6].all(), (error / rounding).tolist()


GPUS = [Gpu(capability, 108) for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))]
SIZES = [(n, k) for n in (1, 100, 1024, 4096, 14336, 28672, 151936) for k in (1, 64, 1000, 4096, 14336)]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm_{gpu.capability[0]}{gpu.capability[1]}")
def test_every_size_has_a_kernel(gpu: Gpu) -> None:
    wgmma = {(rows, tiles) for rows, all_tiles in _cuda.WGMMA_TOKEN_TILES.items() for tiles in all_tiles}
    instances = {"wgmma": wgmma, "stream": {(1, 1), (2, 1), (4, 2)}}
    for n, k in SIZES:
        for m in (*range(1, 300), 1024, 4096, 100_000):
            kernel = _cuda.best(gpu, m, n, k)
            assert not _cuda._refused(kernel, gpu)
            for forced in {kernel, "stream", "mma"} - {"ring"}:  # whose sizes test_cuda_ring_plan.py has
                plan = _cuda.codes_plan(forced, gpu, m, n, k, 32)
                allowed = _cuda.WGMMA_SPLITS if forced == "wgmma" else (1, 2, 4, 8)
                assert plan.splits in (allowed if gpu.capability >= (9, 0) and plan.token_tiles <= 16 else (1,))
                if forced == "mma":
                    assert plan.row_tiles in (4, 8)
                    assert 1 <= plan.token_tiles <= plan.row_tiles
                else:
                    assert plan[:2] in instances[forced]


def work(gpu: Gpu, m: int, n: int, k: int) -> tuple[int, int]:
    """Of the chosen kernel: rows of x that products are done for, at half the rate without wgmma; and blocks."""
    kernel = _cuda.best(gpu, m, n, k)
    plan = _cuda.codes_plan(kernel, gpu, m, n, k, 32)
    token_blocks = -(-m // (8 * plan.token_tiles))
    rows = 8 * plan.token_tiles * token_blocks * (2 if gpu.capability[0] == 9 and kernel == "mma" else 1)
    return rows, token_blocks * -(-n // (16 * plan.row_tiles)) * plan.splits


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm_{gpu.capability[0]}{gpu.capability[1]}")
def test_one_more_row_of_x_costs_little(gpu: Gpu) -> None:
    """No size at which the products that are done, or the multiprocessors that are idle, jump."""
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)):
        for m in range(18, 1025):
            (before, blocks), (after, more) = work(gpu, m - 1, n, k), work(gpu, m, n, k)
            assert after <= max(1.35 * before, before + 16), (n, k, m, before, after)
            assert after <= max(1.5 * m, m + 40), (n, k, m, after)
            assert min(more, gpu.multiprocessors) >= 0.49 * min(blocks, gpu.multiprocessors), (n, k, m, blocks, more)


def test_large_products_leave_few_multiprocessors_idle() -> None:
    for n, k in ((4096, 14336), (6144, 4096), (14336, 4096), (28672, 4096)):
        for m in (1024, 2048, 4096):
            plan = _cuda.wgmma_plan(GPU, m, n, k, 32)
            blocks = plan.splits * -(-m // (8 * plan.token_tiles)) * -(-n // (16 * plan.row_tiles))
            done = -(-blocks // GPU.multiprocessors) * GPU.multiprocessors
            done *= 128 * plan.row_tiles * plan.token_tiles // plan.splits
            assert done <= 1.2 * m * n, (n, k, m, plan, done / (m * n))


def test_no_cluster_waits_for_another() -> None:
    """Blocks that divide K are all there at once: a cluster too many takes as long as all of them."""
    for n, k in ((14336, 4096), (4096, 14336), (4096, 4096), (6144, 4096)):
        for m in (17, 32, 64, 100, 128):
            plan = _cuda.wgmma_plan(GPU, m, n, k, 32)
            tiles = -(-n // (16 * plan.row_tiles)) * -(-m // (8 * plan.token_tiles))
            assert tiles <= _cuda.active_clusters(GPU, plan.splits), (n, k, m, plan)
            assert tiles * plan.splits > 0.65 * GPU.multiprocessors, (n, k, m, plan)


def test_rows_yield_only_to_later_ones() -> None:
    for m in (1, 16, 17, 32, 33, 4096):
        rows = _cuda.ORDER[: _cuda.ORDER.index("stream") + 1]  # those with x kept
        order = [kernel for kernel in rows if _cuda.yields(kernel, GPU, m, 4096, 4096) is None]
        assert order[0] == _cuda.best(GPU, m, 4096, 4096)
        assert order[-1] == "stream"
    assert _cuda.yields("wgmma", GPU, 12, 4096, 4096) == "leaves 12 rows of x to cuda.ring"
    assert _cuda.yields("mma", OLD_GPU, 12, 4096, 4096) == "leaves 12 rows of x to cuda.stream"


@by_op
def test_the_table_asks_which_row_suits_best(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of an op on a GPU that is not there: the first one that neither refuses nor yields."""
    module = importlib.import_module(f"llmkern.ops.{op}")
    case = LinearCase(op, 64, 64)
    for m, kernel in ((16, "ring"), (17, "wgmma"), (33, "wgmma")):
        args: tuple[Any, ...] = case.args(torch.zeros((m, 64), dtype=BF16), None)
        first = next(row for row in _cuda.ORDER if module.cuda_yields(row, GPU, *args) is None)
        assert first == kernel
