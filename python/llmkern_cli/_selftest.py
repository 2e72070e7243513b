"""One small case per op, and each kernel's result on it against the reference."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmkern import force, formats
from llmkern._registry import OPS
from llmkern.ops import linear_args

N, K, M, GROUP = 37, 136, 3, 64  # nothing is a multiple of a vector, and the last group is short
# A solver's column may round to the other neighbour when sums run in another order; a wrong kernel is wrong in far
# more than one element of fifty.
SOLVER_SHARE = 0.98


def check(op: str, kernel: str, device: str = "cpu") -> str:
    """ "ok", or a sentence that says what is wrong. On a GPU the linear ops get bf16 x."""
    args = cases().get(op)
    if args is None:
        return "has no self-test"
    if device == "cuda":
        args = tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)
        if op.endswith("linear"):
            args = (args[0].bfloat16(), *args[1:])
    tolerance = 2e-2 if args[0].dtype == torch.bfloat16 else 1e-3
    try:
        with force("reference"):
            wanted = _tensors(OPS[op](*args))
        with force(kernel):
            got = _tensors(OPS[op](*args))
    except Exception as error:
        return f"raised {type(error).__name__}: {error}".replace("\n", "; ")
    for mine, right in zip(got, wanted, strict=True):
        close = torch.isclose(
            mine.float(), right.float(), rtol=tolerance, atol=tolerance * float(right.float().abs().max())
        )
        if close.float().mean() < (1 if op.endswith("linear") else SOLVER_SHARE):
            return f"differs from the reference in {int((~close).sum())} of {close.numel()} elements"
    return "ok"


@cache
def cases() -> dict[str, tuple]:
    """Op -> its plain arguments."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=random)
    weight = torch.randn(N, K, generator=random)
    pairs = weight.view(N, K // 4, 4).abs().argsort(-1).argsort(-1) >= 2
    sparse24 = weight * pairs.view(N, K)
    packed = {
        "int8_linear": formats.Int8Weight.pack(weight),
        "int8_dynamic_linear": formats.Int8Weight.pack(weight),
        "int4_linear": formats.Int4Weight.pack(weight, group_size=GROUP),
        "sparse24_linear": formats.Sparse24Weight.pack(sparse24),
        "sparse24_int4_linear": formats.Sparse24Int4Weight.pack(sparse24, group_size=GROUP),
        "bitmask_linear": formats.BitmaskWeight.pack(weight * (weight.abs() > 0.6)),
    }
    bias = torch.randn(N, generator=random)
    loss = (
        x, weight, bias, x + 1, weight, bias, None, None, torch.arange(M), "jsd", 0.3, 2.0, 4.0, 0.5, 30.0, None, True,
        -100, None, None, [True, True, True],
    )  # fmt: skip
    linear = {op: linear_args(op, x, w, bias) for op, w in packed.items()}
    return {**linear, **_blocks(weight, random), "linear_kl_div": loss}


def _blocks(weight: Tensor, random: torch.Generator) -> dict[str, tuple]:
    """The solvers' ops on one block of columns, with the V of a random Hessian H = V Vᵀ, V upper triangular."""
    inputs = torch.randn(4 * K, K, generator=random)
    v = torch.linalg.cholesky((inputs.T @ inputs).flip(0, 1)).flip(0, 1)
    diagonal = v.diagonal().contiguous()
    unit = (v / diagonal).contiguous()
    importance = inputs.square().sum(0)
    groups = (torch.arange(K) // GROUP).to(torch.int32)
    with force("reference"):
        scales, zeros = OPS["scale_search"](weight, importance, GROUP, 4, False, 8, 0.5)
    return {
        "scale_search": (weight, importance, GROUP, 4, False, 8, 0.5),
        "gptq_block": (weight, weight, unit, scales, zeros, groups, None, 4),
        "sparsegpt_block": (weight, weight, unit, diagonal, None, 2, 4, scales, zeros, groups, 4),
    }


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
