"""Our linear ops, every kernel that can run here, against torch's dense and packed products.

Rows: `kernel` for ours, `peer` for others. `ratio_to_dense` is the median over that of torch's dense product of the
same dtype in the same interleaved run: below 1 is faster than dense. `limit_share` is the least possible time over the
median: for M <= 4, where weights come from memory, their bytes at the best read bandwidth seen; above, 2MNK operations
at the best rate seen of torch's dense product in x's dtype, and null for int8 activations. `error` is relative to the
exact product of the dequantized weight, in the Frobenius norm. Activations kept at x's precision and activations
quantized to int8 are different classes: compare within one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import llmkern
from bench import shapes, timing
from bench.results import write
from llmkern import formats
from llmkern._registry import OPS
from llmkern.formats import PackedWeight
from llmkern.ops import linear_args

# Relative error at which a result is wrong rather than rounded, by class.
TOLERANCE = {("kept", torch.float32): 1e-5, ("kept", torch.bfloat16): 1e-2, ("int8", None): 3e-2}


@dataclass
class Candidate:
    """Something to time on x [M, K]: `call(copy)` on one of `copies` of its weight, whose exact value is `dense`."""

    row: dict[str, Any]
    call: Callable[[Any], Tensor]
    copies: list[Any]
    dense: Tensor
    nbytes: int


def weights(n: int, k: int, group_size: int) -> dict[str, PackedWeight]:
    """One packed weight per op, all from the same random matrix."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    pairs = weight.view(n, -1, 4).abs().argsort(-1).argsort(-1) >= 2
    sparse24 = weight * pairs.view(n, k)
    half = weight * (weight.abs() > weight.abs().median())
    int8 = formats.Int8Weight.pack(weight)
    return {
        "int8_linear": int8,
        "int8_dynamic_linear": int8,
        "int4_linear": formats.Int4Weight.pack(weight, group_size=group_size),
        "sparse24_linear": formats.Sparse24Weight.pack(sparse24, dtype=torch.bfloat16),
        "sparse24_int4_linear": formats.Sparse24Int4Weight.pack(sparse24, group_size=group_size),
        "bitmask_linear": formats.BitmaskWeight.pack(half, dtype=torch.bfloat16),
    }


def ours(op: str, w: PackedWeight, x: Tensor, names: Sequence[str]) -> Iterator[Candidate]:
    """One candidate per kernel in `names` that takes these arguments, and int4 with int8 activations as well."""
    modes: dict[str, tuple] = {"kept": ()}
    if op == "int8_dynamic_linear":
        modes = {"int8": ()}
    elif op == "int4_linear":
        modes["int8"] = ("int8",)
    n, k = w.shape
    for activations, extra in modes.items():
        for kernel in OPS[op].kernels:
            if kernel.name not in names:
                continue
            row = _row(op=op, kernel=kernel.name, n=n, k=k, x=x, group_size=w.group_size, activations=activations)
            refusal = kernel.refusal("cpu", (*linear_args(op, x, w, None), *extra))
            if refusal:
                yield Candidate({**row, "skipped": refusal}, _no_call, [], torch.empty(0), 0)
                continue
            copies = [linear_args(op, x, _clone(w), None)[1:] for _ in range(timing.copies_for(w.nbytes, len(x)))]
            yield Candidate(row, _forced(op, kernel.name, x, extra), copies, w.unpack(), w.nbytes)


def _no_call(copy: Any) -> Tensor:
    raise AssertionError("a skipped candidate has nothing to call")


def _forced(op: str, kernel: str, x: Tensor, extra: tuple) -> Callable[[Any], Tensor]:
    run = OPS[op].op

    def call(rest: tuple) -> Tensor:
        with llmkern.force(kernel):
            return run(x, *rest, *extra)

    return call


