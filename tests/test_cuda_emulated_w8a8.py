"""The CUDA kernels that quantize x to int8, on this CPU (see test_cuda_emulated.py)."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
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
from llmkern.ops.int8_dynamic_linear.reference import quantize_rows

OP = "int8_dynamic_linear"
KERNELS = ("stream", "mma", "wgmma")
BUSY_GPU = _cuda.Gpu((8, 0), 1)  # any work keeps it busy: the largest tiles
CASES = [
    LinearCase(OP, 1, 1),
    LinearCase(OP, 7, 13, scale_dtype=BF16, symmetric=False),
    LinearCase(OP, 33, 75, scale_dtype=F16),
    LinearCase(OP, 17, 260, group_size=64, symmetric=False),
    LinearCase(OP, 40, 576, group_size=128, scale_dtype=BF16),
    LinearCase(OP, 40, 1056, group_size=192, symmetric=False),
    LinearCase(OP, 35, 2064, symmetric=False),
    LinearCase(OP, 24, 2064),
]


TILE_CASES = [
    LinearCase(OP, 1, 1),
    LinearCase(OP, 7, 13, scale_dtype=BF16, symmetric=False),
    LinearCase(OP, 130, 75, scale_dtype=F16),
    LinearCase(OP, 33, 260, group_size=64, symmetric=False),
    LinearCase(OP, 136, 576, group_size=128, scale_dtype=BF16),
    LinearCase(OP, 24, 1072, group_size=192, symmetric=False),
    LinearCase(OP, 129, 2064, symmetric=False),
    LinearCase(OP, 264, 400),
]
W4A8_CASES = [
    LinearCase(
        "int4_linear", n, k, group_size=group_size, scale_dtype=scale_dtype, symmetric=symmetric, extra=("int8",)
    )
    for n, k, group_size, scale_dtype, symmetric in (
        (1, 1, None, F32, True),
        (33, 75, None, F16, False),
        (20, 260, 128, F32, True),
        (40, 1056, 128, BF16, False),
        (24, 1056, 384, F32, True),
        (136, 544, None, F32, False),
    )
]
NIBBLE_CASES = [
    LinearCase("int4_linear", n, k, group_size=group_size, scale_dtype=scale_dtype, extra=("int8",))
    for n, k, group_size, scale_dtype in (
        (1, 128, None, F32),
        (130, 1152, 128, BF16),
        (40, 1280, 384, F16),
        (260, 1408, None, F32),
    )
]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_few_rows(emulated: ModuleType, case: LinearCase, dtype: torch.dtype, generator: torch.Generator) -> None:
    for at, m in enumerate((0, 1, 3, 8, 9, 16, 17)):
        x = torch.randn((m, case.k), generator=generator).to(dtype)
        x[:, -1] = 9  # the largest magnitude is what the last of a cluster's blocks finds
        bias = make_bias(case, generator, (F32, BF16, F16)[at % 3]) if at % 2 else None
        y = run(emulated, "stream", case, x, bias, OLD_GPU if at == 2 else GPU)
        testing.assert_within(y, *expected(case, x, bias), f"{case}, M={m}")


@pytest.mark.parametrize("kernel", KERNELS[1:])
@pytest.mark.parametrize("case", TILE_CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_more_rows(emulated: ModuleType, kernel: str, case: LinearCase, generator: torch.Generator) -> None:
    if kernel == "wgmma" and case.group_size and case.group_size % 128:
        case = replace(case, group_size=2 * case.group_size)  # which also ends within a block's share of K
    for at, m in enumerate((0, 1, 33, 65, 130)):
        x = torch.randn((m, case.k), generator=generator).to(BF16 if at % 2 else F16)
        bias = make_bias(case, generator, (F32, BF16, F16)[at % 3]) if at % 2 else None
        y = run(emulated, kernel, case, x, bias, OLD_GPU if at == 3 and kernel == "mma" else GPU)
        testing.assert_within(y, *expected(case, x, bias), f"{case}, M={m}")


@pytest.mark.parametrize("case", W4A8_CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_int4(
    emulated: ModuleType, case: LinearCase, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale of x per group, found in the kernel where a group is what four lanes have, else before it."""
    for at, (kernel, m) in enumerate(
        [*(("stream_int8", m) for m in (0, 1, 3, 8, 9, 17)), *(("mma_int8", m) for m in (1, 33, 70))]
    ):
        x = torch.randn((m, case.k), generator=generator).to(BF16 if at % 2 else F16)
        bias = make_bias(case, generator, (F32, BF16, F16)[at % 3]) if at % 2 else None
        y = run(emulated, kernel, case, x, bias, OLD_GPU if at == 2 else GPU)
        testing.assert_within(y, *expected(case, x, bias), f"{case}, {kernel}, M={m}")
    x = torch.randn((7, case.k), generator=generator).bfloat16()
    x[2] = torch.nan
    others = torch.arange(7) != 2
    for inside in (True, False):
        if not inside:
            monkeypatch.setattr(_cuda, "inside_aligned", lambda x, weight, k, row_bytes: False)
        y = run(emulated, "stream_int8", case, x, None)
        assert y[2].isnan().all()
        testing.assert_within(y[others], *expected(case, x[others], None), f"{case}, {inside=}")


