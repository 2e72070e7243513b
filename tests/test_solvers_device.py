"""What the solvers do on a GPU, as far as a CPU shows it: the same results, and no waiting per column or block."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmkern import _dense
from llmkern.solvers import Hessian, _checks, columns, gptq, hessian, sparsegpt
from llmkern.solvers.reference_api import GPTQ, Quantizer, SparseGPT

MODULES = (_dense, _checks, columns, hessian)
# What makes the host wait for a GPU: reading a value, or a shape that depends on values.
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique")


class Waits(TorchDispatchMode):
    """Counts the calls that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        if name in WAITING or any(index is not None and index.dtype == torch.bool for index in indices):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solvers take CPU tensors for a GPU's."""
    for module in MODULES:
        if hasattr(module, "on_host"):
            monkeypatch.setattr(module, "on_host", lambda x: False)


def problem(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(2 * k, k, generator=generator) @ (torch.eye(k) + torch.randn(k, k, generator=generator) / k**0.5)
    return torch.randn(16, k, generator=generator), x


SOLVERS = {
    "gptq": lambda w, h: gptq(w, h, group_size=64, descent=2),
    "gptq dynamic": lambda w, h: gptq(w, h, group_size=64, act_order="dynamic", symmetric=False),
    "sparsegpt": lambda w, h: sparsegpt(w, h, sparsity=0.5, refit=False),
    "sparsegpt 2:4": lambda w, h: sparsegpt(w, h, sparsity="2:4", mask="sparsegpt"),
    "sparsegpt 3:5 int4": lambda w, h: sparsegpt(w, h, sparsity="3:5", bits=4, group_size=64, refit=False),
    "sparsegpt admm int4": lambda w, h: sparsegpt(w, h, sparsity="2:4", bits=4, group_size=64),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_waits_do_not_grow_with_columns(solver: str) -> None:
    counts = []
    for k in (320, 960):
        w, x = problem(k)
        with Waits() as waits:
            SOLVERS[solver](w, Hessian(k).add(x).add(x))
        counts.append(waits.count)
    assert counts[0] == counts[1]
    assert 0 < counts[0].total() < 40


@pytest.mark.parametrize("name", ["GPTQ", "SparseGPT"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_drop_in_classes_do_not_wait_per_block(name: str) -> None:
    counts = []
    for k in (320, 960):
        layer = torch.nn.Linear(k, 8)
        solver = {"GPTQ": GPTQ, "SparseGPT": SparseGPT}[name](layer)
        solver.add_batch(problem(k)[1])
        with Waits() as waits:
            if isinstance(solver, GPTQ):
                solver.quantizer = Quantizer()
                solver.quantizer.configure(4, perchannel=True)
                solver.fasterquant()
            else:
                solver.fasterprune(0.5)
        counts.append(waits.count)
    assert counts[0] == counts[1]


def test_waits_are_counted() -> None:
    x = torch.arange(4)
    with Waits() as waits:
        int(x.sum())
        bool((x > 1).any())
        x[x > 1] = 0
        x[x > 1]
        x.nonzero()
    assert waits.count == {"_local_scalar_dense": 2, "index_put_": 1, "index": 1, "nonzero": 1}


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_results(solver: str, request: pytest.FixtureRequest) -> None:
    w, x = problem(320)
    host = SOLVERS[solver](w, Hessian(320).add(x))
    request.getfixturevalue("as_on_a_gpu")
    device = SOLVERS[solver](w, Hessian(320).add(x))
    assert device.loss == pytest.approx(host.loss, rel=1e-2)
    assert (host.weight - device.weight).abs().gt(1e-5).float().mean() < 0.1


def test_factors_agree() -> None:
    x = problem(600)[1].double()
    matrix = x.T @ x
    first, second = hessian._upper_by_blocks(matrix.clone()), hessian._upper_at_once(matrix)
    assert first is not None
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)
    matrix[300, 300] = 0  # now indefinite
    assert hessian._upper_by_blocks(matrix.clone()) is None
    assert hessian._upper_at_once(matrix) is None
    step = torch.finfo(torch.float32).eps
    nearly = torch.tensor([[1 + step, 1], [1, 1]])  # the second pivot is positive, but may be all rounding
    assert hessian._upper_by_blocks(nearly.clone()) is None
    assert hessian._upper_at_once(nearly) is None


@pytest.mark.parametrize("count", [0, 1, 50, 99, 100])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_keep_all_but(count: int) -> None:
    score = torch.tensor([3.0, 1, 2, 1, 0] * 20).view(10, 10)
    wanted = torch.ones(100, dtype=torch.bool)
    for at in sorted(range(100), key=lambda i: float(score.view(-1)[i]))[:count]:
        wanted[at] = False
    assert torch.equal(columns.keep_all_but(score, count), wanted.view(10, 10))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_values_that_are_not_finite_are_found_on_use() -> None:
    state = Hessian(4).add(torch.tensor([[1.0, float("nan"), 1, 1]]))
    for use in (
        state.raw,
        state.matrix,
        lambda: gptq(torch.ones(2, 4), state, group_size=4),
        Hessian(4).merge(state).raw,
    ):
        with pytest.raises(ValueError, match=r"^Hessian: what was added has non-finite values .* in feature 1"):
            use()
    Hessian(4).add(torch.ones(1, 4)).raw()


def test_halves_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of bf16 and fp16 are exact in fp32, so the sum is that of fp32 inputs."""
    called = []

    def half_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        called.append(a.dtype)
        return a.float() @ b.float()

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(hessian, "half_product", half_product)
    x = problem(64)[1]
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        state = Hessian(64).add(half.as_subclass(OnGpu))
        torch.testing.assert_close(state.raw().as_subclass(torch.Tensor), half.float().T @ half.float())
    assert set(called) == {torch.bfloat16, torch.float16}


SETTINGS = """
import os, sys, warnings
import torch
from llmkern._dense import full_fp32

warnings.simplefilter("ignore")
matmul = torch.backends.cuda.matmul

def look():
    seen = [matmul.fp32_precision]
    for read in (lambda: matmul.allow_tf32, torch.get_float32_matmul_precision):
        try:
            seen.append(read())
        except RuntimeError:
            seen.append("refused")
    return seen + [torch.backends.mkldnn.matmul.fp32_precision]

for setting in sys.argv[1:]:
    if os.fork():  # each starts from torch's own settings
        _, status = os.wait()
        assert status == 0, setting
        continue
    exec(setting)
    before = look()
    with full_fp32():
        assert matmul.fp32_precision in ("none", "ieee"), matmul.fp32_precision
        assert matmul.allow_tf32 is False
    try:
        with full_fp32():
            raise KeyError
    except KeyError:
        pass
    assert look() == before, (look(), before)
    sys.exit()
"""


def test_tf32_is_off_inside_and_comes_back() -> None:
    settings = [
        "pass",
        "matmul.allow_tf32 = True",
        "matmul.fp32_precision = 'tf32'",
        "torch.set_float32_matmul_precision('high')",
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.fp32_precision = 'tf32'",
    ]
    done = subprocess.run([sys.executable, "-c", SETTINGS, *settings], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
