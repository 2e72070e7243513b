"""What the op tests and the bench run on: weights of every format and option, and inputs of every layout."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from loss_cases import KL_CASES
from torch import Tensor

from llmkern import testing
from llmkern.formats import BitmaskWeight, PackedWeight
from llmkern.ops import linear_args
from llmkern.testing import random_weight

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
DTYPES = (F32, BF16, F16)
ROWS_OF_X = (0, 1, 3, 8, 17, 65)


@dataclass(frozen=True)
class LinearCase:
    """One packed weight of a linear op. `extra` are the op's arguments after group_size."""

    op: str
    n: int
    k: int
    group_size: int | None = None
    value_dtype: torch.dtype = BF16
    scale_dtype: torch.dtype = F32
    symmetric: bool = True
    density: float = 0.5
    ragged: bool = False  # bitmask: an empty row, a full row, and one that keeps only its last column
    extra: tuple[Any, ...] = field(default=())

    def __str__(self) -> str:
        words = [f"{self.n}x{self.k}", f"g{self.group_size or 'row'}", *(str(part) for part in self.extra)]
        words += [str(kind).removeprefix("torch.") for kind in (self.value_dtype, self.scale_dtype)]
        words += ["" if self.symmetric else "asym", "ragged" if self.ragged else "", f"d{self.density}"]
        return "-".join(word for word in words if word)

    def weight(self) -> PackedWeight:
        """The weight; the same for every caller."""
        return _weight(self)

    def args(self, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        """The arguments of torch.ops.llmkern.<op>."""
        return (*linear_args(self.op, x, self.weight(), bias), *self.extra)


@cache
def _weight(case: LinearCase) -> PackedWeight:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.op} {case}".encode()))
    if case.ragged:
        return _ragged(case, generator)
    return random_weight(
        case.op, case.n, case.k, generator=generator, group_size=case.group_size, value_dtype=case.value_dtype,
        scale_dtype=case.scale_dtype, symmetric=case.symmetric, density=case.density,
    )  # fmt: skip


def _ragged(case: LinearCase, generator: torch.Generator) -> BitmaskWeight:
    density = torch.rand((case.n, 1), generator=generator)
    keep = torch.rand((case.n, case.k), generator=generator) < density
    keep[0] = False
    keep[1] = True
    keep[2] = torch.arange(case.k) == case.k - 1
    dense = torch.randn((case.n, case.k), generator=generator) * keep
    return BitmaskWeight.pack(dense, mask=keep, dtype=case.value_dtype, group_size=case.group_size)


def _integer_cases(op: str, *extra: Any) -> list[LinearCase]:
    """N, K and groups: one element, odd sizes, whole registers, short last groups, groups of one column."""
    return [
        LinearCase(op, 1, 1, extra=extra),
        LinearCase(op, 7, 13, scale_dtype=BF16, symmetric=False, extra=extra),
        LinearCase(op, 7, 13, group_size=1, extra=extra),
        LinearCase(op, 33, 75, group_size=32, scale_dtype=F16, extra=extra),
        LinearCase(op, 33, 75, group_size=20, symmetric=False, extra=extra),
        LinearCase(op, 33, 75, group_size=75, scale_dtype=F16, symmetric=False, extra=extra),
        LinearCase(op, 64, 576, group_size=128, scale_dtype=BF16, extra=extra),
        LinearCase(op, 64, 576, extra=extra),
        LinearCase(op, 64, 576, group_size=64, symmetric=False, extra=extra),
        LinearCase(op, 17, 260, group_size=100, scale_dtype=F16, symmetric=False, extra=extra),
        LinearCase(op, 129, 260, group_size=32, extra=extra),
        LinearCase(op, 5, 2085, group_size=128, symmetric=False, extra=extra),
        LinearCase(op, 70, 1501, group_size=1000, symmetric=False, extra=extra),
    ]


