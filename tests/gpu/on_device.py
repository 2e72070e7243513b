"""What the GPU tests share: the device, the kernels that run on it, cases, and what a result may be off by."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from cases import BF16, CASES, DTYPES, F16, F32, I8, LINEAR_CASES, LinearCase, expected, quantizes_x
from torch import Tensor

import llmkern
from llmkern import testing
from llmkern._registry import OPS

DEVICE = "cuda"  # conftest.py sets it, from --device, before it is used
LINEAR_OPS = tuple(LINEAR_CASES)
MS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 129, 257)
FEW_MS = (1, 3, 17, 65)
HALVES = (BF16, F16)

only_cuda = pytest.mark.skipif("config.getoption('--device') != 'cuda'", reason="is about CUDA")


def kernels(op: str) -> list[str]:
    """The kernels of an op that run on the device."""
    return [row.kernel for row in llmkern.kernels(op) if row.runnable and row.device in (DEVICE, "any")]


def each_kernel(*ops: str) -> pytest.MarkDecorator:
    """Parametrize with `op` and `kernel`."""
    pairs = [(op, kernel) for op in ops for kernel in kernels(op)]
    return pytest.mark.parametrize(("op", "kernel"), pairs, ids=[f"{op}-{kernel}" for op, kernel in pairs])


def each_case(*ops: str) -> pytest.MarkDecorator:
    """Parametrize with `op`, `kernel` and `case`."""
    triples = [(op, kernel, case) for op in ops for kernel in kernels(op) for case in cases(op)]
    return pytest.mark.parametrize(
        ("op", "kernel", "case"), triples, ids=[f"{op}-{kernel}-{case}" for op, kernel, case in triples]
    )


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_half = pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# N, K, group size (None: per row), symmetric: nothing divides, whole tiles, short last groups, one element left over.
SIZES: tuple[tuple[int, int, int | None, bool], ...] = (
    (1, 7, None, True), (7, 1, None, False), (33, 7, None, True), (100, 33, 32, False), (576, 100, 64, True),
    (1000, 576, 128, False), (576, 1000, 128, True), (128, 512, 32, True), (256, 1024, 128, True),
    (130, 4096, 128, False), (64, 2048, 64, False), (8, 16, None, True), (96, 1152, None, True),
)  # fmt: skip


@cache
def cases(op: str) -> tuple[LinearCase, ...]:
    """Those of every CPU kernel, and larger ones; int4 with activations kept and quantized."""
    extras: tuple[tuple[Any, ...], ...] = ((), ("int8",)) if op == "int4_linear" else ((),)
    return (*CASES[op], *(_larger(op, at, extra) for at in range(len(SIZES)) for extra in extras))


def _larger(op: str, at: int, extra: tuple[Any, ...]) -> LinearCase:
    n, k, group_size, symmetric = SIZES[at]
    scale_dtype, value_dtype = (F32, BF16, F16)[at % 3], (BF16, F16, I8, BF16)[at % 4]
    if value_dtype != I8 and op in ("sparse24_linear", "bitmask_linear"):
        group_size = None  # nothing is scaled
    return LinearCase(op, n, k, group_size, value_dtype, scale_dtype, symmetric or "sparse" in op, extra=extra)


def few_cases(op: str) -> list[LinearCase]:
    """One with odd sizes and a short last group, one of whole tiles."""
    wanted = ((33, 75), (256, 1024))
    return [next(case for case in cases(op) if (case.n, case.k) == size) for size in wanted]


def moved(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with their tensors on the device."""
    return tuple(arg.to(DEVICE) if isinstance(arg, Tensor) else arg for arg in args)


@cache
def weight_args(case: LinearCase) -> tuple[Any, ...]:
    """The op's arguments after x, on the device, without a bias."""
    return moved(case.args(torch.empty(0, case.k), None)[1:])


def bias_at(op: str) -> int:
    """Where the op's schema has its bias, x not counted."""
    return [argument.name for argument in OPS[op].op._schema.arguments].index("bias") - 1