def peers(w8: PackedWeight, w4: PackedWeight, x: Tensor) -> Iterator[Candidate]:
    """torch's own: dense in x's dtype; packed int4 and int8 for bf16, which is all they are vectorized for."""
    n, k = w4.shape
    dense = w4.unpack().to(x.dtype)
    copies = timing.copies_for(dense.nbytes, len(x))
    row = _row(op="linear", peer="torch.dense", n=n, k=k, x=x)
    yield Candidate(
        row,
        lambda w: torch.nn.functional.linear(x, w),
        [dense.clone() for _ in range(copies)],
        dense.float(),
        dense.nbytes,
    )
    if x.dtype != torch.bfloat16:
        return
    row = _row(op="int8_linear", peer="torch._weight_int8pack_mm", n=n, k=k, x=x, group_size=k)
    codes, scales = w8.tensors()["codes"], w8.tensors()["scales"].flatten().bfloat16()
    yield Candidate(
        row,
        lambda c: torch._weight_int8pack_mm(x, c, scales),
        [codes.clone() for _ in range(timing.copies_for(w8.nbytes, len(x)))],
        codes.float() * scales.float()[:, None],
        w8.nbytes,
    )
    g = w4.group_size
    row = _row(op="int4_linear", peer="torch._weight_int4pack_mm_for_cpu", n=n, k=k, x=x, group_size=g)
    if k % g or n % 16:
        yield Candidate({**row, "skipped": f"needs K % {g} == 0 and N % 16 == 0"}, _no_call, [], torch.empty(0), 0)
        return
    grid = w4.tensors()["scales"].bfloat16()
    unsigned = torch.round(w4.unpack() / w4.tensors()["scales"].repeat_interleave(g, 1)).to(torch.int32) + 8
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    grid_and_zeros = torch.stack([grid, torch.zeros_like(grid)], -1).transpose(0, 1).contiguous()
    yield Candidate(
        row,
        lambda c: torch.ops.aten._weight_int4pack_mm_for_cpu(x, c, g, grid_and_zeros),
        [words.clone() for _ in range(timing.copies_for(w4.nbytes, len(x)))],
        (unsigned - 8).float() * grid.float().repeat_interleave(g, 1),
        w4.nbytes,
    )


def _row(
    *, op: str, n: int, k: int, x: Tensor, kernel: str | None = None, peer: str | None = None,
    group_size: int | None = None, activations: str = "kept",
) -> dict[str, Any]:  # fmt: skip
    return {
        "op": op, "kernel": kernel, "peer": peer, "n": n, "k": k, "m": len(x), "group_size": group_size,
        "dtype": str(x.dtype).removeprefix("torch."), "activations": activations, "threads": torch.get_num_threads(),
        "median_us": None, "spread": None, "limit_share": None, "ratio_to_dense": None, "error": None, "skipped": None,
    }  # fmt: skip


def _clone(w: PackedWeight) -> PackedWeight:
    return replace(w, **{name: tensor.clone() for name, tensor in w.tensors().items()})  # type: ignore[type-var]


def limits() -> dict[str, float]:
    """This machine at its best, now: bytes per second of reading 1 GB, and operations per second of 2048-cubes."""
    big, square = torch.ones(250_000_000), torch.randn(2048, 2048)
    half = square.bfloat16()
    calls = {"read": big.sum, "float32": lambda: square @ square, "bfloat16": lambda: half @ half}
    best = {name: measured.least_us for name, measured in timing.interleaved(calls, seconds=1.5).items()}
    return {
        "read_gb_s": round(big.nbytes / best["read"] / 1e3, 2),
        "float32_gflop_s": round(2 * 2048**3 / best["float32"] / 1e3, 1),
        "bfloat16_gflop_s": round(2 * 2048**3 / best["bfloat16"] / 1e3, 1),
    }


def check(candidate: Candidate, x: Tensor) -> float:
    """The relative error against the exact product; raises RuntimeError when it is more than rounding."""
    exact = x.double() @ candidate.dense.double().T
    got = candidate.call(candidate.copies[0]).double()
    error = float((got - exact).norm() / exact.norm())
    kept = candidate.row["activations"] == "kept"
    if not error <= TOLERANCE[("kept", x.dtype) if kept else ("int8", None)]:
        raise RuntimeError(f"bench.linear: wrong result, relative error {error:.2e}: {candidate.row}")
    return error


