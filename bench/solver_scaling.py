"""Seconds to solve one layer of N = K over K, factorization included: ours, the papers in plain PyTorch, and the floor.

The floor is what no order of the arithmetic goes below: N K^2 + K^3/3 floating point operations (the feedback of every
column to those after it, and one Cholesky factorization) at the speed of this machine's large fp32 product, measured in
the same run. Candidates take turns, so that all see the same load; the second moments are given, as by calibration.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import reference_solvers as reference
from bench.results import RESULTS, write
from bench.solver_peers import synthetic
from llmkern import solvers
from llmkern._dense import product
from llmkern.solvers import Hessian
from llmkern_cli._bench import plot

SIZES = (1024, 2048, 4096, 6144)
# Ours with the published algorithm and no loss, which the papers' code does not know either; ours as it is when not
# told otherwise, and without its loss; and the papers'.
CANDIDATES: dict[str, Callable[[Tensor, Tensor], Callable[[], Any]]] = {
    "gptq-int4-g128 published": lambda w, h: _ours(solvers.gptq, w, h, act_order="dynamic", clip=None, loss=False),
    "gptq-int4-g128 default": lambda w, h: _ours(solvers.gptq, w, h),
    "gptq-int4-g128 default, no loss": lambda w, h: _ours(solvers.gptq, w, h, loss=False),
    "sparsegpt-2:4 published": lambda w, h: _ours(solvers.sparsegpt, w, h, sparsity="2:4", refit=False, loss=False),
    "gptq-int4-g128 reference": lambda w, h: lambda: reference.gptq(w, h, bits=4, group_size=128),
    "sparsegpt-2:4 reference": lambda w, h: lambda: reference.sparsegpt(w, h, prune_n=2, prune_m=4),
}
FLOOR = "floor"


def _ours(solve: Callable[..., Any], w: Tensor, moment: Tensor, **options: Any) -> Callable[[], Any]:
    hessian = Hessian.from_matrix(moment)
    return lambda: solve(w, hessian, **options)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak(repeats: int = 5, size: int = 4096) -> float:
    """FLOP/s of the best of some large fp32 products."""
    a, b = torch.randn(2, size, size).unbind()
    return 2 * size**3 / min(seconds(lambda: product(a, b)) for _ in range(repeats))


def measure(size: int, repeats: int) -> tuple[list[dict[str, Any]], float]:
    """A row per candidate for N = K = size, and the peak that was seen meanwhile."""
    _, weight, moment, _ = synthetic(size, size)
    found: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    best = 0.0
    for _ in range(repeats):
        best = max(best, peak())
        for name, prepare in CANDIDATES.items():
            found[name].append(seconds(prepare(weight, moment)))
    rows = [
        {
            "candidate": name, "k": size,
            "seconds": {
                "median": round(statistics.median(times), 4), "least": round(min(times), 4),
                "greatest": round(max(times), 4),
            },
        }
        for name, times in found.items()
    ]  # fmt: skip
    return rows, best


def floor(k: int, flops: float) -> float:
    """Seconds for N = K."""
    return (k**3 + k**3 / 3) / flops


def render(rows: Sequence[dict[str, Any]]) -> str:
    """SVG: median seconds over K, both axes logarithmic; ours solid, the reference and the floor dashed."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        lines.setdefault(row["candidate"], []).append((row["k"], row["seconds"]["median"]))
    left, top, right, bottom, width = 60, 40, 430, 320, 700
    every = [second for line in lines.values() for _, second in line]
    ks = [k for k, _ in lines[FLOOR]]
    x = plot._axis(ks[0], ks[-1], left, right)
    y = plot._axis(min(every), max(every), bottom - 6, top + 6)
    parts = [f'<text class="head" x="{left}" y="20">Seconds to solve one layer, N = K, over K</text>']
    parts += [f'<text x="{x(k):.1f}" y="{bottom + 16}" text-anchor="middle">{k}</text>' for k in ks]
    parts += [
        f'<path d="M{left} {y(value):.1f}H{right}" stroke="#e1e5ea"/>'
        f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        for value in plot._ticks(min(every), max(every))
    ]
    parts.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#9aa3af"/>')
    for at, (name, line) in enumerate(sorted(lines.items(), key=lambda pair: -pair[1][-1][1])):
        colour = plot.GREY if name == FLOOR else plot.COLOURS[at]
        places = [(x(k), y(second)) for k, second in line]
        dashed = name == FLOOR or name.endswith("reference")
        parts.append(plot._drawn(name, dashed, places, colour, right + 16, top + 12 + plot.LINE * at))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 30}" '
        f'viewBox="0 0 {width} {bottom + 30}" style="background:#fff">'
        "<style>text{font:11px system-ui,sans-serif;fill:#1c2430} .head{font-size:15px;font-weight:600}</style>"
        f"{''.join(parts)}</svg>\n"
    )


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.solver_scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="N = K (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--out", default="solver_scaling", help="bench/results/OUT.json and OUT.svg (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    flops = 0.0
    for size in sorted(args.sizes):
        more, seen = measure(size, args.repeats)
        rows += more
        flops = max(flops, seen)
    for size in sorted(args.sizes):
        rows.append({"candidate": FLOOR, "k": size, "seconds": {"median": floor(size, flops)}})
    least = {row["k"]: row["seconds"]["median"] for row in rows if row["candidate"] == FLOOR}
    medians = {(row["candidate"], row["k"]): row["seconds"]["median"] for row in rows}
    for row in rows:
        name, k = row["candidate"], row["k"]
        row["over_floor"] = round(medians[name, k] / least[k], 2)
        peer = f"{name.split()[0]} reference"
        if (peer, k) in medians and name != peer:
            row["reference_ratio"] = round(medians[peer, k] / medians[name, k], 2)
        print(
            f"K {k:5} {name:26} {medians[name, k]:8.3f} s  x{row['over_floor']} of the floor"
            + (f"  reference takes x{row['reference_ratio']}" if "reference_ratio" in row else ""),
            file=sys.stderr,
        )
    # How time grows between the two largest sizes: 3 is K^2 N + K^3/3.
    *_, before, last = sorted(args.sizes)
    growth = {
        name: round(math.log(medians[name, last] / medians[name, before]) / math.log(last / before), 2)
        for name in CANDIDATES
    }
    write(args.out, {"repeats": args.repeats, "gemm_gflops": round(flops / 1e9, 1), "growth": growth, "rows": rows})
    (RESULTS / f"{args.out}.svg").write_text(render(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
