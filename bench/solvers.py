"""Seconds to solve all 210 linear layers of SmolLM2-135M, Hessians given: the published algorithms in plain PyTorch
(bench.reference_solvers) against ours.

`reference` factors every layer's Hessian and loops over columns in Python; `same` is the same algorithm in ours,
`default` what `llmkern.solvers` does when not told otherwise (static groups in activation order, weighted clip;
least-squares refit). All of a block's layers are solved by each in turn, so that all see the same load; seconds are
summed over the blocks, per repeat. `loop` is the loops over the columns of a block of 128 alone, on both sides without
the product that joins blocks; ours has its scales at hand, the reference finds one per 64 columns in the loop.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import reference_solvers as reference
from bench.results import write
from llmkern import data, ops, solvers
from llmkern.models import load_model
from llmkern.solvers import Hessian
from llmkern.solvers._checks import Pattern
from llmkern.solvers.columns import blocks as blocks_of
from llmkern.solvers.columns import keep_all_but, optimal
from llmkern.solvers.grid import find_grid
from llmkern.solvers.solution import relative_loss

SHARED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
GROUP_SIZE = 64


class Shared(NamedTuple):
    """Layers that read the same input, and its Hessian."""

    weights: list[Tensor]
    matrix: Tensor


class Method(NamedTuple):
    """One algorithm: the peer and ours, on one weight."""

    reference: Callable[[Tensor, Tensor], reference.Result]
    same: Callable[[Tensor, Hessian], Any]
    default: Callable[[Tensor, Hessian], Any]
    loop: Callable[[Tensor, Hessian], Callable[[], Any]]


def column_blocks(w: Tensor, hessian: Hessian) -> list[tuple[Tensor, Tensor, Tensor, slice]]:
    """Per block of columns: w, its block of V', the diagonal of V, and where it is; all contiguous."""
    factor = hessian.factor(None, 0.01)
    return [
        (w[:, at].contiguous(), factor.unit[at, at].contiguous(), factor.diagonal[at].contiguous(), at)
        for at in blocks_of(w.shape[1])
    ]


def gptq_loop(w: Tensor, hessian: Hessian) -> Callable[[], Any]:
    """GPTQ's loop over the columns of every block."""
    grid = find_grid(w, None, bits=4, group_size=GROUP_SIZE, symmetric=True, clip=None)
    groups, parts = grid.groups(None, w.shape[1]), column_blocks(w, hessian)
    return lambda: [
        ops.gptq_block(part, part, unit, grid.scales, None, groups[at], None, 4) for part, unit, _, at in parts
    ]


def sparsegpt_loop(pattern: Pattern) -> Callable[[Tensor, Hessian], Callable[[], Any]]:
    """SparseGPT's loop over the columns of every block, with its choice of the mask."""

    def one(part: Tensor, unit: Tensor, diagonal: Tensor) -> Any:
        kept = None
        if not pattern.m:
            score = (optimal(part, part, unit) * diagonal).square_()
            kept = keep_all_but(score, round(pattern.fraction * part.numel()))
        return ops.sparsegpt_block(part, part, unit, diagonal, kept, pattern.n, pattern.m, None, None, None, 0)

    def prepare(w: Tensor, hessian: Hessian) -> Callable[[], Any]:
        parts = column_blocks(w, hessian)
        return lambda: [one(part, unit, diagonal) for part, unit, diagonal, _ in parts]

    return prepare


METHODS = {
    "gptq-int4-g64": Method(
        lambda w, h: reference.gptq(w, h, bits=4, group_size=GROUP_SIZE),
        lambda w, h: solvers.gptq(w, h, bits=4, group_size=GROUP_SIZE, act_order="dynamic", clip=None, loss=False),
        lambda w, h: solvers.gptq(w, h, bits=4, group_size=GROUP_SIZE),
        gptq_loop,
    ),
    "sparsegpt-0.5": Method(
        lambda w, h: reference.sparsegpt(w, h, sparsity=0.5),
        lambda w, h: solvers.sparsegpt(w, h, sparsity=0.5, refit=False, loss=False),
        lambda w, h: solvers.sparsegpt(w, h, sparsity=0.5),
        sparsegpt_loop(Pattern(0.5)),
    ),
    "sparsegpt-2:4": Method(
        lambda w, h: reference.sparsegpt(w, h, prune_n=2, prune_m=4),
        lambda w, h: solvers.sparsegpt(w, h, sparsity="2:4", refit=False, loss=False),
        lambda w, h: solvers.sparsegpt(w, h, sparsity="2:4"),
        sparsegpt_loop(Pattern(0.5, 2, 4)),
    ),
}


