"""Random packed weights, exact references, and the tolerance rule: shared by tests and bench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern.formats import (
    BitmaskWeight,
    Int4Weight,
    Int8Weight,
    PackedWeight,
    Sparse24Int4Weight,
    Sparse24Weight,
)
from llmkern.formats.int4 import pack_words
from llmkern.formats.sparse24 import pack_positions
from llmkern.ops._linear import groups

# The six ways to keep two of four columns, ascending.
PAIRS = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])


def random_weight(
    op: str, n: int, k: int, *, generator: torch.Generator, group_size: int | None = None,
    value_dtype: torch.dtype = torch.bfloat16, scale_dtype: torch.dtype = torch.float32, symmetric: bool = True,
    density: float = 0.5,
) -> PackedWeight:  # fmt: skip
    """A random packed weight [N, K] for linear op `op`, on the CPU.

    Codes and zero points cover their whole range, extremes included, and scales differ from group to group, so that a
    kernel that mixes up groups, signs or nibbles shows. The dense weight has entries of order 1. `group_size=None` is
    one group per row; `value_dtype` is for the formats with float or int8 values, `density` for bitmask_linear.
    Raises ValueError for an op that has no packed weight.
    """
    build = _BUILDERS.get(op)
    if build is None:
        raise ValueError(f"random_weight: unknown linear op {op!r}; known: {', '.join(_BUILDERS)}")
    options = {"value_dtype": value_dtype, "scale_dtype": scale_dtype, "symmetric": symmetric, "density": density}
    return build(n, k, group_size, generator, options)


def _codes(bits: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)


def _scales(
    n: int, k: int, group_size: int | None, bits: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    shape = (n, groups(k, group_size or max(k, 1)))
    return ((torch.rand(shape, generator=generator) + 0.5) / 2 ** (bits - 1)).to(dtype)


def _values(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return _codes(8, shape, generator)
    return torch.randn(shape, generator=generator).to(dtype)


def _positions(n: int, k: int, generator: torch.Generator) -> Tensor:
    picks = torch.randint(0, 6, (n, -(-k // 4)), generator=generator)
    return pack_positions(PAIRS[picks])


def _int8(n: int, k: int, group_size: int | None, generator: torch.Generator, options: dict[str, Any]) -> Int8Weight:
    tensors = {"codes": _codes(8, (n, k), generator)}
    tensors["scales"] = _scales(n, k, group_size, 8, generator, options["scale_dtype"])
    if not options["symmetric"]:
        tensors["zeros"] = _codes(8, tuple(tensors["scales"].shape), generator)
    return Int8Weight.from_tensors(tensors, group_size=group_size)


def _int4(n: int, k: int, group_size: int | None, generator: torch.Generator, options: dict[str, Any]) -> Int4Weight:
    tensors = {"words": pack_words(_codes(4, (n, k), generator))}
    tensors["scales"] = _scales(n, k, group_size, 4, generator, options["scale_dtype"])
    if not options["symmetric"]:
        tensors["zeros"] = _codes(4, tuple(tensors["scales"].shape), generator)
    return Int4Weight.from_tensors(tensors, shape=(n, k), group_size=group_size)


def _sparse24(
    n: int, k: int, group_size: int | None, generator: torch.Generator, options: dict[str, Any]
) -> Sparse24Weight:
    dtype = options["value_dtype"]
    tensors = {"values": _values((n, 2 * -(-k // 4)), generator, dtype), "positions": _positions(n, k, generator)}
    if dtype == torch.int8:
        tensors["scales"] = _scales(n, k, group_size, 8, generator, options["scale_dtype"])
    return Sparse24Weight.from_tensors(tensors, shape=(n, k), group_size=group_size)


def _sparse24_int4(
    n: int, k: int, group_size: int | None, generator: torch.Generator, options: dict[str, Any]
) -> Sparse24Int4Weight:
    tensors = {
        "words": pack_words(_codes(4, (n, 2 * -(-k // 4)), generator)),
        "positions": _positions(n, k, generator),
        "scales": _scales(n, k, group_size, 4, generator, options["scale_dtype"]),
    }
    return Sparse24Int4Weight.from_tensors(tensors, shape=(n, k), group_size=group_size)


def _bitmask(
    n: int, k: int, group_size: int | None, generator: torch.Generator, options: dict[str, Any]
) -> BitmaskWeight:
    dtype = options["value_dtype"]
    keep = torch.rand((n, k), generator=generator) < options["density"]
    # Kept zeros are legal; a row may be empty or full.
    if dtype == torch.int8:
        scales = _scales(n, k, group_size, 8, generator, options["scale_dtype"])
        dense = torch.randn((n, k), generator=generator) * keep
        return BitmaskWeight.pack(dense, mask=keep, dtype=dtype, scales=scales, group_size=group_size)
    return BitmaskWeight.pack(_values((n, k), generator, dtype) * keep, mask=keep, group_size=group_size)


_BUILDERS: dict[str, Callable[[int, int, int | None, torch.Generator, dict[str, Any]], PackedWeight]] = {
    "int8_linear": _int8,
    "int8_dynamic_linear": _int8,
    "int4_linear": _int4,
    "sparse24_linear": _sparse24,
    "sparse24_int4_linear": _sparse24_int4,
    "bitmask_linear": _bitmask,
}


def max_error(out: Tensor, exact: Tensor) -> float:
    """max |out - exact| in float64; 0 for no elements, NaN or infinity where they differ in kind."""
    if out.numel() == 0:
        return 0.0
    return float((out.double() - exact.double()).abs().max())


def relative_error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact|| (Frobenius) in float64; 0 for no elements."""
    exact = exact.double()
    norm = exact.norm()
    return float((out.double() - exact).norm() / norm) if norm > 0 else max_error(out, exact)


