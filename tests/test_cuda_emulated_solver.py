"""The CUDA kernels of gptq_block, sparsegpt_block and scale_search on this CPU, judged as those for CPUs are.

As test_cuda_emulated.py: values, indices, barriers and memory of the same sources; nothing about speed.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import GPTQ_CASES, SEARCH_CASES, SPARSEGPT_CASES, BlockCase, SearchCase
from emulation import GPU
from ops.test_column_blocks import (
    assert_gptq_block,
    assert_layers_are_calls,
    assert_scale_search,
    assert_sparsegpt_block,
    block_args,
    layers,
)
from torch import Tensor

from llmkern.ops import _columns, _cuda
from llmkern.ops.gptq_block.reference import quantize

PLANS = [(8, 1), (4, 1), (4, 2), (2, 2)]  # lanes per row, rows per lane


def run(emulated: ModuleType, op: str, *args: Any) -> Any:
    module = importlib.import_module(f"llmkern.ops.{op}")
    return module.cuda("block", getattr(emulated, op).block, GPU, *args)


@pytest.fixture
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that could take all sizes takes these, with `warps` warps in a block."""
    lanes, rows, warps = request.param
    usual = _columns.column_plan

    def plan(gpu: _cuda.Gpu, count: int, n: int, b: int, prune_m: int) -> _columns.ColumnPlan:
        return _columns.ColumnPlan(lanes, rows, warps) if prune_m in (0, 4) else usual(gpu, count, n, b, prune_m)

    monkeypatch.setattr(_columns, "column_plan", plan)


def each_size(warps: int = 2) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "sizes", [(*plan, warps) for plan in PLANS], ids=lambda size: f"{size[0]}x{size[1]}", indirect=True
    )


@each_size()
@pytest.mark.parametrize("case", GPTQ_CASES, ids=str)
@pytest.mark.usefixtures("poisoned", "sizes")
def test_gptq_block(emulated: ModuleType, case: BlockCase, generator: torch.Generator) -> None:
    t = case.tensors(generator)
    del t["diagonal"]
    assert_gptq_block(case, t, run(emulated, "gptq_block", *t.values(), case.bits))


@each_size()
@pytest.mark.parametrize("case", [case for case in SPARSEGPT_CASES if case.prune[1] in (1, 4)], ids=str)
@pytest.mark.usefixtures("poisoned", "sizes")
def test_sparsegpt_block(emulated: ModuleType, case: BlockCase, generator: torch.Generator) -> None:
    check_sparsegpt(emulated, case, generator)


@pytest.mark.parametrize(
    "case",
    [
        *(case for case in SPARSEGPT_CASES if case.prune[1] not in (1, 4)),
        BlockCase(9, 15, bits=0, prune=(1, 3), compensated=True),
        BlockCase(9, 6, bits=0, prune=(1, 2)),
        BlockCase(9, 7, bits=4, prune=(0, 1)),
        BlockCase(9, 120, bits=4, prune=(2, 5), group_size=16, symmetric=False, compensated=True),
        BlockCase(7, 100, bits=4, prune=(3, 20), compensated=True),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_groups_of_any_size(emulated: ModuleType, case: BlockCase, generator: torch.Generator) -> None:
    check_sparsegpt(emulated, case, generator)


def check_sparsegpt(emulated: ModuleType, case: BlockCase, generator: torch.Generator) -> None:
    t = case.tensors(generator)
    args = (t["w"], t["wc"], t["v"], t["diagonal"], t["mask"], *case.prune, t["scales"], t["zeros"], t["groups"])
    assert_sparsegpt_block(case, t, *run(emulated, "sparsegpt_block", *args, case.bits))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 7, 8, 9, 31, 33, 64, 65])