def collect(windows: int) -> list[list[Shared]]:
    """Per block the weights and Hessians of the dense model, from `windows` windows of 512 calibration tokens."""
    model, tokenizer = load_model("smollm2")
    ids = data.calibration_windows(data.token_ids(tokenizer, data.builtin_text()), windows, 512)
    blocks, hooks = [], []
    for block in model.model.layers:
        layers = {name.rsplit(".", 1)[-1]: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        shared = []
        for names in SHARED:
            hessian = Hessian(layers[names[0]].in_features)
            hooks.append(layers[names[0]].register_forward_pre_hook(lambda _, x, h=hessian: h.add(x[0]) and None))
            shared.append(([layers[name].weight.detach().clone() for name in names], hessian))
        blocks.append(shared)
    for rows in ids.split(4):
        model(input_ids=rows, use_cache=False)
    return [[Shared(weights, hessian.matrix()) for weights, hessian in shared] for shared in blocks]


def check(method: str, block: Sequence[Shared]) -> None:
    """Raise unless `same` loses as little as the reference on every layer of a block (codes at ties may differ)."""
    for shared in block:
        hessian = Hessian.from_matrix(shared.matrix)
        for w in shared.weights:
            theirs = relative_loss(w, METHODS[method].reference(w, shared.matrix).weight, hessian)
            ours = relative_loss(w, METHODS[method].same(w, hessian).weight, hessian)
            if abs(ours - theirs) > 0.03 * theirs:
                raise AssertionError(f"{method}: loss {ours} on {list(w.shape)}, but the reference has {theirs}")


def solve_block(method: Method, block: Sequence[Shared]) -> Iterator[tuple[str, float]]:
    """(candidate, seconds) for one block: the reference, and ours with fresh Hessians shared by the layers."""
    for shared in block:
        for w in shared.weights:
            done = method.reference(w, shared.matrix)
            yield "reference", done.seconds
            yield "reference_loop", done.loop_seconds
    for name in ("same", "default"):
        hessians = [Hessian.from_matrix(shared.matrix) for shared in block]  # as calibration hands them over
        start = time.perf_counter()
        for shared, hessian in zip(block, hessians, strict=True):
            for w in shared.weights:
                getattr(method, name)(w, hessian)
        yield name, time.perf_counter() - start
    for shared in block:
        hessian = Hessian.from_matrix(shared.matrix)
        for w in shared.weights:
            loop = method.loop(w, hessian)
            start = time.perf_counter()
            loop()
            yield "loop", time.perf_counter() - start


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.solvers", description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)} (all)")
    parser.add_argument("--repeats", type=int, default=3, help="times all layers are solved (%(default)s)")
    parser.add_argument("--blocks", type=int, default=30, help="solve only the first BLOCKS blocks (%(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 512 tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--out", default="solvers", help="bench/results/OUT.json (%(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"unknown method {', '.join(sorted(unknown))}; known: {', '.join(METHODS)}")
    torch.set_num_threads(args.threads)
    blocks = collect(args.windows)[: args.blocks]
    rows = []
    for name in args.methods or METHODS:
        check(name, blocks[0])
        runs: list[dict[str, float]] = []
        for _ in range(args.repeats):
            total = dict.fromkeys(("reference", "reference_loop", "same", "default", "loop"), 0.0)
            for block in blocks:
                for candidate, seconds in solve_block(METHODS[name], block):
                    total[candidate] += seconds
            runs.append(total)
        row = summary(name, len(blocks), runs)
        rows.append(row)
        print(
            f"{name:16} reference {row['reference']['median']:6.2f} s  same {row['same']['median']:5.2f} s"
            f" ({row['speedup_same']:.1f}x)  default {row['default']['median']:5.2f} s ({row['speedup_default']:.1f}x)"
            f"  loops {row['reference_loop']['median']:6.2f} / {row['loop']['median']:5.2f} s"
            f" ({row['speedup_loop']:.1f}x)",
            file=sys.stderr,
            flush=True,
        )
    write(args.out, {"calibration_tokens": args.windows * 512, "repeats": args.repeats, "rows": rows})


def summary(name: str, blocks: int, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Median, least and greatest seconds of each candidate over the repeats, and ratios of medians."""
    row: dict[str, Any] = {"method": name, "layers": 7 * blocks}
    for candidate in runs[0]:
        seconds = [run[candidate] for run in runs]
        row[candidate] = {
            "median": round(statistics.median(seconds), 3), "least": round(min(seconds), 3),
            "greatest": round(max(seconds), 3),
        }  # fmt: skip
    for candidate, peer in (("same", "reference"), ("default", "reference"), ("loop", "reference_loop")):
        row[f"speedup_{candidate}"] = round(statistics.median(run[peer] / run[candidate] for run in runs), 2)
    return row


if __name__ == "__main__":
    main()