def exact_product(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] @ dense [N, K]ᵀ + bias in float64."""
    y = x.double() @ dense.double().T
    return y if bias is None else y + bias.double()


def product_tolerance(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    """How far each element of a kernel's x @ denseᵀ + bias may be from the float64 value; [..., N] float64.

    Twice what torch itself is off by with the same x, accumulating in fp32 and rounding the result once to x's dtype
    (the rule of FlashAttention's tests), plus one rounding of the result, plus the rounding errors of K terms as large
    as the largest, which add up like a random walk: torch may happen to be exact, and sums in another order.
    """
    exact = exact_product(x, dense, bias)
    same = x.float() @ dense.float().T
    same = (same if bias is None else same + bias.float()).to(x.dtype)
    kind = torch.finfo(x.dtype)
    largest = float(x.abs().max() * dense.abs().max()) if x.numel() and dense.numel() else 0.0
    largest = max(largest, 0.0 if bias is None or bias.numel() == 0 else float(bias.abs().max()))
    floor = 2 * torch.finfo(torch.float32).eps * largest * max(1, x.shape[-1]) ** 0.5 + kind.tiny * kind.eps
    return 2 * max_error(same, exact) + kind.eps * exact.abs() + floor


def quantize_rows_exact(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The int8 codes and scales [M, G] of x [M, K] per row and group, as float64; see int8_dynamic_linear."""
    codes = torch.zeros_like(x, dtype=torch.float64)
    scales: list[Tensor] = []
    for at in x.float().split(group_size, dim=1):
        absmax = at.abs().max(dim=1, keepdim=True).values
        step = torch.where(absmax > 0, torch.tensor(127.0) / absmax, 0.0)
        start = len(scales) * group_size
        codes[:, start : start + at.shape[1]] = torch.round(at * step).clamp(-127, 127).double()
        scales.append((absmax / 127.0).double())
    return codes, torch.cat(scales, dim=1)


def exact_integer_product(
    x: Tensor, integers: Tensor, scales: Tensor, bias: Tensor | None, x_group: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """The product with x [M, K] quantized to int8 per row and `x_group` columns: (exact [M, N], tolerance), float64.

    integers [N, K] are the weight's codes less their zero points. The dot products are integers, so the tolerance
    holds nothing but the fp32 roundings of scaling and summing them, and one rounding of the result. A kernel may
    multiply shifted codes and take the shift times the sum of x off after scaling; no shift exceeds the largest code.
    """
    codes, x_scales = quantize_rows_exact(x, x_group)
    exact = codes.new_zeros((x.shape[0], integers.shape[0]))
    size = torch.zeros_like(exact)
    for g, at in enumerate(range(0, x.shape[1], group_size)):
        a, w = codes[:, at : at + group_size], integers[:, at : at + group_size].double()
        unit = x_scales[:, at // x_group, None] * scales[:, g].double()
        dots, shift = a @ w.T, a.sum(1, keepdim=True).abs() * w.abs().amax(1)
        exact, size = exact + dots * unit, size + (dots.abs() + shift) * unit
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    kind = torch.finfo(x.dtype)
    return exact, 4 * torch.finfo(torch.float32).eps * size + kind.eps * exact.abs() + kind.tiny * kind.eps


def assert_within(out: Tensor, exact: Tensor, tolerance: Tensor, what: str = "") -> None:
    """AssertionError, naming the worst element, unless |out - exact| <= tolerance everywhere; a NaN fails."""
    if out.shape != exact.shape:
        raise AssertionError(f"{what}: shape {list(out.shape)}, expected {list(exact.shape)}")
    error = (out.double() - exact).abs()
    bad = ~(error <= tolerance)
    if bad.any():
        excess = torch.where(bad, torch.nan_to_num(error / tolerance, nan=torch.inf, posinf=1e300), 0.0)
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), error.shape))
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements are off; worst at {at}: got {float(out[at])}, "
            f"expected {float(exact[at])} within {float(tolerance[at]):.3g}"
        )