def args_of(case: LinearCase, x: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    """The op's arguments, on the device."""
    rest, at = weight_args(case), bias_at(case.op)
    return (x, *rest[:at], bias, *rest[at + 1 :])


def refusal(op: str, kernel: str, args: tuple[Any, ...]) -> str | None:
    """Why a kernel does not take these arguments, or None."""
    table = next(row for row in OPS[op].kernels if row.name == kernel)
    return table.refusal(args[0].device.type, args)


class Runner:
    """An op on one kernel, over and over: None where the kernel refuses. `end` skips a test that never ran."""

    def __init__(self, op: str, kernel: str):
        self.op, self.kernel, self.ran, self.reasons = op, kernel, 0, set()

    def __call__(self, args: tuple[Any, ...]) -> Any:
        if reason := refusal(self.op, self.kernel, args):
            self.reasons.add(reason)
            return None
        self.ran += 1
        return call(self.op, self.kernel, args)

    def end(self) -> None:
        """To be called when all is done."""
        if not self.ran:
            pytest.skip(f"{self.op}: {self.kernel}: {'; '.join(sorted(self.reasons))}")


def call(op: str, kernel: str, args: tuple[Any, ...]) -> Any:
    """The op on that kernel. A kernel that refuses the arguments skips the test, with its reason."""
    if reason := refusal(op, kernel, args):
        pytest.skip(f"{op}: {kernel}: {reason}")
    with llmkern.force(kernel):
        return OPS[op](*args)


def rows(m: int, k: int, generator: torch.Generator, dtype: torch.dtype = F32) -> Tensor:
    """Random x [M, K] on the device."""
    return torch.randn((m, k), generator=generator).to(dtype).to(DEVICE)


def bias_of(case: LinearCase, generator: torch.Generator, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(case.n, generator=generator).to(dtype).to(DEVICE)


@cache
def dense(case: LinearCase) -> Tensor:
    """The weight, float64 [N, K], on the device."""
    return case.weight().unpack(torch.float64).to(DEVICE)


def exact_and_tolerance(case: LinearCase, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The float64 product and how far a kernel's result may be from it, [M, N].

    Integer paths: exactly the rounded activations, and no more than fp32 roundings of scaled integer sums (twice, since
    some millions of elements are looked at); one other code would be ten times that in fp32. Else twice
    what torch's own product is off by with x and the weight in x's dtype; or twice the rounding of that many weights
    and one more of the result, where torch is lucky.
    """
    if quantizes_x(case):
        exact, tolerance = expected(case, x, bias)
        return exact, 2 * tolerance
    w = dense(case)
    exact = testing.exact_product(x, w, bias)
    same = torch.nn.functional.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))
    kind = torch.finfo(x.dtype)
    walk = (x.double().square() @ w.square().T).sqrt()  # of roundings of the products' factors
    size = exact.abs() if bias is None else exact.abs() + bias.double().abs()
    floor = testing.product_tolerance(x.float(), w, None)  # of sums in fp32
    twice = torch.tensor(2 * testing.max_error(same, exact), device=x.device, dtype=torch.float64)
    return exact, torch.maximum(twice, kind.eps * walk) + kind.eps * size + floor + kind.tiny


def assert_right(case: LinearCase, x: Tensor, bias: Tensor | None, y: Tensor, what: str) -> None:
    assert y.dtype == x.dtype
    assert y.device == x.device
    testing.assert_within(y, *exact_and_tolerance(case, x, bias), what)


def result_or_error(op: str, kernel: str, args: tuple[Any, ...]) -> tuple[Any, str | None]:
    """(result, None), or (None, the message of a refusal)."""
    try:
        with llmkern.force(kernel):
            return OPS[op](*args), None
    except (ValueError, TypeError, NotImplementedError) as error:
        return None, str(error)


def taken_m(op: str, kernel: str) -> int:
    """A number of rows of x that the kernel takes for the second of few_cases; skips the test if there is none."""
    case, reason = few_cases(op)[1], None
    for m in (3, 64, 257):
        reason = refusal(op, kernel, args_of(case, torch.zeros(m, case.k, dtype=BF16, device=DEVICE)))
        if not reason:
            return m
    return pytest.skip(f"{op}: {kernel}: {reason}")
