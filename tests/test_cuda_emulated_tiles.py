"""The CUDA kernels for many rows of x on this CPU (see test_cuda_emulated.py), and which kernel suits which sizes."""

from __future__ import annotations

from types import ModuleType

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
IDS = ["bfloat16", "float16"]
# Every instance, with as many rows of x as it takes and with a few less; clusters of two and of four blocks.
PLANS = {
    "mma": [Plan(4, 4, 1), Plan(4, 3, 2), Plan(4, 1, 4), Plan(8, 8, 1), Plan(8, 5, 2), Plan(8, 6, 1), Plan(8, 7, 2)],
    "wgmma": [Plan(8, 8, 1), Plan(8, 8, 4), Plan(8, 10, 2), Plan(8, 12, 1), Plan(8, 16, 2), Plan(16, 16, 1)],
}


def codes_cases(op: str) -> list[LinearCase]:
    """Odd sizes; rows that are and are not aligned; groups of a part of a stage, of a stage and of more; short ends."""
    return [
        LinearCase(op, 1, 1),
        LinearCase(op, 130, 75, group_size=32, scale_dtype=F16, symmetric=False),
        LinearCase(op, 131, 260, group_size=64, symmetric=False),
        LinearCase(op, 65, 352, group_size=96, scale_dtype=BF16, symmetric=False),
        LinearCase(op, 66, 704, group_size=128, scale_dtype=BF16),
        LinearCase(op, 258, 544),
    ]


def check(
    module: ModuleType, kernel: str, plan: Plan, case: LinearCase, x: Tensor, bias: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The kernel's result with these sizes against the exact one."""
    monkeypatch.setattr(_cuda, "codes_plan", lambda *_, **__: plan)
    y = run(module, kernel, case, x, bias)
    testing.assert_within(y, *expected(case, x, bias), f"{kernel}, {plan}, {case}, M={len(x)}")


@pytest.mark.parametrize("dtype", [BF16, F16], ids=IDS)
@pytest.mark.parametrize("kernel", ["mma", "wgmma"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("poisoned")
def test_every_instance(
    emulated: ModuleType, op: str, kernel: str, dtype: torch.dtype, generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for at, plan in enumerate(PLANS[kernel]):
        case = codes_cases(op)[1 + (at + (dtype == F16)) % 5]
        m = 8 * plan.token_tiles + (1 if at % 2 else -3)
        x = torch.randn((m, case.k), generator=generator).to(dtype)
        bias = make_bias(case, generator, (F32, BF16, F16)[at % 3]) if at % 2 else None
        check(emulated, kernel, plan, case, x, bias, monkeypatch)
