"""The linear ops under pytest-benchmark, beside torch's dense product: `python -m pytest bench --benchmark-only`.

One group per op, shape and M. A result is checked before it is timed, and every call takes the next copy of the weight,
as in `llmkern bench`; but each candidate is timed by itself, so compare within a group and on a quiet machine only.
bench/linear.py makes the figures that are reported.
"""

import itertools
from functools import lru_cache

import pytest
import torch

from llmkern_cli._bench import measure, ours, peers, timing
from llmkern_cli._bench.weights import Weights

SHAPES = ((1536, 576), (4096, 4096))
GROUP = 128
CLASSES = [(variant.op, variant.values, variant.activations) for variant in ours.VARIANTS]


@lru_cache(maxsize=1)
def made(shape):
    return Weights(*shape, GROUP)


def chosen(shape, op, values, activations, who):
    """Our candidate of that class, by the kernel that would run, or torch's dense one."""
    if who == "torch":
        return next(peers.candidates(made(shape), torch.float32, ("torch_dense",)))
    wanted = {"values": values, "activations": activations}
    found = ours.candidates(made(shape), torch.float32, [op], "best")
    return next(one for one in found if wanted.items() <= one.row.items())


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize(("op", "values", "activations"), CLASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_linear(benchmark, shape, op, values, activations, m, who):
    benchmark.group = f"{op}, {values}, activations {activations}, {shape[0]}x{shape[1]}, M={m}"
    candidate = chosen(shape, op, values, activations, who)
    x = measure.input_rows(m, shape[1], candidate.dtype)
    with torch.inference_mode():
        copies = range(timing.cold_rounds(candidate.nbytes))
        calls = [candidate.bind(candidate.build(number), x) for number in copies]
        benchmark.extra_info = {"error": measure.check(candidate, calls[0], x), "copies": len(calls)}
        turn = itertools.cycle(calls)
        benchmark(lambda: next(turn)())