@pytest.mark.parametrize("case", NIBBLE_CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_int4_with_products_of_a_warpgroup(emulated: ModuleType, case: LinearCase, generator: torch.Generator) -> None:
    """K divided and not: then two blocks share rows of x."""
    for at, (gpu, m) in enumerate(((GPU, 0), (GPU, 1), (GPU, 70), (BUSY_GPU, 33), (BUSY_GPU, 300))):
        x = torch.randn((m, case.k), generator=generator).to(BF16 if at % 2 else F16)
        bias = make_bias(case, generator, (F32, BF16, F16)[at % 3]) if at % 2 else None
        y = run(emulated, "wgmma_int8", case, x, bias, gpu)
        testing.assert_within(y, *expected(case, x, bias), f"{case}, M={m}")
    x = torch.randn((7, case.k), generator=generator).bfloat16()
    x[2] = torch.nan
    assert run(emulated, "wgmma_int8", case, x, None).isnan().any(1).tolist() == [row == 2 for row in range(7)]


@pytest.mark.parametrize(("code", "value"), [(0, -8), (0x77777777, -1), (-1, 7)])
def test_the_largest_sums(emulated: ModuleType, code: int, value: int) -> None:
    """As many steps as sums are kept for, with the largest codes of x: what a float's fraction has room for."""
    k = 1024
    op = importlib.import_module("llmkern.ops.int4_linear")
    words, x = torch.full((3, k // 8), code, dtype=torch.int32), torch.ones((2, k), dtype=BF16)
    x[1] = -1
    function = emulated.int4_linear.wgmma_int8
    y = op.cuda("wgmma_int8", function, BUSY_GPU, x, words, torch.ones(3, 1), None, None, k, "int8")
    assert torch.equal(y, torch.tensor([[value * k], [-value * k]]).to(BF16).expand(2, 3))


def test_int4_refusals() -> None:
    op = importlib.import_module("llmkern.ops.int4_linear")
    for case, wanted in (
        (LinearCase("int4_linear", 3, 256, symmetric=False, extra=("int8",)), "needs weights without zeros"),
        (LinearCase("int4_linear", 3, 96, extra=("int8",)), "needs K in multiples of 128, got K=96"),
        (LinearCase("int4_linear", 3, 256, extra=("int8",)), None),
    ):
        x = torch.zeros((2, case.k), dtype=BF16)
        assert op.cuda_rejects("wgmma_int8", *case.args(x, None)) == wanted
        assert op.cuda_rejects("mma_int8", *case.args(x, None)) is None
    assert _cuda.integer_yields("wgmma_int8", GPU, 17) is None
    assert _cuda.integer_yields("wgmma_int8", GPU, 16) == "leaves 16 rows of x to cuda.stream_int8"
    assert _cuda.integer_yields("mma_int8", GPU, 17) is None


def raw(emulated: ModuleType, kernel: str, x: Tensor, codes: Tensor, scales: Tensor, gpu: Any = GPU) -> Tensor:
    """The op on tensors, symmetric and with a scale per row."""
    op = importlib.import_module(f"llmkern.ops.{OP}")
    return op.cuda(kernel, getattr(getattr(emulated, OP), kernel), gpu, x, codes, scales, None, None, codes.shape[1])


def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantize x in a kernel of its own, whatever its size."""
    monkeypatch.setattr(_cuda, "quantizes_inside", lambda m, k: False)


@pytest.mark.usefixtures("poisoned")
def test_few_rows_quantized_before(
    emulated: ModuleType, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside(monkeypatch)
    for case in CASES[4:]:
        for m in (1, 7):
            x = torch.randn((m, case.k), generator=generator).bfloat16()
            y = run(emulated, "stream", case, x, None)
            testing.assert_within(y, *expected(case, x, None), f"{case}, M={m}")


@pytest.mark.usefixtures("poisoned")
def test_every_tile(emulated: ModuleType, generator: torch.Generator) -> None:
    """The largest tiles, and more tiles of rows of x than take turns."""
    wide, many = LinearCase(OP, 260, 272, symmetric=False), LinearCase(OP, 136, 16)
    long = LinearCase(OP, 60, 1040, symmetric=False)  # in a pair of blocks, one without rows; more steps than wait
    for kernel, case, m, gpu in (
        ("mma", wide, 150, BUSY_GPU), ("mma", many, 580, OLD_GPU), ("wgmma", wide, 150, BUSY_GPU),
        ("wgmma", many, 110, GPU), ("wgmma", long, 300, BUSY_GPU),
    ):  # fmt: skip
        x, bias = torch.randn((m, case.k), generator=generator).bfloat16(), make_bias(case, generator)
        y = run(emulated, kernel, case, x, bias, gpu)
        testing.assert_within(y, *expected(case, x, bias), f"{case}, M={m}")


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("way", ["inside", "before", *KERNELS[1:]])
@pytest.mark.usefixtures("poisoned")
def test_codes_are_the_references(
    emulated: ModuleType, way: str, dtype: torch.dtype, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of ones on the diagonal shows every code and scale: equal bit by bit, ties and all."""
    if way == "before":
        outside(monkeypatch)
    k = 144
    x = torch.randn((8, k), generator=generator) * torch.logspace(-3, 3, 8)[:, None]
    x[0], x[1] = 0.0, -3.25
    x[2] = torch.arange(k) % 128 - 63.5  # codes with halves
    x[2, 0] = 127.0
    x[3] = torch.randint(1, 256, (k,), generator=generator) / 2  # halves, of steps that are none of x's
    x = x.to(dtype)
    codes, x_scales = quantize_rows(x, k)
    kernel = way if way in KERNELS else "stream"
    y = raw(emulated, kernel, x, torch.eye(k, dtype=torch.int8), torch.ones(k, 1))
    assert torch.equal(y, (codes * x_scales).to(dtype))


@pytest.mark.parametrize("way", ["inside", "before", *KERNELS[1:]])
def test_what_is_not_finite_stays_in_its_row(
    emulated: ModuleType, way: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "before":
        outside(monkeypatch)
    for dtype in (BF16, F16):
        for case in (LinearCase(OP, 20, 320, group_size=128, symmetric=False), LinearCase(OP, 20, 144)):
            x = torch.randn((7, case.k), generator=generator).to(dtype)
            x[1, 9], x[3, 140], x[6, 3] = torch.nan, torch.inf, -torch.inf
            y = run(emulated, way if way in KERNELS else "stream", case, x, None)
            assert y[[1, 3, 6]].isnan().all()
            testing.assert_within(y[[0, 2, 4, 5]], *expected(case, x[[0, 2, 4, 5]], None), f"{case}")


def test_choice() -> None:
    """Where few rows stream, they quantize x themselves as long as reading it twice costs less than a launch."""
    assert [_cuda.best_integer(OLD_GPU, m) for m in (1, 16)] == ["stream", "stream"]
    assert [_cuda.best_integer(GPU, m) for m in (1, 16, 17)] == ["wgmma"] * 3
    assert _cuda.best_integer(OLD_GPU, 17) == "mma"
    assert _cuda.quantizes_inside(8, 4096)
    assert not _cuda.quantizes_inside(9, 256)
    assert not _cuda.quantizes_inside(8, 14336)
    for m, (n, k), groups in itertools.product(
        (17, 33, 65, 97, 130, 193, 257, 4096), ((33, 75), (4096, 4096), (14336, 4096), (4096, 14336)), (1, 8)
    ):
        for kernel in KERNELS[1:]:
            plan = _cuda.integer_tile_plan(GPU, kernel, m, n, k, groups)
            blocks = -(-n // (16 * plan.row_tiles)) * -(-m // (8 * plan.token_tiles))
            assert plan.splits == 1 or blocks * plan.splits <= GPU.multiprocessors
            assert groups == 1 or plan.token_tiles <= 12
        assert _cuda.integer_tile_plan(OLD_GPU, "mma", m, n, k, groups).splits == 1


def test_a_later_kernel_is_no_reason_to_run_none() -> None:
    """Rows yield to rows that come after them only: one that came before and was passed over has refused."""
    assert not _cuda.integer_yields("wgmma", GPU, 16)
    assert _cuda.integer_yields("mma", GPU, 16)
    assert not _cuda.integer_yields("stream", GPU, 16)
    assert not _cuda.integer_yields("mma", GPU, 4096)
    assert not _cuda.integer_yields("stream", OLD_GPU, 4096)