@pytest.mark.parametrize("kind", ["quantized", "2:4", "narrow"])
@pytest.mark.usefixtures("poisoned")
def test_numbers_of_rows(emulated: ModuleType, kind: str, n: int, generator: torch.Generator) -> None:
    """The sizes that are chosen for them, on a GPU so small that all sizes and several blocks come up."""
    gpu = _cuda.Gpu((8, 0), 1)
    for case in (BlockCase(n, 4 if kind == "narrow" else 24, group_size=8, compensated=True),):
        t = case.tensors(generator)
        if kind == "quantized":
            del t["diagonal"]
            module = importlib.import_module("llmkern.ops.gptq_block")
            q = module.cuda("block", emulated.gptq_block.block, gpu, *t.values(), case.bits)
            assert_gptq_block(case, t, q)
        else:
            case = BlockCase(n, case.b, bits=0, prune=(2, 4), compensated=True)
            module = importlib.import_module("llmkern.ops.sparsegpt_block")
            args = (t["w"], t["wc"], t["v"], t["diagonal"], None, 2, 4, None, None, None, 0)
            assert_sparsegpt_block(case, t, *module.cuda("block", emulated.sparsegpt_block.block, gpu, *args))


@pytest.mark.usefixtures("poisoned")
def test_blocks_wider_than_the_kernel(emulated: ModuleType, generator: torch.Generator) -> None:
    case = BlockCase(5, 300, group_size=50, symmetric=False, mask=0.6, compensated=True)
    t = case.tensors(generator)
    args = (t["w"], t["wc"], t["v"], t["scales"], t["zeros"], t["groups"], t["mask"], 4)
    assert_gptq_block(case, t, run(emulated, "gptq_block", *args))
    for prune in ((2, 4), (2, 6)):
        case = BlockCase(5, 300, bits=0, prune=prune, compensated=True)
        t = case.tensors(generator)
        args = (t["w"], t["wc"], t["v"], t["diagonal"], None, *prune, None, None, None, 0)
        assert_sparsegpt_block(case, t, *run(emulated, "sparsegpt_block", *args))


LAYERED = [
    ("gptq_block", BlockCase(70, 24, group_size=10, symmetric=False, mask=0.6, compensated=True)),
    ("gptq_block", BlockCase(7, 13, symmetric=False)),  # layers start anywhere
    ("gptq_block", BlockCase(0, 16)),
    ("sparsegpt_block", BlockCase(70, 24, bits=0, prune=(2, 4), compensated=True)),
    ("sparsegpt_block", BlockCase(9, 128, group_size=32, symmetric=False, prune=(2, 4), compensated=True)),
    ("sparsegpt_block", BlockCase(70, 15, bits=0, prune=(1, 3), compensated=True)),
    ("sparsegpt_block", BlockCase(9, 75, bits=3, mask=0.5, group_size=32, compensated=True)),
]


@each_size()
@pytest.mark.parametrize(("op", "case"), LAYERED, ids=str)
@pytest.mark.usefixtures("poisoned", "sizes")
def test_layers_are_as_calls(emulated: ModuleType, op: str, case: BlockCase, generator: torch.Generator) -> None:
    for count in (1, 3):
        assert_layers_are_calls(op, lambda *args: run(emulated, op, *args), case, count, generator)


def test_layers_are_one_launch(emulated: ModuleType, generator: torch.Generator) -> None:
    """By the sizes that are chosen for them, on a GPU so small that several blocks of a layer come up."""
    calls = []

    def counted(function: Any) -> Any:
        return lambda *args: (calls.append(args), function(*args))

    for op, case in LAYERED:
        module = importlib.import_module(f"llmkern.ops.{op}")
        function = counted(getattr(emulated, op).block)
        assert_layers_are_calls(
            op, lambda *args, f=function, m=module: m.cuda("block", f, _cuda.Gpu((8, 0), 1), *args), case, 3, generator
        )
        assert len(calls) == (4 if case.n else 0)
        calls.clear()


@pytest.mark.usefixtures("poisoned")
def test_layers_of_blocks_wider_than_the_kernel(emulated: ModuleType, generator: torch.Generator) -> None:
    """By the rules: a product of all layers need not round as one of each does."""
    case = BlockCase(5, 300, group_size=50, symmetric=False, mask=0.6, compensated=True)
    each, whole = layers(case, 3, generator)
    q = run(emulated, "gptq_block", *block_args("gptq_block", case, whole))
    for t, part in zip(each, q, strict=True):
        assert_gptq_block(case, t, part)
    for prune in ((2, 4), (2, 6)):
        case = BlockCase(5, 300, bits=0, prune=prune, compensated=True)
        each, whole = layers(case, 3, generator)
        q, keep = run(emulated, "sparsegpt_block", *block_args("sparsegpt_block", case, whole))
        for t, *parts in zip(each, q, keep, strict=True):
            assert_sparsegpt_block(case, t, *parts)


