"""The CUDA kernels of the sparse ops on this CPU (see test_cuda_emulated.py), and which kernel suits which sizes."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, I8, LinearCase
from emulation import GPU, OLD_GPU, ROOT, run
from test_ops import expected, make_bias
from torch import Tensor

from llmkern import testing
from llmkern.ops import _cuda_ring, _cuda_sparse
from llmkern.ops._cuda import Gpu, Plan

OPS = ("sparse24_linear", "sparse24_int4_linear", "bitmask_linear")
ROWS_OF_X = {"stream": ((0, 1, 3, 8), (9, 16, 17)), "mma": ((17, 65), (1, 33)), "wgmma": ((65, 3), (130,))}


def kept_cases() -> list[LinearCase]:
    """One element, odd sizes, rows that are and are not aligned, groups of a part, a lane, a chunk and a row."""
    sizes = [(1, 1), (7, 13), (33, 75), (17, 260), (130, 144), (35, 576), (1, 1088)]
    floats = [LinearCase("sparse24_linear", n, k, value_dtype=dtype) for n, k in sizes for dtype in (BF16, F16)]
    scaled = [
        LinearCase(op, n, k, group_size=group, value_dtype=I8, scale_dtype=scale)
        for op in ("sparse24_linear", "sparse24_int4_linear")
        for n, k, group, scale in [
            (1, 1, None, F32),
            (7, 13, None, BF16),
            (33, 75, 32, F16),
            (17, 260, 48, F32),
            (1, 1088, 16, F32),
            (35, 576, 128, BF16),
            (18, 608, 64, F16),
            (24, 544, None, F32),
        ]
    ]
    return floats + scaled + stage_cases()


def stage_cases() -> list[LinearCase]:
    """Whole stages of `cuda.wgmma`: one and more than its ring holds, rows of two blocks, scales of all kinds."""
    floats = [
        LinearCase("sparse24_linear", n, k, value_dtype=dtype)
        for n, k in ((1, 128), (259, 640))
        for dtype in (BF16, F16)
    ]
    scaled = [
        LinearCase(op, n, k, group_size=group, value_dtype=I8, scale_dtype=scale)
        for op in ("sparse24_linear", "sparse24_int4_linear")
        for n, k, group, scale in [
            (3, 128, None, BF16),
            (260, 1280, 128, F32),
            (33, 768, 256, F16),
            (18, 640, 32, F32),
            (9, 384, 96, BF16),
        ]
    ]
    return floats + scaled


RING_CASES = [
    *(
        LinearCase("sparse24_linear", n, k, value_dtype=dtype)
        for n, k in ((16, 128), (48, 640), (160, 2048))
        for dtype in (BF16, F16)
    ),
    *(
        LinearCase("sparse24_int4_linear", n, k, group_size=group, value_dtype=I8, scale_dtype=scale)
        for n, k, group, scale in (
            (32, 128, None, BF16),
            (64, 640, 128, F32),
            (96, 768, 256, F16),
            (160, 2048, 128, BF16),
        )
    ),
]


def mask_cases() -> list[LinearCase]:
    """One element, nothing and everything kept, rows that are empty, full, or keep only their last column; groups."""
    op = "bitmask_linear"
    floats = [
        LinearCase(op, n, k, value_dtype=dtype, density=density)
        for n, k, density in ((1, 1, 1.0), (7, 13, 0.5), (33, 75, 0.0), (17, 260, 0.9), (20, 576, 0.5), (3, 1088, 0.4))
        for dtype in (BF16, F16)
    ]
    return [
        *floats,
        LinearCase(op, 1, 1, value_dtype=I8, density=1.0),
        LinearCase(op, 7, 13, group_size=3, value_dtype=I8, scale_dtype=BF16),
        LinearCase(op, 33, 75, group_size=1, value_dtype=I8),
        LinearCase(op, 33, 75, value_dtype=I8, scale_dtype=F16, density=1.0),
        LinearCase(op, 21, 576, group_size=128, value_dtype=I8),
        LinearCase(op, 19, 640, value_dtype=I8, scale_dtype=F16),
        *(LinearCase(op, 40, k, value_dtype=dtype, ragged=True) for k in (301, 320) for dtype in (BF16, F16)),
        LinearCase(op, 40, 301, value_dtype=I8, group_size=64, ragged=True),
        LinearCase(op, 130, 192, value_dtype=I8, group_size=20, ragged=True),
    ]


def on_wgmma(case: LinearCase) -> bool:
    return case.op != "bitmask_linear" and case.k % 128 == 0 and (case.group_size or 32) % 32 == 0


def runs() -> list[Any]:
    """Every case on every kernel that takes it, with each type of x that it takes; rows of x in turns."""
    found = []
    for at, case in enumerate(kept_cases() + mask_cases()):
        for dtype in (BF16, F16) if case.value_dtype == I8 else (case.value_dtype,):
            for kernel, rows in ROWS_OF_X.items():
                if kernel == "wgmma" and not on_wgmma(case):
                    continue
                kind = str(dtype).removeprefix("torch.")
                ms = rows[(at + (dtype == F16)) % 2]
                found.append(pytest.param(case, kernel, dtype, ms, id=f"{case.op}-{kernel}-{kind}-{case}"))
    return found


def check(y: Tensor, case: LinearCase, x: Tensor, bias: Tensor | None, what: str) -> None:
    """As every kernel, but where groups are small, weights are rounded to x's type: five sigma of that."""
    exact, tolerance = expected(case, x, bias)
    if case.value_dtype == I8 and case.group_size is not None and x.numel():
        size = (x.double() ** 2 @ case.weight().unpack(torch.float64).T ** 2).sqrt()
        tolerance = tolerance + 1.5 * torch.finfo(x.dtype).eps * size
    testing.assert_within(y, exact, tolerance, what)