def _sparse24_cases() -> list[LinearCase]:
    op = "sparse24_linear"
    floats = [
        LinearCase(op, n, k, value_dtype=dtype)
        for n, k in ((1, 1), (7, 13), (33, 75), (64, 576), (17, 260), (5, 2085))
        for dtype in DTYPES
    ]
    return [
        *floats,
        LinearCase(op, 1, 1, value_dtype=I8),
        LinearCase(op, 7, 13, group_size=4, value_dtype=I8, scale_dtype=BF16),
        LinearCase(op, 33, 75, group_size=32, value_dtype=I8, scale_dtype=F16),
        LinearCase(op, 33, 75, group_size=75, value_dtype=I8),
        LinearCase(op, 64, 576, group_size=128, value_dtype=I8),
        LinearCase(op, 17, 260, group_size=36, value_dtype=I8, scale_dtype=BF16),
        LinearCase(op, 129, 260, value_dtype=I8, scale_dtype=F16),
        LinearCase(op, 5, 2085, group_size=64, value_dtype=I8),
    ]


def _sparse24_int4_cases() -> list[LinearCase]:
    op = "sparse24_int4_linear"
    return [
        LinearCase(op, 1, 1),
        LinearCase(op, 7, 13, group_size=4, scale_dtype=BF16),
        LinearCase(op, 33, 75, group_size=32, scale_dtype=F16),
        LinearCase(op, 33, 75, group_size=20),
        LinearCase(op, 33, 75, group_size=75, scale_dtype=BF16),
        LinearCase(op, 64, 576, group_size=128),
        LinearCase(op, 17, 260, group_size=100, scale_dtype=F16),
        LinearCase(op, 129, 260),
        LinearCase(op, 5, 2085, group_size=128),
    ]


def _bitmask_cases() -> list[LinearCase]:
    op = "bitmask_linear"
    floats = [
        LinearCase(op, n, k, value_dtype=dtype, density=density)
        for n, k, density in ((1, 1, 1.0), (7, 13, 0.5), (33, 75, 0.3), (64, 576, 0.5), (17, 260, 0.9), (5, 2085, 0.5))
        for dtype in DTYPES
    ]
    return [
        *floats,
        LinearCase(op, 1, 1, value_dtype=I8, density=1.0),
        LinearCase(op, 7, 13, group_size=3, value_dtype=I8, scale_dtype=BF16),
        LinearCase(op, 33, 75, group_size=1, value_dtype=I8),
        LinearCase(op, 33, 75, group_size=32, value_dtype=I8, scale_dtype=F16),
        LinearCase(op, 64, 576, group_size=128, value_dtype=I8),
        LinearCase(op, 17, 260, group_size=50, value_dtype=I8, scale_dtype=BF16, density=0.9),
        LinearCase(op, 129, 260, value_dtype=I8, scale_dtype=F16),
        LinearCase(op, 5, 2085, group_size=100, value_dtype=I8),
        LinearCase(op, 33, 75, value_dtype=BF16, density=0.0),
        LinearCase(op, 33, 75, value_dtype=F32, density=1.0),
        LinearCase(op, 40, 301, value_dtype=F32, ragged=True),
        LinearCase(op, 40, 301, value_dtype=I8, group_size=64, ragged=True),
    ]


LINEAR_CASES: dict[str, list[LinearCase]] = {
    "int8_linear": _integer_cases("int8_linear"),
    "int8_dynamic_linear": _integer_cases("int8_dynamic_linear"),
    "int4_linear": _integer_cases("int4_linear") + _integer_cases("int4_linear", "int8"),
    "sparse24_linear": _sparse24_cases(),
    "sparse24_int4_linear": _sparse24_int4_cases(),
    "bitmask_linear": _bitmask_cases(),
}
INTEGER_OPS = ("int8_dynamic_linear",)  # those that always quantize x; int4_linear does with extra ("int8",)


