"""The kernels in Triton, in its interpreter: values, on tiny tensors. `test_triton.py` runs this file by itself.

TRITON_INTERPRET=1 must be set before Triton is imported, which torch may do; hence the process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import BF16, CASES, DTYPES, F16, F32, I8, BlockCase, LinearCase, SearchCase, inputs, quantizes_x
from loss_cases import LossCase
from test_ops import expected
from torch import Tensor

import llmkern
from llmkern import testing
from llmkern._registry import OPS
from llmkern.ops import _triton_linear, _tuning
from llmkern.ops._tiles import Tiles
from llmkern.ops.int8_dynamic_linear import reference as int8_dynamic
from llmkern.ops.int8_dynamic_linear.triton import quantize_rows

sys.path.insert(0, str(Path(__file__).parent / "ops"))
import test_column_blocks as blocks
import test_linear_kl_div as losses

triton_interpreter.patch()

MARGIN, CANARY = 64, 91
TINY = [case for op in CASES if op.endswith("_linear") for case in CASES[op] if case.n * case.k <= 33 * 75]
LONG = [
    case for op in CASES if op.endswith("_linear") for case in CASES[op]
    if (case.n, case.k) == (5, 2085) and case.value_dtype in (BF16, I8)
]  # fmt: skip


@pytest.fixture(autouse=True)
def margins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What kernels write to is NaN (or -86, or True) before, and lies between canaries that must be alive after."""
    buffers = []

    def allocate(shape: Any, dtype: torch.dtype) -> Tensor:
        shape = torch.Size(shape)
        buffer = torch.full((2 * MARGIN + shape.numel(),), CANARY, dtype=torch.float32).to(dtype)
        inner = buffer[MARGIN : MARGIN + shape.numel()]
        inner.fill_(torch.nan if dtype.is_floating_point else -86)
        buffers.append(buffer)
        return inner.view(shape)

    original = torch.Tensor.new_empty

    def new_empty(self: Tensor, *shape: Any, dtype: torch.dtype | None = None, **named: Any) -> Tensor:
        if named:  # the interpreter's own
            return original(self, *shape, dtype=dtype, **named)
        return allocate(shape[0] if isinstance(shape[0], (tuple, list)) else shape, dtype or self.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype=torch.float32, device=None: allocate(shape, dtype))
    monkeypatch.setattr(torch, "empty_like", lambda like, dtype=None: allocate(like.shape, dtype or like.dtype))
    yield
    monkeypatch.undo()
    assert buffers
    for buffer in buffers:
        dead = buffer.clone()
        dead[MARGIN:-MARGIN] = CANARY
        assert (dead == torch.tensor(CANARY).to(buffer.dtype)).all(), f"a write beside {list(buffer.shape)}"


def run(case: LinearCase, x: Tensor, bias: Tensor | None) -> Tensor:
    with llmkern.force("triton"):
        return OPS[case.op](*case.args(x, bias))


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op}-{case}")
def test_values(case: LinearCase, generator: torch.Generator) -> None:
    """Every format, group and type of scale; M and the type of x take turns."""
    for at, dtype in enumerate(DTYPES):
        m = (1, 3, 17)[(at + case.n) % 3]
        x = torch.randn((m, case.k), generator=generator).to(dtype)
        bias = torch.randn(case.n, generator=generator).to(DTYPES[at - 1]) if at else None
        y = run(case, x, bias)
        assert y.dtype == dtype
        testing.assert_within(y, *expected(case, x, bias), f"{case.op} {case}, M={m}, {dtype}")


@pytest.mark.parametrize("case", LONG, ids=lambda case: f"{case.op}-{case}")
def test_split_columns(case: LinearCase, generator: torch.Generator) -> None:
    """Few rows and many columns: several programs share them, the last with fewer."""
    x = torch.randn((2, case.k), generator=generator).bfloat16()
    bias = torch.randn(case.n, generator=generator)
    y = run(case, x, bias)
    testing.assert_within(y, *expected(case, x, bias), f"{case.op} {case}")
    assert torch.equal(run(case, x, bias), y)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("op", "k", "group_size", "extra"),
    [
        ("int8_dynamic_linear", 576, 192, ()),  # steps of 64, three to a group
        ("int8_dynamic_linear", 576, None, ()),  # a split, whose parts are integers
        ("int4_linear", 600, 200, ("int8",)),  # two steps of 128, the second partly empty
        ("int4_linear", 576, 256, ("int8",)),  # the last group is short
        ("int4_linear", 576, 256, ()),
        ("int4_linear", 576, 16, ()),
    ],
)
def test_steps_of_groups(
    op: str, k: int, group_size: int | None, extra: tuple, symmetric: bool, generator: torch.Generator
) -> None:
    case = LinearCase(op, 6, k, group_size=group_size, symmetric=symmetric, extra=extra)
    x = torch.randn((3, k), generator=generator)
    testing.assert_within(run(case, x, None), *expected(case, x, None), f"{op} {case}")


