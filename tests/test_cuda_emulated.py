"""The CUDA kernels on this CPU, thread by thread (tests/native/emulate_cuda): values, indices, barriers, memory.

The module is built from the same sources; what stands in for the GPU's instructions is written from the PTX ISA. It
says nothing about speed, and nothing about what the compiler for GPUs makes of the sources.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from cases import BF16, F16, F32, LinearCase
from emulation import GPU, OLD_GPU, run
from test_ops import expected, make_bias

from llmkern import testing
from llmkern.ops import _cuda, _cuda_ring


def codes_cases(op: str) -> list[LinearCase]:
    """One row, odd sizes, rows that are and are not aligned, groups of a chunk and of less, short last groups."""
    return [
        LinearCase(op, 1, 1),
        LinearCase(op, 7, 13, scale_dtype=BF16, symmetric=False),
        LinearCase(op, 33, 75, group_size=32, scale_dtype=F16),
        LinearCase(op, 17, 260, group_size=64, symmetric=False),
        LinearCase(op, 64, 576, group_size=128, scale_dtype=BF16),
        LinearCase(op, 40, 1056, group_size=128, symmetric=False),
        LinearCase(op, 35, 544),
        LinearCase(op, 24, 544, group_size=64, symmetric=False),
        LinearCase(op, 20, 2144, group_size=32, symmetric=False),
    ]


CASES = [case for op in ("int4_linear", "int8_linear") for case in codes_cases(op)]


RING_CASES = [
    case
    for op in ("int4_linear", "int8_linear")
    for case in (
        LinearCase(op, 64, 576, group_size=128, scale_dtype=BF16),
        LinearCase(op, 40, 1056, group_size=128, symmetric=False),
        LinearCase(op, 35, 544),
        LinearCase(op, 24, 544, group_size=64, symmetric=False, scale_dtype=F16),
        LinearCase(op, 20, 2144, group_size=32, symmetric=False),
        LinearCase(op, 8, 32, scale_dtype=BF16, symmetric=False),
        LinearCase(op, 100, 4096, group_size=128, scale_dtype=F16),
    )
]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", RING_CASES, ids=lambda case: f"{case.op}-{case}")
@pytest.mark.usefixtures("poisoned")
def test_ring_values(
    emulated: ModuleType, case: LinearCase, dtype: torch.dtype, generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Clusters that take several tiles, and those that divide K."""
    for at, m in enumerate((1, 3, 8, 9, 17)):
        x = torch.randn((m, case.k), generator=generator).to(dtype)
        bias = make_bias(case, generator, (F32, BF16, F16)[at % 3]) if at % 2 else None
        fits = [splits for splits in (2, 4) if 128 * splits <= case.k]
        for groups, splits in ((1, 1), (4, 1), *((1, splits) for splits in fits))[at % 2 :: 2]:
            plan = _cuda.Plan(groups, 2 if m > 8 else 1, splits)
            monkeypatch.setattr(_cuda_ring, "plan", lambda *_, plan=plan: plan)
            y = run(emulated, "ring", case, x, bias)
            testing.assert_within(y, *expected(case, x, bias), f"{case}, M={m}, {plan}")


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case}")
@pytest.mark.usefixtures("poisoned")
def test_values(emulated: ModuleType, case: LinearCase, dtype: torch.dtype, generator: torch.Generator) -> None:
    for at, m in enumerate((1, 3, 8, 9, 17)):
        x = torch.randn((m, case.k), generator=generator).to(dtype)
        bias = make_bias(case, generator, (F32, BF16, F16)[at % 3]) if at % 2 else None
        y = run(emulated, "stream", case, x, bias, OLD_GPU if at == 2 else GPU)
        testing.assert_within(y, *expected(case, x, bias), f"{case}, M={m}")