def quantizes_x(case: LinearCase) -> bool:
    """Whether the op rounds x to int8 for this case."""
    return case.op in INTEGER_OPS or case.extra == ("int8",)


def integers(case: LinearCase) -> Tensor:
    """The codes of an int4 or int8 case less their zero points, float64 [N, K]."""
    w = case.weight()
    found = (w.codes if isinstance(w.codes, Tensor) else w.codes()).double()
    if w.zeros is not None:
        found -= w.zeros.double().repeat_interleave(w.group_size, dim=1)[:, : case.k]
    return found


def expected(case: LinearCase, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(exact, tolerance) of a case, float64 [..., N], on x's device."""
    w = case.weight()
    if not quantizes_x(case):
        dense = w.unpack(torch.float64).to(x.device)
        return testing.exact_product(x, dense, bias), testing.product_tolerance(x, dense, bias)
    x_group = w.group_size if case.op == "int4_linear" else case.k
    exact, tolerance = testing.exact_integer_product(
        x.reshape(-1, case.k), integers(case).to(x.device), w.scales.to(x.device), bias, x_group, w.group_size
    )
    shape = (*x.shape[:-1], case.n)
    return exact.reshape(shape), tolerance.reshape(shape)


def inputs(k: int, generator: torch.Generator) -> dict[str, Tensor]:
    """x of every rank and layout, fp32 [..., K]."""

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "1-D": x(k),
        "2-D": x(5, k),
        "3-D": x(2, 3, k),
        "4-D with an empty dim": x(2, 0, 3, k),
        "transposed": x(k, 5).T,
        "every second column": x(4, 2 * k)[:, ::2],
        "every second row": x(8, k)[::2],
        "a slice of wider rows": x(5, k + 7)[:, 3 : 3 + k],
        "expanded rows": x(1, k).expand(6, k),
        "expanded columns": x(4, 1).expand(4, k),
        "permuted 3-D": x(3, 2, k).permute(1, 0, 2),
    }


