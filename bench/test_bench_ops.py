"""The linear ops under pytest-benchmark, one group per op and M: `python -m pytest bench --benchmark-only`.

A quick look while a kernel is being written: one warm weight, no rotation. bench/linear.py makes the figures that are
reported.
"""

import pytest
import torch

import llmkern
from llmkern._registry import OPS
from llmkern.ops import linear_args
from llmkern_cli._bench.ours import VARIANTS
from llmkern_cli._bench.weights import Weights

N, K, GROUP = 1536, 576, 64
WEIGHTS = Weights(N, K, GROUP)
PACKED = {variant.op: WEIGHTS.packed[variant.weight] for variant in VARIANTS}
ROWS = [(row.op, row.kernel) for row in llmkern.kernels() if row.runnable and row.op in PACKED]


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize(("op", "kernel"), ROWS)
def test_linear(benchmark, op, kernel, m):
    benchmark.group = f"{op} M={m}"
    x = torch.randn(m, K, generator=torch.Generator().manual_seed(0))
    args = linear_args(op, x, PACKED[op], None)
    with torch.inference_mode(), llmkern.force(kernel):
        got = benchmark(OPS[op], *args)
    with llmkern.force("reference"):
        torch.testing.assert_close(got, OPS[op](*args), rtol=1e-3, atol=1e-2)