@pytest.mark.parametrize(
    "case",
    [
        LinearCase("int8_dynamic_linear", 6, 576),
        LinearCase("int4_linear", 6, 576, group_size=32, symmetric=False),
        LinearCase("int4_linear", 6, 600, group_size=200, extra=("int8",)),
        LinearCase("sparse24_linear", 6, 580),
    ],
    ids=lambda case: f"{case.op}-{case}",
)
def test_every_variant_of_autotuning(
    case: LinearCase, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    x = torch.randn((3, case.k), generator=generator).bfloat16()
    tried = []

    def each(key: Any, usual: Tiles, attempt: Callable[[Tiles], None]) -> Tiles:
        tried.extend(_tuning.variants(usual))
        return tried[at]

    monkeypatch.setattr(_tuning, "chosen", each)
    at = 0
    while at == 0 or at < len(tried):
        tried.clear()
        testing.assert_within(run(case, x, None), *expected(case, x, None), f"{case.op} {case}, variant {at}")
        at += 1
    assert at >= 4


@pytest.mark.parametrize("m", [33, 70])
def test_several_tiles(m: int, generator: torch.Generator) -> None:
    """More rows of x than a tile holds, and more rows of w than a band of tiles."""
    for case in (LinearCase("int4_linear", 600, 48, group_size=16), LinearCase("sparse24_linear", 130, 40)):
        x = torch.randn((m, case.k), generator=generator).bfloat16()
        testing.assert_within(run(case, x, None), *expected(case, x, None), f"{case.op} {case}, M={m}")


@pytest.mark.parametrize("op", [op for op in CASES if op.endswith("_linear")])
def test_layouts_and_rows(op: str, generator: torch.Generator) -> None:
    case = CASES[op][1]
    for label, x in inputs(case.k, generator).items():
        testing.assert_within(run(case, x, None), *expected(case, x, None), f"{op}, x {label}")
    for n, k in ((0, 16), (4, 0), (0, 0)):
        bias = torch.arange(n).float()
        assert torch.equal(run(LinearCase(op, n, k), torch.ones(3, k), bias), bias.expand(3, n))


@pytest.mark.parametrize("op", [op for op in CASES if op.endswith("_linear")])
def test_nan_and_infinity(op: str, generator: torch.Generator) -> None:
    """A NaN in x stays in its row; an infinity meets single weights, not the sum of x."""
    for case in [case for case in CASES[op] if (case.n, case.k) == (33, 75)][:2]:
        x = torch.randn((3, case.k), generator=generator)
        x[1] = torch.nan
        y = run(case, x, None)
        assert y[[0, 2]].isfinite().all()
        assert op == "bitmask_linear" or y[1].isnan().all()
        if op in ("int4_linear", "int8_linear") and not quantizes_x(case):
            x[1] = 1.0
            x[1, 70] = torch.inf
            column = case.weight().unpack(torch.float64)[:, 70]
            wanted = torch.where(column == 0, torch.nan, column.sign() * torch.inf)
            torch.testing.assert_close(run(case, x, None)[1].double(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "group_size"), [(75, 75), (75, 20), (2085, 2085), (96, 32), (5, 1)])
def test_codes_of_x_are_the_references(k: int, group_size: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn((6, k), generator=generator)
    x[0], x[1] = 0.0, -3.25
    x[2] = torch.arange(k) % 128 - 63.5  # codes with halves
    x[2, 0] = 127.0
    x[3] = x[3] * (1e30 if dtype == F32 else 1e4)
    x = x.to(dtype)
    codes, scales = quantize_rows(x, group_size)
    wanted, wanted_scales = int8_dynamic.__globals__["quantize_rows"](x, group_size)
    assert torch.equal(codes.float(), wanted)
    assert torch.equal(scales, wanted_scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_products_are_exact(dtype: torch.dtype, symmetric: bool, generator: torch.Generator) -> None:
    """Scales of one: every sum is an integer, and only the store rounds."""
    case = LinearCase("int8_dynamic_linear", 9, 700, symmetric=symmetric)
    x = torch.randint(-3, 4, (3, case.k), generator=generator).to(dtype)
    x[:, 0] = 127
    args = list(case.args(x, None))
    args[2] = torch.ones_like(args[2])
    with llmkern.force("reference"):
        exact = OPS[case.op](x.float(), *args[1:])
    with llmkern.force("triton"):
        assert torch.equal(OPS[case.op](*args), exact.to(dtype))


def test_no_weight_is_rounded(generator: torch.Generator) -> None:
    """bf16 x with scales of 24 bits: x picks one column, and the result is that weight, rounded once."""
    for case in (
        LinearCase("int4_linear", 8, 64, group_size=20, symmetric=False),
        LinearCase("int8_linear", 8, 64, symmetric=False),
        LinearCase("sparse24_linear", 8, 64, value_dtype=F16),
        LinearCase("bitmask_linear", 8, 64, value_dtype=F32),
        LinearCase("sparse24_int4_linear", 8, 64, group_size=16),
        LinearCase("bitmask_linear", 8, 64, value_dtype=I8, group_size=32),
    ):
        x = torch.eye(case.k)[[0, 21, 63]]
        wanted = case.weight().unpack(torch.float32)[:, [0, 21, 63]].T
        assert torch.equal(run(case, x.bfloat16(), None), wanted.bfloat16()), case


GPTQ = [
    BlockCase(1, 1),
    BlockCase(3, 13, symmetric=False),
    BlockCase(3, 24, bits=3, group_size=10, symmetric=False, mask=0.6, compensated=True),
    BlockCase(2, 33, bits=8, mask=0.0),
    BlockCase(0, 16),
]
SPARSEGPT = [
    BlockCase(1, 1, bits=0, mask=0.5),
    BlockCase(3, 12, bits=0, prune=(2, 4), compensated=True),
    BlockCase(3, 16, bits=4, prune=(2, 4), group_size=8, symmetric=False),
    BlockCase(3, 18, bits=0, prune=(2, 6), compensated=True),
    BlockCase(2, 64, bits=0, prune=(20, 64)),
    BlockCase(2, 8, bits=0, prune=(0, 4)),
    BlockCase(2, 8, bits=0, prune=(4, 4)),
    BlockCase(3, 21, bits=3, mask=0.5, group_size=8),
    BlockCase(0, 16, bits=0, prune=(2, 4)),
]
SEARCH = [
    SearchCase(1, 1, 1),
    SearchCase(3, 13, 13, symmetric=False),
    SearchCase(3, 75, 20, symmetric=False),
    SearchCase(2, 1100, 1100, bits=3, steps=3),
    SearchCase(4, 64, 32, zero_rows=True, symmetric=False),
    SearchCase(0, 16, 8),
]


@pytest.fixture(params=["a row of a program", "many rows"])
def rows_of_a_program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many rows":
        monkeypatch.setattr(import_module("llmkern.ops.gptq_block.triton"), "MANY_ROWS", 0)


@pytest.mark.parametrize("case", GPTQ, ids=str)
@pytest.mark.usefixtures("rows_of_a_program")
def test_gptq_block(case: BlockCase, generator: torch.Generator) -> None:
    blocks.test_gptq_block("gptq_block", "triton", case, generator)


@pytest.mark.parametrize("case", SPARSEGPT, ids=str)
@pytest.mark.usefixtures("rows_of_a_program")
def test_sparsegpt_block(case: BlockCase, generator: torch.Generator) -> None:
    blocks.test_sparsegpt_block("sparsegpt_block", "triton", case, generator)


@pytest.mark.parametrize(("op", "case"), [("gptq_block", GPTQ[2]), ("sparsegpt_block", SPARSEGPT[2])], ids=str)
def test_layers_are_as_calls(op: str, case: BlockCase, generator: torch.Generator) -> None:
    with llmkern.force("triton"):
        blocks.assert_layers_are_calls(op, OPS[op], case, 3, generator)


def test_ties(generator: torch.Generator) -> None:
    blocks.test_equal_scores_prune_the_first("sparsegpt_block", "triton")
    blocks.test_rounding_ties_go_to_even_codes("gptq_block", "triton")


def test_v_is_read_above_its_diagonal_alone() -> None:
    """The solvers leave a whole matrix there, and the reference reads nothing else of it."""
    t = BlockCase(2, 12, compensated=True).tensors(torch.Generator().manual_seed(3))
    v = torch.where(torch.ones(12, 12).triu(1) > 0, t["v"], torch.nan)
    results = []
    for factor in (t["v"], v):
        with llmkern.force("triton"):
            results.append(OPS["gptq_block"](t["w"], t["wc"], factor, t["scales"], None, t["groups"], None, 4))
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_of_equal_clips_the_first_wins(generator: torch.Generator) -> None:
    """Nothing is important: every clip has the same error."""
    args = torch.randn((3, 20), generator=generator), torch.zeros(20), 8, 4, True, 5, 0.5
    with llmkern.force("reference"):
        wanted = OPS["scale_search"](*args)
    with llmkern.force("triton"):
        found = OPS["scale_search"](*args)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("case", SEARCH, ids=str)
def test_scale_search(case: SearchCase, generator: torch.Generator) -> None:
    blocks.test_scale_search("scale_search", "triton", case, generator)


@pytest.mark.parametrize("case", [case for case in CASES["linear_kl_div"] if case.rows * case.v < 20000], ids=str)
def test_linear_kl_div(case: LossCase, generator: torch.Generator) -> None:
    losses.test_values_and_gradients("linear_kl_div", "triton", case, generator)


def test_what_is_not_forced_is_not_interpreted() -> None:
    case = replace(CASES["int4_linear"][3], value_dtype=BF16)
    x = torch.ones(2, case.k)
    assert OPS["int4_linear"].pick(*case.args(x, None)).name != "triton"
    assert "triton: Triton's interpreter runs only where it is forced" in llmkern.why("int4_linear", x, case.weight())
    run(case, x, None)
    assert _triton_linear.product.__class__.__name__ == "InterpretedFunction"