@dataclass(frozen=True)
class BlockCase:
    """One block of columns for gptq_block (prune_m = 0 and no mask kind) or sparsegpt_block."""

    n: int
    b: int
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    mask: float | None = None  # share of columns kept, None for no mask
    prune: tuple[int, int] = (0, 1)
    compensated: bool = False  # earlier blocks have moved wc away from w

    def __str__(self) -> str:
        words = [f"{self.n}x{self.b}", f"int{self.bits}", f"g{self.group_size}", "" if self.symmetric else "asym"]
        words += [f"mask{self.mask}" if self.mask is not None else "", f"{self.prune[0]}of{self.prune[1]}"]
        return "-".join(word for word in words if word) + ("-compensated" if self.compensated else "")

    def tensors(self, generator: torch.Generator) -> dict[str, Tensor | None]:
        """w, wc, v (unit upper), diagonal, scales, zeros, groups, mask; H = V Vᵀ is that of correlated inputs."""
        n, b = self.n, self.b
        inputs_ = torch.randn(4 * b, b, generator=generator, dtype=torch.float64)
        inputs_ = inputs_ @ (torch.eye(b) + 0.3 * torch.randn(b, b, generator=generator)).double()
        hessian = inputs_.T @ inputs_ / (4 * b) + 0.01 * torch.eye(b)
        upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)  # H = V Vᵀ, V upper triangular
        diagonal = upper.diagonal()
        w = torch.randn(n, b, generator=generator)
        n_groups = -(-b // self.group_size)
        scales = (torch.rand(n, n_groups, generator=generator) + 0.5) * (4 / 2**self.bits)
        half = max(1, 2**self.bits // 2)
        zeros = torch.randint(-half, half, (n, n_groups), generator=generator).to(torch.int8)
        return {
            "w": w,
            "wc": w + 0.1 * torch.randn(n, b, generator=generator) if self.compensated else w.clone(),
            "v": (upper / diagonal).float().contiguous(),
            "diagonal": diagonal.float().contiguous(),
            "scales": scales if self.bits else None,
            "zeros": zeros if self.bits and not self.symmetric else None,
            "groups": (torch.arange(b) // self.group_size).int() if self.bits else None,
            "mask": None if self.mask is None else torch.rand(n, b, generator=generator) < self.mask,
        }


GPTQ_CASES = [
    BlockCase(1, 1),
    BlockCase(7, 13, symmetric=False),
    BlockCase(33, 75, group_size=32, compensated=True),
    BlockCase(64, 128, bits=8),
    BlockCase(17, 128, bits=3, group_size=40, symmetric=False, compensated=True),
    BlockCase(65, 96, bits=2, group_size=16),
    BlockCase(33, 128, mask=0.5, compensated=True),
    BlockCase(33, 64, mask=0.0),
    BlockCase(5, 128, mask=0.7, symmetric=False, group_size=50),
    BlockCase(0, 16),
]
SPARSEGPT_CASES = [
    BlockCase(1, 1, bits=0, mask=0.5),
    BlockCase(7, 12, bits=0, prune=(2, 4)),
    BlockCase(33, 128, bits=0, prune=(2, 4), compensated=True),
    BlockCase(33, 128, bits=0, prune=(1, 4)),
    BlockCase(17, 128, bits=0, prune=(4, 8), compensated=True),
    BlockCase(9, 128, bits=0, prune=(20, 64)),
    BlockCase(65, 75, bits=0, mask=0.5, compensated=True),
    BlockCase(17, 128, bits=0, mask=1.0),
    BlockCase(17, 20, bits=0, prune=(0, 4)),
    BlockCase(17, 20, bits=0, prune=(4, 4)),
    BlockCase(33, 128, bits=4, prune=(2, 4), compensated=True),
    BlockCase(17, 64, bits=4, prune=(2, 4), group_size=16, symmetric=False),
    BlockCase(33, 75, bits=3, mask=0.5, group_size=32),
    BlockCase(7, 40, bits=8, mask=0.5, symmetric=False, group_size=8),
    BlockCase(0, 16, bits=0, prune=(2, 4)),
]


@dataclass(frozen=True)
class SearchCase:
    """One scale_search."""

    n: int
    k: int
    group_size: int
    bits: int = 4
    symmetric: bool = True
    steps: int = 20
    smallest: float = 0.5
    zero_rows: bool = False

    def __str__(self) -> str:
        words = [f"{self.n}x{self.k}", f"g{self.group_size}", f"int{self.bits}", "sym" if self.symmetric else "asym"]
        return "-".join(words) + f"-{self.steps}x{self.smallest}" + ("-zeros" if self.zero_rows else "")

    def tensors(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """w [N, K] with outliers and importance [K]."""
        w = torch.randn(self.n, self.k, generator=generator)
        w = w * (1 + 4 * (torch.rand(self.n, self.k, generator=generator) < 0.02))
        if self.zero_rows:
            w[::2] = 0
        return w, torch.rand(self.k, generator=generator) ** 2


SEARCH_CASES = [
    SearchCase(1, 1, 1),
    SearchCase(7, 13, 13, symmetric=False),
    SearchCase(33, 75, 32),
    SearchCase(33, 75, 20, symmetric=False),
    SearchCase(16, 576, 128, bits=3),
    SearchCase(17, 260, 260, bits=8, symmetric=False, steps=1),
    SearchCase(17, 260, 4, bits=2, steps=5, smallest=0.3),
    SearchCase(9, 64, 32, zero_rows=True),
    SearchCase(9, 64, 32, zero_rows=True, symmetric=False),
    SearchCase(0, 16, 8),
]

CASES: dict[str, list] = {
    **LINEAR_CASES,
    "gptq_block": GPTQ_CASES,
    "sparsegpt_block": SPARSEGPT_CASES,
    "scale_search": SEARCH_CASES,
    "linear_kl_div": KL_CASES,
}