def test_too_many_layers_are_refused(emulated: ModuleType) -> None:
    w, one = torch.ones(65536, 1, 1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"^gptq_block: cuda\.block: at most 65535 layers, got 65536"):
        run(emulated, "gptq_block", w, w, w, w, None, one, None, 4)


@each_size(warps=1)
@pytest.mark.usefixtures("sizes")
def test_full_v(emulated: ModuleType, generator: torch.Generator) -> None:
    """Coordinate descent hands over a V' whose lower triangle is not 0, and rows that start anywhere."""
    case = BlockCase(3, 76, group_size=19, compensated=True)
    t = case.tensors(generator)
    del t["diagonal"]
    wanted = run(emulated, "gptq_block", *t.values(), 4)
    t["v"] = t["v"] + torch.randn(76, 76, generator=generator).tril(-1)
    assert torch.equal(run(emulated, "gptq_block", *t.values(), 4), wanted)
    for name in ("w", "wc", "v"):
        moved = torch.empty(t[name].numel() + 1)[1:].view_as(t[name])  # no longer at a multiple of 16 bytes
        t[name] = moved.copy_(t[name])
    assert torch.equal(run(emulated, "gptq_block", *t.values(), 4), wanted)


def test_quotients_are_rounded_correctly(emulated: ModuleType, generator: torch.Generator) -> None:
    """Exactly the reference's codes, also next to ties, for scales of every size, and beyond the ends of the grid."""
    n, b = 512, 128
    scales = torch.rand(n, 1, generator=generator) + 0.5
    scales[:128] = scales[:128].bfloat16().float()
    scales[:64] *= 2.0 ** torch.arange(-140, 116, 4)[:, None]
    scales[64:72] *= -1
    codes = torch.randint(-300, 300, (n, b), generator=generator) / 2
    w = codes * scales
    # One unit in the last place to either side of half of them.
    w = torch.where(codes.long() % 2 == 0, w, torch.nextafter(w, w + w * torch.randn(n, b, generator=generator)))
    w[:, :4] = torch.tensor([3.4e38, -3.4e38, 1.0, 1e-45])
    zeros = torch.randint(-128, 128, (n, 1), generator=generator).to(torch.int8)
    groups = torch.zeros(b, dtype=torch.int32)
    for bits, offsets in ((8, None), (8, zeros), (3, None)):
        q = run(emulated, "gptq_block", w, w, torch.eye(b), scales, offsets, groups, None, bits)
        assert torch.equal(q, quantize(w, scales, offsets, bits))
        assert not torch.signbit(q[q == 0]).any()


def near_middles() -> list[tuple[float, float]]:
    """All x, scale, up to powers of two, whose quotient is next to the middle of h and the next float.

    h are the integers and a half up to 255.5; "next to": within 4 * 2^-24 units in the last place of h. With the middle
    m 2^(e-24) and scale s, that is x = X 2^(k+e-24) with |X 2^k - m s| <= 8, so m s = d modulo 2^k, |d| <= 8.
    """
    found = []
    for doubled in range(1, 512, 2):
        e = doubled.bit_length() - 2
        below = ((doubled << (23 - e)) - 1, e) if doubled > 1 else ((1 << 25) - 1, -2)
        above = ((doubled << (23 - e)) + 1, e)
        for m, exponent in (above, below):
            for k in (24, 25):
                inverse = pow(m, -1, 1 << k)
                for d in range(-8, 9):
                    s = d * inverse % (1 << k)
                    x, off = divmod(m * s - d, 1 << k)
                    if 1 << 23 <= s < 1 << 24 and 1 << 23 <= x < 1 << 24 and not off:
                        found.append((float(x) * 2.0 ** (k + exponent - 24), float(s)))
    return found


