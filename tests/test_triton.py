"""The kernels in Triton, without a GPU: their values in Triton's interpreter, their registers as ptxas gives them.

What this does not show is speed, or that a GPU runs them.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import llmkern
from llmkern import _features
from llmkern._registry import OPS
from llmkern.ops._tiles import DECODING, block_k_of, block_m, tiles
from llmkern.ops.linear_kl_div.reference import KINDS, RowOptions

BF16, F32, I8, I32, U8 = torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.uint8
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or _features.TRITON_INTERPRETED,
    reason="Triton is not installed" if importlib.util.find_spec("triton") is None else "this process interprets",
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "LLMKERN_DISABLE"} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, check=False)


# The row.


def test_every_op_has_the_row_before_its_reference() -> None:
    for op in OPS:
        assert [row.kernel for row in llmkern.kernels(op)][-2:] == ["triton", "reference"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_row_says_what_is_lacking() -> None:
    row = next(row for row in llmkern.kernels("int4_linear") if row.kernel == "triton")
    if importlib.util.find_spec("triton") is None:
        assert row.reason == "Triton is not installed"
    elif not _features.TRITON_INTERPRETED:
        assert (row.device, row.runnable, row.reason) == ("cuda", False, "torch finds no GPU here")


def test_the_row_can_be_disabled() -> None:
    code = "import llmkern; print({row.reason for row in llmkern.kernels() if row.kernel == 'triton'})"
    done = python("-c", code, LLMKERN_DISABLE="triton")
    assert done.stdout.strip() == "{'triton is disabled by LLMKERN_DISABLE'}", done.stderr


def test_importing_does_not_import_triton() -> None:
    code = "import sys, torch; before = 'triton' in sys.modules; import llmkern.ops; "
    done = python("-c", code + "llmkern.kernels(); print(before or 'triton' not in sys.modules)")
    assert done.stdout.strip() == "True", done.stderr


# The choice of blocks.

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (64, 100000), (33, 75), (1, 1)]
CAPABILITIES = [(8, 0), (8, 6), (9, 0), (10, 0), (9, 4)]


@pytest.mark.parametrize("kind", ["float32", "half", "int8"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_tiles_cover_the_product(capability: tuple[int, int], kind: Any) -> None:
    for n, k in SHAPES:
        for group_size in {k, *(g for g in (1, 8, 16, 20, 32, 48, 100, 128, 1000) if g < k)}:
            for m in (1, 2, 16, 17, 64, 65, 128, 129, 1000, 8192):
                t = tiles(capability, m, n, k, group_size, kind)
                assert t == tiles(capability, m, n, k, group_size, kind)
                assert t.block_k >= (32 if kind == "int8" else 16)
                groups = -(-k // group_size)
                steps = -(-k // t.block_k) if t.whole else groups * t.per_group
                assert (t.splits - 1) * t.per_split < steps <= t.splits * t.per_split
                assert t.per_group * t.block_k >= min(group_size, k) > (t.per_group - 1) * t.block_k
                if groups > 1:
                    assert t.per_split % t.per_group == 0, "a group is divided"
                    assert not t.whole or group_size % t.block_k == 0, "a step crosses groups"


def test_blocks_of_x_are_smooth_in_m() -> None:
    def cost(m: int, largest: int) -> int:
        size = block_m(m, largest)
        return -(-m // size) * (size + DECODING)

    for largest in (64, 128):
        sizes = [block_m(m, largest) for m in range(1, largest + 1)]
        assert sizes == sorted(sizes)
        assert sizes[0] == 16
        costs = [cost(m, largest) for m in range(1, 2000)]
        assert costs == sorted(costs)
        for m, (one, more) in enumerate(itertools.pairwise(costs), 1):
            assert more <= one + largest + DECODING, f"from {m} to {m + 1} rows of x"


def test_few_rows_of_x_are_split_until_every_processor_works() -> None:
    t = tiles((9, 0), 1, 4096, 14336, 128, "half")
    assert t.block_m == 16
    assert 132 <= 4096 // t.block_n * t.splits <= 3 * 132
    assert tiles((9, 0), 4096, 4096, 4096, 128, "half").splits == 1


def test_steps_do_not_cross_groups() -> None:
    assert block_k_of(4096, 128, 128, 16) == (128, True)
    assert block_k_of(4096, 128, 64, 16) == (64, True)
    assert block_k_of(4096, 48, 128, 16) == (16, True)
    assert block_k_of(4096, 48, 128, 32) == (64, False)
    assert block_k_of(4096, 100, 64, 16) == (64, False)
    assert block_k_of(75, 75, 64, 16) == (64, True)


# Values.


@needs_triton
def test_values_in_the_interpreter() -> None:
    """triton_kernels.py in a process of its own, since Triton reads TRITON_INTERPRET when it is imported."""
    file = Path(__file__).with_name("triton_kernels.py")
    done = python("-m", "pytest", str(file), "-q", "--no-header", "-p", "no:cacheprovider", TRITON_INTERPRET="1")
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


# Registers, compiled for GPUs that are not here.


def meta(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear_args(
    op: str, m: int, *, n: int = 4096, k: int = 4096, group_size: int | None = None, x: torch.dtype = BF16,
    values: torch.dtype = BF16, zeros: bool = False, extra: tuple = (),
) -> tuple:  # fmt: skip
    """The op's arguments, without data."""
    g = group_size or k
    groups = -(-k // g)
    scales, zero = meta(n, groups), meta(n, groups, dtype=I8) if zeros else None
    weight = {
        "int8_linear": lambda: (meta(n, k, dtype=I8), scales, zero),
        "int8_dynamic_linear": lambda: (meta(n, k, dtype=I8), scales, zero),
        "int4_linear": lambda: (meta(n, -(-k // 8), dtype=I32), scales, zero),
        "sparse24_linear": lambda: (
            meta(n, 2 * -(-k // 4), dtype=values), meta(n, -(-k // 8), dtype=U8), scales if values == I8 else None
        ),
        "sparse24_int4_linear": lambda: (
            meta(n, -(-2 * -(-k // 4) // 8), dtype=I32), meta(n, -(-k // 8), dtype=U8), scales
        ),
        "bitmask_linear": lambda: (
            meta(n * k // 2, dtype=values), meta(n, -(-k // 8), dtype=U8), meta(n + 1, dtype=torch.int64),
            scales if values == I8 else None,
        ),
    }[op]()  # fmt: skip
    return (meta(m, k, dtype=x), *weight, meta(n), g, *extra)


LINEAR: list[tuple[str, dict[str, Any]]] = [
    ("int8_linear", {"zeros": True}),
    ("int8_dynamic_linear", {"group_size": 128, "zeros": True}),
    ("int4_linear", {"group_size": 128, "zeros": True}),
    ("int4_linear", {"group_size": 128, "extra": ("int8",)}),
    ("sparse24_linear", {}),
    ("sparse24_int4_linear", {"group_size": 128}),
    ("bitmask_linear", {}),
]
# With few rows of x each: fp32, groups of any size, K of any size, values of another type.
ODD: list[tuple[str, int, dict[str, Any]]] = [
    ("int4_linear", 64, {"group_size": 128, "x": F32}),
    ("int8_linear", 512, {"x": F32}),
    ("int4_linear", 1, {"group_size": 100, "zeros": True}),
    ("int4_linear", 512, {"group_size": 100, "zeros": True}),
    ("int4_linear", 512, {"group_size": 20, "extra": ("int8",)}),
    ("sparse24_linear", 512, {"k": 2085}),
    ("bitmask_linear", 512, {"values": I8, "group_size": 50}),
]
CODES = [(8, 0), (9, 0)]


def named(op: str, m: int, options: dict[str, Any]) -> str:
    return "-".join([op, f"M{m}", *(f"{name}={value}".replace("torch.", "") for name, value in options.items())])


WORK = [(op, m, options) for op, options in LINEAR for m in (1, 512)] + ODD


@functools.cache
def builder() -> Any:
    import triton_offline

    return triton_offline.build


@needs_triton
@pytest.mark.parametrize("capability", CODES, ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(("op", "m", "options"), WORK, ids=[named(*work) for work in WORK])
def test_products_do_not_spill_and_use_tensor_cores(
    op: str, m: int, options: dict[str, Any], capability: tuple[int, int]
) -> None:
    args = linear_args(op, m, **options)
    for built in builder()(op, args, capability):
        assert built.stack == 0, f"{built.kernel} {built.constants}: {built.registers} registers and a stack"
        assert built.shared <= (99 if capability < (9, 0) else 227) * 1024  # of the GPUs from sm_80 on that have least
        if built.kernel != "product":
            continue
        if options.get("x") == F32:
            wanted = "fma.rn.f32"
            assert "tf32" not in built.ptx
        elif op == "int8_dynamic_linear" or options.get("extra"):
            wanted = "wgmma.mma_async.sync.aligned.m64n" if capability == (9, 0) else "mma.sync.aligned.m16n8k32"
            assert ".s32.s8.s8" in built.ptx
        else:
            wanted = "wgmma.mma_async.sync.aligned.m64n" if capability == (9, 0) else "mma.sync.aligned.m16n8k16"
            assert ".f32.bf16.bf16" in built.ptx
        assert wanted in built.ptx


@needs_triton
@pytest.mark.parametrize(
    ("op", "m", "options", "instruction"),
    [
        ("int4_linear", 1, {"group_size": 128}, "v_mfma_f32_16x16x16_bf16"),
        ("int4_linear", 512, {"group_size": 100, "zeros": True}, "v_mfma_f32_32x32x8_bf16"),
        ("int8_dynamic_linear", 512, {}, "v_mfma_i32_32x32x16_i8"),
    ],
)
def test_products_compile_for_amd(op: str, m: int, options: dict[str, Any], instruction: str) -> None:
    """MI300 (gfx942), whose capability torch gives as 9.4: no spills, its 64 KiB of shared memory, its matrix cores."""
    import triton_offline

    product = triton_offline.compile_for_amd(op, linear_args(op, m, **options), "gfx942", (9, 4))
    assert re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", product.asm["amdgcn"]) == ["0", "0"]
    assert product.metadata.shared <= 64 * 1024
    assert instruction in product.asm["amdgcn"]


def gptq_args(n: int, b: int, *, zeros: bool = False, mask: bool = False) -> tuple:
    grid = meta(n, 1), meta(n, 1, dtype=I8) if zeros else None, meta(b, dtype=I32)
    return (meta(n, b), meta(n, b), meta(b, b), *grid, meta(n, b, dtype=torch.bool) if mask else None, 4)


def sparsegpt_args(n: int, b: int, prune_n: int, prune_m: int, bits: int) -> tuple:
    grid = (meta(n, 1), None, meta(b, dtype=I32)) if bits else (None, None, None)
    return (meta(n, b), meta(n, b), meta(b, b), meta(b), None, prune_n, prune_m, *grid, bits)


COLUMNS = {
    "gptq few rows": ("gptq_block", gptq_args(4096, 128)),
    "gptq many rows": ("gptq_block", gptq_args(16384, 128, zeros=True, mask=True)),
    "gptq wide": ("gptq_block", gptq_args(100, 1000)),
    "sparsegpt 2:4": ("sparsegpt_block", sparsegpt_args(4096, 128, 2, 4, 0)),
    "sparsegpt 2:4 int4": ("sparsegpt_block", sparsegpt_args(16384, 128, 2, 4, 4)),
    "sparsegpt 20:64": ("sparsegpt_block", sparsegpt_args(4096, 128, 20, 64, 0)),
    "search by groups": ("scale_search", (meta(4096, 4096), meta(4096), 128, 4, True, 20, 0.5)),
    "search by rows": ("scale_search", (meta(4096, 4096), meta(4096), 4096, 4, False, 20, 0.5)),
}


@needs_triton
@pytest.mark.parametrize("capability", CODES, ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("name", COLUMNS)
def test_columns_do_not_spill(name: str, capability: tuple[int, int]) -> None:
    op, args = COLUMNS[name]
    for built in builder()(op, args, capability):
        assert built.stack == 0, f"{built.kernel} {built.constants}: {built.registers} registers and a stack"
        assert "div.rn.f32" in built.ptx or op == "sparsegpt_block", "a quotient that is not the reference's"


def row_args(
    kind: str, dtype: torch.dtype, *, k: int = 0, labels: bool = True, softcap: float | None = None
) -> tuple[Any, ...]:
    """Arguments of linear_kl_div's `rows`: 1024 rows of Llama 3's classes."""
    n, v = 1024, 128256
    teacher = (None, meta(n, k, dtype=torch.int64), meta(n, k)) if k else (meta(n, v, dtype=dtype), None, None)
    labelled = meta(n, dtype=torch.int64) if labels else None
    options = RowOptions(kind, 0.3, 2.0, 4.0, 0.5 if labels else 0.0, softcap, softcap, True, True)
    return (meta(n, v, dtype=dtype), *teacher, labelled, options)


LOSSES = {
    **{kind: row_args(kind, BF16) for kind in KINDS},
    "jsd capped": row_args("jsd", F32, softcap=30.0),
    "skew_kl without labels": row_args("skew_kl", F32, labels=False),
    "top-k": row_args("forward_kl", BF16, k=64),
    "top-k capped": row_args("forward_kl", F32, k=100, softcap=30.0),
}


@needs_triton
@pytest.mark.parametrize("capability", CODES, ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_spill(name: str, capability: tuple[int, int]) -> None:
    (built,) = builder()("linear_kl_div", LOSSES[name], capability, "rows")
    assert built.stack == 0, f"{built.kernel} {built.constants}: {built.registers} registers and a stack"
    assert built.registers <= 64  # four programs of 8 warps on a multiprocessor: some read while others compute
    assert "ex2.approx" in built.ptx
