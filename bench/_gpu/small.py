"""Every op on every kernel of a GPU at small sizes: `compute-sanitizer python -m bench._gpu.small`.

Weights, inputs and the comparison are on the CPU, because every kernel that torch would launch takes time under the
sanitizer. Prints each case before it runs, so that what the sanitizer reports has a name above it. Exit code 1 when a
result is wrong or a call fails.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import llmkern
from llmkern import testing
from llmkern._registry import OPS
from llmkern.ops import linear_args
from llmkern_cli import _selftest

# N, K, group size, symmetric: whole tiles, odd sizes with a short last group, less than a tile.
SIZES = ((64, 256, 128, True), (33, 100, 32, False), (7, 33, None, True))
FEWER = SIZES[1:2]
MS = (1, 3, 17, 65)
LINEAR = (
    "int4_linear",
    "int8_linear",
    "int8_dynamic_linear",
    "sparse24_linear",
    "sparse24_int4_linear",
    "bitmask_linear",
)
BLOCKS = ("gptq_block", "sparsegpt_block", "scale_search")
TOLERANCE = 0.05  # relative: the values are the tests' business


def moved(args: Sequence[Any], device: str) -> tuple[Any, ...]:
    """Arguments with their tensors on a device."""
    return tuple(arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args)


def linear_cases(op: str, sizes: Sequence[tuple[int, int, int | None, bool]], dtype: torch.dtype) -> Iterator[tuple]:
    """(what it is, arguments on the CPU)."""
    for n, k, group_size, symmetric in sizes:
        random = torch.Generator().manual_seed(n)
        values = torch.int8 if group_size == 32 and op in ("sparse24_linear", "bitmask_linear") else dtype
        weight = testing.random_weight(
            op, n, k, generator=random, group_size=group_size, symmetric=symmetric, scale_dtype=dtype,
            value_dtype=values,
        )  # fmt: skip
        for m in MS:
            x = torch.randn(m, k, generator=random).to(dtype)
            bias = torch.randn(n, generator=random).to(dtype) if m % 2 else None
            extras: tuple[tuple[Any, ...], ...] = ((None,), ("int8",)) if op == "int4_linear" else ((),)
            for extra in extras:
                yield f"{n}x{k} g{group_size} M={m} {dtype} {extra}", (*linear_args(op, x, weight, bias), *extra)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench._gpu.small", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--fewer", action="store_true", help="one size: some of the sanitizer's tools are slow")
    args = parser.parse_args(argv)
    sizes = FEWER if args.fewer else SIZES
    bad = ran = 0
    for op in (*LINEAR, *BLOCKS):
        kernels = [row.kernel for row in llmkern.kernels(op) if row.runnable and row.device == args.device]
        dtypes = (torch.bfloat16, torch.float16) if op in LINEAR else (torch.float32,)
        for kernel in kernels:
            table = next(row for row in OPS[op].kernels if row.name == kernel)
            for dtype in dtypes:
                cases = linear_cases(op, sizes, dtype) if op in LINEAR else [("block", _selftest.cases()[op])]
                for what, host in cases:
                    there = moved(host, args.device)
                    if table.refusal(args.device, there):
                        continue
                    print(f"{op} {kernel} {what}", flush=True)
                    bad += not _agrees(op, kernel, host, there)
                    ran += 1
    print(f"CASES: {ran}, WRONG: {bad}", flush=True)
    return 1 if bad else 0


def _agrees(op: str, kernel: str, host: tuple, there: tuple) -> bool:
    try:
        with llmkern.force(kernel):
            got = OPS[op](*there)
        got = [one.cpu().float() for one in ((got,) if isinstance(got, torch.Tensor) else got)]
        with llmkern.force("reference"):
            wanted = OPS[op](*host)
        wanted = [one.float() for one in ((wanted,) if isinstance(wanted, torch.Tensor) else wanted)]
    except Exception:
        traceback.print_exc()
        return False
    errors = [testing.relative_error(mine, right) for mine, right in zip(got, wanted, strict=True)]
    # A solver's mask and values may differ at ties, which the tests look at; here they only have to be of that kind.
    limit = TOLERANCE if op in LINEAR else 0.5
    if all(error <= limit for error in errors):
        return True
    print(f"  WRONG: relative errors {errors}", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
