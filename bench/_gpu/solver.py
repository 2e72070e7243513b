"""The solvers on a GPU: a block of 128 columns per kernel, and a whole layer beside the published algorithm in PyTorch.

`python -m bench._gpu.solver DEVICE JOURNAL` writes a line per row.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmkern
from bench import reference_solvers
from bench._gpu.clock import Clock
from bench._gpu.journal import Journal
from llmkern import ops, solvers
from llmkern.solvers import Hessian
from llmkern.solvers.solution import relative_loss

ROWS, COLUMNS, SIDE, GROUP_SIZE = 7168, 128, 4096, 128
TINY_ROWS, TINY_SIDE = 64, 128
BLOCK_US, GPTQ_MS, SPARSE_MS = 40.0, 12.0, 15.0  # what must be reached on an H100
REPEATS = 7

Row = dict[str, Any]


def correlated(k: int, device: str) -> Tensor:
    """A Hessian [K, K] of inputs whose columns have something in common."""
    random = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(2 * k, k, generator=random, device=device)
    inputs += 0.5 * inputs[:, :1] + 0.2 * inputs.roll(1, 1)
    return inputs.T @ inputs / len(inputs)


def row(what: str, kernel: str | None, shape: tuple[int, int], wanted: float | None) -> Row:
    return {
        "what": what, "kernel": kernel, "n": shape[0], "k": shape[1], "median_us": None, "spread": None,
        "wanted_us": wanted, "met": None, "loss": None, "reference_us": None, "reference_loss": None, "skipped": None,
    }  # fmt: skip


def block_calls(n: int, device: str) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """what -> (op, arguments) of one block."""
    random = torch.Generator(device).manual_seed(1)
    w = torch.randn(n, COLUMNS, generator=random, device=device)
    factor = Hessian.from_matrix(correlated(COLUMNS, device)).factor(None, 0.01)
    v, diagonal = factor.unit.contiguous(), factor.diagonal.contiguous()
    scales = w.abs().amax(1, keepdim=True) / 7
    groups = torch.zeros(COLUMNS, dtype=torch.int32, device=device)
    mask = torch.rand(n, COLUMNS, generator=random, device=device) < 0.5
    grid = (scales, None, groups)
    return {
        "gptq int4": ("gptq_block", (w, w, v, *grid, None, 4)),
        "sparsegpt 2:4": ("sparsegpt_block", (w, w, v, diagonal, None, 2, 4, None, None, None, 0)),
        "sparsegpt 2:4 int4": ("sparsegpt_block", (w, w, v, diagonal, None, 2, 4, *grid, 4)),
        "sparsegpt mask": ("sparsegpt_block", (w, w, v, diagonal, mask, 0, 1, None, None, None, 0)),
    }


def blocks(clock: Clock, n: int) -> Iterator[Row]:
    """Every block on every kernel of the device; the one that would run unforced has the goal."""
    for what, (op, args) in block_calls(n, clock.device).items():
        picked = ops.OPS[op].pick(*args).name
        names = [one.kernel for one in llmkern.kernels(op) if one.runnable and one.device == clock.device]
        for kernel in dict.fromkeys((picked, *names)):
            found = row(f"block {what}", kernel, (n, COLUMNS), BLOCK_US if kernel == picked else None)
            try:
                with llmkern.force(kernel):
                    call = _bound(op, args)
                    took = clock.estimate(call)
                    run = clock.capture([call], took)
                    timing = clock.interleaved({"it": run}, 0.05)["it"]
                found.update(median_us=round(timing.median_us, 2), spread=round(timing.spread, 3), timed=run.how)
            except Exception as error:
                found["skipped"] = f"{type(error).__name__}: {error}"[:300]
            yield found


def _bound(op: str, args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: ops.OPS[op](*args)


LAYERS: dict[str, tuple[Callable[[Tensor, Hessian], Any], str | None, float | None]] = {
    "gptq int4 g128, as published": (
        lambda w, h: solvers.gptq(w, h, group_size=GROUP_SIZE, act_order=None, clip=None), "gptq", GPTQ_MS,
    ),
    "gptq int4 g128": (lambda w, h: solvers.gptq(w, h, group_size=GROUP_SIZE), None, None),
    "sparsegpt 2:4, as published": (
        lambda w, h: solvers.sparsegpt(w, h, sparsity="2:4", refit=False), "sparsegpt", SPARSE_MS,
    ),
    "sparsegpt 2:4": (lambda w, h: solvers.sparsegpt(w, h, sparsity="2:4"), None, None),
}  # fmt: skip


def layers(clock: Clock, side: int) -> Iterator[Row]:
    """A whole layer, the Hessian given: its factor, and everything after."""
    random = torch.Generator(clock.device).manual_seed(2)
    w = torch.randn(side, side, generator=random, device=clock.device)
    matrix = correlated(side, clock.device)
    for what, (solve, published, wanted) in LAYERS.items():
        found = row(f"layer {what}", None, (side, side), None if wanted is None else wanted * 1e3)
        try:
            times, solution = [], None
            for _ in range(REPEATS):
                hessian = Hessian.from_matrix(matrix)  # a fresh one: it keeps its factor
                clock.sync()
                start = time.perf_counter()
                solution = solve(w, hessian)
                clock.sync()
                times.append((time.perf_counter() - start) * 1e6)
            times.sort()
            found.update(
                median_us=round(statistics.median(times), 1), spread=round((times[-2] - times[1]) / times[3], 3),
                loss=float(solution.loss),
            )  # fmt: skip
            if published:
                found.update(_published(clock, published, w, matrix))
        except Exception as error:
            found["skipped"] = f"{type(error).__name__}: {error}"[:300]
        yield found


def _published(clock: Clock, name: str, w: Tensor, matrix: Tensor) -> Row:
    """The reference's time, once, and its loss."""
    clock.sync()
    start = time.perf_counter()
    if name == "gptq":
        result = reference_solvers.gptq(w, matrix, bits=4, group_size=GROUP_SIZE)
    else:
        result = reference_solvers.sparsegpt(w, matrix, prune_n=2, prune_m=4)
    clock.sync()
    took = time.perf_counter() - start
    return {
        "reference_us": round(took * 1e6),
        "reference_loss": relative_loss(w, result.weight, Hessian.from_matrix(matrix)),
    }


@torch.inference_mode()
def main(device: str, journal: Journal) -> None:
    clock = Clock(device)
    clock.settle()
    cuda = device == "cuda"
    done = {(entry["row"]["what"], entry["row"]["kernel"]) for entry in journal.read() if "row" in entry}
    for found in (*blocks(clock, ROWS if cuda else TINY_ROWS), *layers(clock, SIDE if cuda else TINY_SIDE)):
        if (found["what"], found["kernel"]) in done:
            continue
        if not cuda:
            found["wanted_us"] = None
        if found["wanted_us"] and found["median_us"]:
            found["met"] = found["median_us"] <= found["wanted_us"]
        journal.write(row=found)
        print(found, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Journal(Path(sys.argv[2])))
