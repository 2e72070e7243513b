"""The CUDA kernels of the sparse ops on this CPU, thread by thread; see test_cuda_emulated.py."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from cases import BF16, F16, F32, I8, LinearCase
from test_cuda_emulated import GPU, OLD_GPU, emulated, run  # noqa: F401 (a fixture)
from test_ops import expected, make_bias
from torch import Tensor

from llmkern import testing

KERNELS = ("stream", "mma")


def kept_cases() -> list[LinearCase]:
    """One element, odd sizes, rows that are and are not aligned, groups of a part, a lane, a chunk and a row."""
    sizes = [(1, 1), (7, 13), (33, 75), (17, 260), (5, 144), (35, 576)]
    floats = [LinearCase("sparse24_linear", n, k, value_dtype=dtype) for n, k in sizes for dtype in (BF16, F16)]
    scaled = [
        LinearCase(op, n, k, group_size=group, value_dtype=I8, scale_dtype=scale)
        for op in ("sparse24_linear", "sparse24_int4_linear")
        for n, k, group, scale in [
            (1, 1, None, F32),
            (7, 13, None, BF16),
            (33, 75, 32, F16),
            (17, 260, 48, F32),
            (19, 260, None, F16),
            (1, 1344, 16, F32),
            (35, 576, 128, BF16),
            (18, 608, 64, F16),
            (24, 544, None, F32),
        ]
    ]
    return floats + scaled


def mask_cases() -> list[LinearCase]:
    """One element, nothing and everything kept, rows that are empty, full, or keep only their last column; groups."""
    op = "bitmask_linear"
    floats = [
        LinearCase(op, n, k, value_dtype=dtype, density=density)
        for n, k, density in ((1, 1, 1.0), (7, 13, 0.5), (33, 75, 0.0), (17, 260, 0.9), (20, 576, 0.5), (3, 1344, 0.4))
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
        LinearCase(op, 5, 1088, group_size=50, value_dtype=I8),
        *(LinearCase(op, 40, k, value_dtype=dtype, ragged=True) for k in (301, 320) for dtype in (BF16, F16)),
        LinearCase(op, 40, 301, value_dtype=I8, group_size=64, ragged=True),
        LinearCase(op, 130, 192, value_dtype=I8, group_size=20, ragged=True),
    ]


CASES = kept_cases() + mask_cases()


def check(y: Tensor, case: LinearCase, x: Tensor, bias: Tensor | None, what: str) -> None:
    """As every kernel, but where groups are small, weights are rounded to x's type: five sigma of that."""
    exact, tolerance = expected(case, x, bias)
    if case.value_dtype == I8 and x.numel():
        size = (x.double() ** 2 @ case.weight().unpack(torch.float64).T ** 2).sqrt()
        tolerance = tolerance + 1.5 * torch.finfo(x.dtype).eps * size
    testing.assert_within(y, exact, tolerance, what)


def rows_of_x(kernel: str) -> tuple[int, ...]:
    return (0, 1, 3, 8, 9, 16, 17) if kernel == "stream" else (1, 17, 33, 65, 130)


def types_of_x(case: LinearCase) -> tuple[torch.dtype, ...]:
    return (BF16, F16) if case.value_dtype == I8 else (case.value_dtype,)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in types_of_x(case)],
    ids=lambda part: f"{part.op}-{part}" if isinstance(part, LinearCase) else str(part).removeprefix("torch."),
)
@pytest.mark.usefixtures("poisoned")
def test_values(
    emulated: ModuleType, case: LinearCase, kernel: str, dtype: torch.dtype, generator: torch.Generator  # noqa: F811
) -> None:  # fmt: skip
    for at, m in enumerate(rows_of_x(kernel)):
        x = torch.randn((m, case.k), generator=generator).to(dtype)
        bias = make_bias(case, generator, (F32, BF16, F16)[at % 3]) if at % 2 else None
        y = run(emulated, kernel, case, x, bias, OLD_GPU if at == 2 else GPU)
        check(y, case, x, bias, f"{case}, M={m}")
