"""Our linear ops as candidates: the kernel that would run, or every kernel that can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import llmkern
from llmkern._registry import OPS
from llmkern.ops import linear_args
from llmkern_cli._bench.candidate import KEPT, PER_GROUP, PER_ROW, Candidate, row
from llmkern_cli._bench.weights import Weights


class Variant(NamedTuple):
    """An op on one of `Weights.packed`, with further arguments."""

    op: str
    weight: str
    values: str
    activations: str = KEPT
    extra: tuple = ()


VARIANTS = (
    Variant("int8_linear", "int8", "int8"),
    Variant("int8_dynamic_linear", "int8", "int8", PER_ROW),
    Variant("int4_linear", "int4", "int4"),
    Variant("int4_linear", "int4", "int4", PER_GROUP, ("int8",)),
    Variant("sparse24_linear", "sparse24", "bfloat16"),
    Variant("sparse24_int4_linear", "sparse24_int4", "int4"),
    Variant("bitmask_linear", "bitmask", "bfloat16"),
    Variant("bitmask_linear", "bitmask_int8", "int8"),
)
OP_NAMES = tuple(dict.fromkeys(variant.op for variant in VARIANTS))


def candidates(weights: Weights, dtype: torch.dtype, ops: Sequence[str], kernels: str) -> Iterator[Candidate]:
    """kernels: "best" is the one that runs, called as a user does; "all" every one but the reference, forced."""
    for variant in VARIANTS:
        if variant.op not in ops:
            continue
        weight, table = weights.packed[variant.weight], OPS[variant.op].kernels
        x = torch.zeros(1, weights.shape[1], dtype=dtype, device=weights.device)
        sample = (*linear_args(variant.op, x, weight, None), *variant.extra)
        picked = OPS[variant.op].pick(*sample)
        device = x.device.type
        here = [kernel.name for kernel in table if kernel.device in (device, "any") and kernel.name != "reference"]
        names = [picked.name] if kernels == "best" else here
        refusals = {kernel.name: kernel.refusal(device, sample) for kernel in table}
        for name in names:
            made = _candidate(variant, weights, dtype, name, forced=kernels == "all")
            if refusal := refusals[name]:
                made.skip(refusal)
            yield made


def _candidate(variant: Variant, weights: Weights, dtype: torch.dtype, kernel: str, *, forced: bool) -> Candidate:
    run, weight = OPS[variant.op].op, weights.packed[variant.weight]
    n, k = weight.shape

    def kernel_at(x: Tensor) -> str:
        return OPS[variant.op].pick(*linear_args(variant.op, x, weight, None), *variant.extra).name

    def build(number: int) -> tuple:
        tensors = {name: tensor.clone() for name, tensor in weight.tensors().items()}
        copy: Any = replace(weight, **tensors)  # type: ignore[type-var]
        return (*copy.op_args(None), *variant.extra)

    def bind(rest: tuple, x: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            return run(x, *rest)

        def call_forced() -> Tensor:
            with llmkern.force(kernel):
                return run(x, *rest)

        return call_forced if forced else call

    activations = variant.activations
    if activations == PER_GROUP and weight.group_size > 128:
        activations = PER_ROW
    kept = (k + 3) // 4 * 2 * n if variant.weight.startswith("sparse24") else n * k
    if variant.weight.startswith("bitmask"):
        kept = weight.tensors()["values"].numel()
    described = row(
        op=variant.op, kernel=kernel, shape=weight.shape, dtype=dtype, group_size=weight.group_size,
        activations=activations, values=variant.values,
    )  # fmt: skip
    return Candidate(
        described, dtype, build, bind, weights.exact(variant.weight), weight.nbytes, kept,
        kernel_at=None if forced else kernel_at,
    )  # fmt: skip