def test_quotients_next_to_ties(emulated: ModuleType) -> None:
    pairs = torch.tensor(near_middles(), dtype=torch.float64)
    assert torch.equal(pairs.float().double(), pairs)
    pairs = torch.cat([pairs, pairs.new_ones(-len(pairs) % 128, 2)]).float()
    w, scales = pairs[:, 0].view(-1, 128).contiguous(), pairs[:, 1].view(-1, 128).contiguous()
    assert len(w) > 10
    zeros = torch.full(w.shape, -128, dtype=torch.int8)
    groups = torch.arange(128, dtype=torch.int32)
    for power in (0, -20, 40):
        scaled, grid = w * 2.0**power, scales * 2.0**power
        q = run(emulated, "gptq_block", scaled, scaled, torch.eye(128), grid, zeros, groups, None, 8)
        assert torch.equal(q, quantize(scaled, grid, zeros, 8))
        q = run(emulated, "gptq_block", -scaled, -scaled, torch.eye(128), grid, ~zeros, groups, None, 8)
        assert torch.equal(q, quantize(-scaled, grid, ~zeros, 8))


def test_equal_scores_prune_the_first(emulated: ModuleType) -> None:
    w = torch.ones(5, 8)
    for m in (4, 8):
        q, keep = run(
            emulated, "sparsegpt_block", w, w, torch.eye(8), torch.ones(8), None, m // 2, m, None, None, None, 0
        )
        assert torch.equal(keep, (torch.arange(8) % m >= m // 2).expand(5, 8))
        assert torch.equal(q, keep.float())


@pytest.mark.parametrize(
    "case",
    [*SEARCH_CASES, SearchCase(3, 300, 300, steps=70), SearchCase(5, 40, 20, steps=64, symmetric=False)],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_scale_search(emulated: ModuleType, case: SearchCase, generator: torch.Generator) -> None:
    w, importance = case.tensors(generator)
    for gpu in (GPU, _cuda.Gpu((8, 0), 1)):  # the second: a block takes groups in turn
        module = importlib.import_module("llmkern.ops.scale_search")
        scales, zeros = module.cuda(
            "block", emulated.scale_search.block, gpu, w, importance, case.group_size, case.bits, case.symmetric,
            case.steps, case.smallest,
        )  # fmt: skip
        assert_scale_search(case, w, importance, scales, zeros)


@pytest.mark.parametrize("symmetric", [True, False])
def test_of_equal_errors_the_first_wins(emulated: ModuleType, symmetric: bool, generator: torch.Generator) -> None:
    w, importance = torch.randn(4, 64, generator=generator), torch.zeros(64)
    scales, _ = run(emulated, "scale_search", w, importance, 32, 4, symmetric, 100, 0.5)
    low, high = w.view(4, 2, 32).amin(2), w.view(4, 2, 32).amax(2)
    wanted = 2 * torch.maximum(high, -low) if symmetric else high - low
    torch.testing.assert_close(scales, wanted / 15)


def test_too_many_steps_are_refused() -> None:
    module = importlib.import_module("llmkern.ops.scale_search")
    w: Tensor = torch.ones(1, 8)
    assert module.cuda_rejects("block", w, w[0], 8, 4, True, 8192, 0.5) is None
    assert "steps=8193" in module.cuda_rejects("block", w, w[0], 8, 4, True, 8193, 0.5)


def test_sizes_fill_the_gpu() -> None:
    def plan(n: int, b: int = 128, m: int = 0, count: int = 1) -> tuple[int, ...]:
        return tuple(_columns.column_plan(GPU, count, n, b, m))

    assert plan(1) == (8, 1, 1)
    assert plan(4096) == (8, 1, 8)  # 32 rows for each of 132
    assert plan(7168) == (4, 1, 7)
    assert plan(14336) == (4, 2, 7)
    assert plan(28672) == (2, 2, 7)
    assert plan(151936) == (2, 2, 8)
    assert plan(4096, m=8) == (4, 1, 4)
    assert plan(1 << 22, b=4, m=4) == (1, 1, 8)
    assert plan(64, count=8) == (8, 1, 1)
    assert plan(768, count=128) == (2, 2, 8)
    assert plan(300, count=128) == (2, 2, 5)  # two blocks of 160 rows, not one of 256 and one of 44
    assert plan(1, count=1000) == (8, 1, 1)