@pytest.mark.parametrize(("case", "kernel", "dtype", "ms"), runs())
@pytest.mark.usefixtures("poisoned")
def test_values(
    emulated: ModuleType, case: LinearCase, kernel: str, dtype: torch.dtype, ms: tuple[int, ...],
    generator: torch.Generator,
) -> None:  # fmt: skip
    for at, m in enumerate(ms):
        x = torch.randn((m, case.k), generator=generator).to(dtype)
        bias = make_bias(case, generator, (F32, BF16, F16)[at % 3]) if at % 2 else None
        y = run(emulated, kernel, case, x, bias, OLD_GPU if at == 1 and kernel != "wgmma" else GPU)
        check(y, case, x, bias, f"{case}, M={m}")


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", RING_CASES, ids=lambda case: f"{case.op}-{case}")
@pytest.mark.usefixtures("poisoned")
def test_ring_values(
    emulated: ModuleType, case: LinearCase, dtype: torch.dtype, generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Groups of warps with tiles of their own, and clusters that divide K."""
    if case.value_dtype in (BF16, F16) and case.value_dtype != dtype:
        pytest.skip("values are in x's type")
    for at, m in enumerate((1, 3, 8, 9, 17)):
        x = torch.randn((m, case.k), generator=generator).to(dtype)
        bias = make_bias(case, generator, (F32, BF16, F16)[at % 3]) if at % 2 else None
        splits = [(1, split) for split in (2, 4) if 128 * split <= case.k]
        for groups, split in ((1, 1), (4, 1), *splits)[at % 2 :: 2]:
            plan = Plan(groups, 2 if m > 8 else 1, split)
            monkeypatch.setattr(_cuda_ring, "plan", lambda *_, plan=plan: plan)
            y = run(emulated, "ring", case, x, bias)
            testing.assert_within(y, *expected(case, x, bias), f"{case}, M={m}, {plan}")


@pytest.mark.parametrize("op", OPS)
def test_plans_of_every_instance(
    emulated: ModuleType, op: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes that the cases above leave out, and clusters."""
    case = LinearCase(op, 37, 640, value_dtype=I8 if op == "sparse24_int4_linear" else BF16, group_size=128)
    plans = {"stream": [Plan(1, 1, 4), Plan(2, 1, 2)], "mma": [Plan(8, 16, 2)]}
    plans["wgmma"] = [Plan(16, 8, 2), Plan(16, 16, 4), Plan(16, 8, 5), Plan(16, 16, 1), Plan(16, 16, 5)]
    if op == "bitmask_linear":
        plans = {"stream": [Plan(1, 2, 4)], "mma": [Plan(8, 8, 2), Plan(8, 16, 8)]}
    for kernel, found in plans.items():
        for plan in found:
            for name in ("kept_plan", "mask_plan"):
                monkeypatch.setattr(_cuda_sparse, name, lambda *_, plan=plan, **__: plan)
            x = torch.randn((11, case.k), generator=generator).bfloat16()
            check(run(emulated, kernel, case, x, None), case, x, None, f"{kernel}, {plan}")


@pytest.mark.parametrize("plan", [Plan(16, 8, 1), Plan(16, 16, 1)])
@pytest.mark.parametrize("op", OPS[:2])
def test_more_stages_than_wait_at_a_time(
    emulated: ModuleType, op: str, plan: Plan, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LinearCase(op, 37, 1536, value_dtype=I8 if op == "sparse24_int4_linear" else BF16)
    monkeypatch.setattr(_cuda_sparse, "kept_plan", lambda *_, **__: plan)
    x = torch.randn((11, case.k), generator=generator).bfloat16()
    check(run(emulated, "wgmma", case, x, None), case, x, None, f"{plan}")


@pytest.mark.parametrize("kernel", ["stream", "mma", "wgmma"])
@pytest.mark.parametrize("op", OPS)
def test_nan_stays_in_its_row(emulated: ModuleType, op: str, kernel: str, generator: torch.Generator) -> None:
    if (op, kernel) == ("bitmask_linear", "wgmma"):
        return
    for k in (144, 75) if kernel != "wgmma" else (256,):
        case = LinearCase(op, 19, k, value_dtype=I8)
        x = torch.randn((19, k), generator=generator).bfloat16()
        x[4], x[17, ::3] = torch.nan, torch.inf
        y = run(emulated, kernel, case, x, None)
        sound = [row for row in range(19) if row not in (4, 17)]
        assert y[4].isnan().all()
        check(y[sound], case, x[sound], None, f"{op}, {kernel}, K={k}")


@pytest.mark.parametrize("kernel", ["stream", "mma"])
@pytest.mark.parametrize("op", OPS)
def test_no_columns(emulated: ModuleType, op: str, kernel: str, generator: torch.Generator) -> None:
    case = LinearCase(op, 5, 0, value_dtype=I8)
    bias = make_bias(case, generator)
    y = run(emulated, kernel, case, torch.zeros((3, 0), dtype=BF16), bias)
    assert torch.equal(y, bias.bfloat16().expand(3, 5))


def refusal(case: LinearCase, kernel: str, x: Tensor) -> str | None:
    return importlib.import_module(f"llmkern.ops.{case.op}").cuda_rejects(kernel, *case.args(x, None))


def test_refusals() -> None:
    def x(k: int) -> Tensor:
        return torch.zeros((2, k), dtype=BF16)

    for op in ("sparse24_linear", "bitmask_linear"):
        for dtype in (F32, F16):
            assert refusal(LinearCase(op, 3, 64, value_dtype=dtype), "mma", x(64)) == (
                f"needs values in x's type or int8, got {dtype} values and torch.bfloat16 x"
            )
        assert refusal(LinearCase(op, 3, 64, value_dtype=BF16), "mma", x(64)) is None
    for op in ("sparse24_linear", "sparse24_int4_linear"):
        small = LinearCase(op, 3, 64, group_size=20, value_dtype=I8)
        assert "multiple of 16 columns" in str(refusal(small, "stream", x(64)))
        odd = LinearCase(op, 3, 72, value_dtype=I8)
        assert refusal(odd, "wgmma", x(72)) == "needs K in multiples of 128, got K=72"
        assert refusal(odd, "mma", x(72)) is None
        even = LinearCase(op, 3, 256, value_dtype=I8)
        assert "16 bytes" in str(refusal(even, "wgmma", torch.zeros(2 * 256 + 1, dtype=BF16)[1:].view(2, 256)))
        parts = LinearCase(op, 3, 256, group_size=48, value_dtype=I8)
        assert "multiple of 32 columns" in str(refusal(parts, "wgmma", x(256)))
        assert refusal(parts, "mma", x(256)) is None


def test_choice() -> None:
    for gpu, ms, wgmma, kernel in [
        (GPU, range(1, 17), True, "ring"),
        (GPU, range(1, 17), False, "stream"),
        (OLD_GPU, range(1, 17), True, "stream"),
        (GPU, (17, 65, 4096), True, "wgmma"),
        (GPU, (17, 65, 4096), False, "mma"),
        (OLD_GPU, (17, 65, 4096), True, "mma"),
        (Gpu((10, 0), 148), (65, 4096), True, "mma"),
    ]:
        for m in ms:
            assert _cuda_sparse.best(gpu, m, wgmma=wgmma) == kernel
            x = torch.zeros((m, 8))
            order = ("wgmma", "mma", "ring", "stream")
            for row in order:
                earlier = order.index(row) < order.index(kernel)
                assert (_cuda_sparse.yields(row, gpu, x, wgmma=wgmma) is not None) == earlier


def test_plans() -> None:
    """K is divided on GPUs with clusters, while blocks are few and each has enough of K; never into more than eight."""
    for plan_of in (lambda *a: _cuda_sparse.kept_plan(*a, scaled=True), _cuda_sparse.mask_plan):
        for kernel in ("stream", "mma"):
            assert plan_of(kernel, GPU, 1, 64, 16384).splits == 8
            assert plan_of(kernel, OLD_GPU, 1, 64, 16384).splits == 1
            assert plan_of(kernel, GPU, 1, 128256, 4096).splits == 1
            assert plan_of(kernel, GPU, 1, 64, 256).splits == 1


def test_positions_are_turned() -> None:
    """Lane by lane what sparse/kept.h does with nibbles: lane c gets nibble c of each run of lanes 0 to 3."""

    def select(a: int, b: int, selector: int) -> int:
        both = b << 32 | a
        return sum((both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))

    words = [int(word) for word in torch.randint(0, 2**32, (4,), generator=torch.Generator().manual_seed(1))]
    masks = [0xF0F0F0F0 if c & 1 else 0x0F0F0F0F for c in range(4)]
    moved = [words[c ^ 1] >> 4 if c & 1 else words[c ^ 1] << 4 & 0xFFFFFFFF for c in range(4)]
    pairs = [words[c] & masks[c] | moved[c] & ~masks[c] & 0xFFFFFFFF for c in range(4)]
    turned = [select(pairs[c], pairs[c ^ 2], 0x3715 if c & 2 else 0x6240) for c in range(4)]
    for c in range(4):
        for lane in range(4):
            for run_of_four in range(2):
                got = turned[c] >> (16 * run_of_four + 4 * lane) & 15
                assert got == words[lane] >> (16 * run_of_four + 4 * c) & 15


def test_emulated_sparse_products(tmp_path: Path) -> None:
    """The emulation's own sparse products against dense ones of the same numbers."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing")
    native = ROOT / "tests" / "native"
    program = tmp_path / "sparse_products"
    sources = [native / "sparse_products.cpp", native / "emulate_cuda" / "machine.cpp"]
    includes = [f"-I{native / 'emulate_cuda'}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", "-std=c++17", "-O1", *includes, *sources, "-o", program], check=True)
    subprocess.run([program], check=True)