def measure(candidates: list[Candidate], x: Tensor, limit: dict[str, float], seconds: float) -> list[dict[str, Any]]:
    """Check each, time all of them interleaved, and fill in the rows."""
    live = [candidate for candidate in candidates if candidate.copies]
    for candidate in live:
        candidate.row["error"] = check(candidate, x)
    calls = {str(i): timing.rotating(c.call, c.copies) for i, c in enumerate(live)}
    with torch.inference_mode():
        timings = timing.interleaved(calls, seconds=seconds)
    dense_us = next(timings[str(i)].median_us for i, c in enumerate(live) if c.row["peer"] == "torch.dense")
    for i, candidate in enumerate(live):
        row, measured = candidate.row, timings[str(i)]
        row["median_us"], row["spread"] = round(measured.median_us, 2), round(measured.spread, 3)
        row["ratio_to_dense"] = round(measured.median_us / dense_us, 3)
        least_us = None
        if row["m"] <= 4:
            least_us = candidate.nbytes / limit["read_gb_s"] / 1e3
        elif row["activations"] == "kept":
            least_us = 2 * row["m"] * row["n"] * row["k"] / limit[f"{row['dtype']}_gflop_s"] / 1e3
        if least_us is not None:
            row["limit_share"] = round(least_us / measured.median_us, 3)
    return [candidate.row for candidate in candidates]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__.split("\n")[0])
    known = [name for name in OPS if name.endswith("linear")]
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(known)} (all)")
    parser.add_argument("--shapes", default="smollm2,4096x4096", help="names or NxK, by commas (%(default)s)")
    parser.add_argument("--m", default="1,16,256", help="rows of x, by commas (%(default)s)")
    parser.add_argument("--dtype", default="float32,bfloat16", help="of x, by commas (%(default)s)")
    parser.add_argument("--group-size", type=int, default=64, help="of int4 (%(default)s)")
    parser.add_argument("--kernels", choices=["best", "all"], default="best", help="which of ours (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="per candidate and case (%(default)s)")
    parser.add_argument("--out", default="linear", help="bench/results/OUT.json (%(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.ops) - set(known):
        parser.error(f"unknown op {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    limit, rows, start = limits(), [], time.perf_counter()
    for n, k in shapes.parse(args.shapes):
        packed = weights(n, k, args.group_size)
        for dtype in args.dtype.split(","):
            for m in map(int, args.m.split(",")):
                x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
                candidates = list(peers(packed["int8_linear"], packed["int4_linear"], x))
                for op in args.ops or known:
                    candidates += ours(op, packed[op], x, _kernel_names(op, packed[op], x, args.kernels))
                rows += measure(candidates, x, limit, args.seconds)
                print(f"{n}x{k} M={m} {dtype} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    write(args.out, {"limits": limit, "rows": rows})
    print(text(rows))


def _kernel_names(op: str, w: PackedWeight, x: Tensor, which: str) -> list[str]:
    if which == "best":
        return [OPS[op].pick(*linear_args(op, x, w, None)).name]
    return [kernel.name for kernel in OPS[op].kernels if kernel.name != "reference"]


def text(rows: list[dict[str, Any]]) -> str:
    """One line per row."""
    lines = [
        f"{'op':22}{'kernel or peer':34}{'N x K':>13}{'M':>5} {'dtype':9}{'acts':5}{'us':>10}{'/dense':>8}{'limit':>7}"
    ]
    for row in rows:
        who = f"{row['op']:22}{row['kernel'] or row['peer']:34}{row['n']:>7}x{row['k']:<5}{row['m']:>5} "
        who += f"{row['dtype']:9}{row['activations']:5}"
        if row["skipped"]:
            lines.append(f"{who}  skipped: {row['skipped']}")
            continue
        share = "" if row["limit_share"] is None else f"{row['limit_share']:7.0%}"
        lines.append(f"{who}{row['median_us']:10.1f}{row['ratio_to_dense']:8.2f}{share}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
