"""Dense products of calibration and solvers: exact ones, and rough ones where those are faster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llmkern import _dense, _features
from llmkern.solvers import Hessian, InputShift
from llmkern.solvers.output import OutputHessian


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, in norm."""
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rough products round, whatever this machine finds fast, from 1000 multiplications on."""
    monkeypatch.setattr(_dense, "half_is_fast", lambda: True)
    monkeypatch.setattr(_dense, "WORTH_ROUNDING", 1000)


@pytest.mark.parametrize(("n", "k", "m"), [(5, 3, 2), (2100, 70, 40), (1500, 300, 200)])
def test_add_product_of_parts(n: int, k: int, m: int) -> None:
    out, a, b = random(n, m + 9), random(n, k + 5, seed=1), random(k + 3, m + 4, seed=2)
    less = random(n, k, seed=3)
    wanted = out.double()
    wanted[:, 4 : 4 + m] += (a[:, 2 : 2 + k] - less).double() @ b[1 : 1 + k, 3 : 3 + m].double()
    _dense.add_product(out[:, 4 : 4 + m], a[:, 2 : 2 + k], b[1 : 1 + k, 3 : 3 + m], less)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("n", "k", "m"), [(50, 30, 20), (2100, 70, 40)])
def test_rough_add_product_of_parts(n: int, k: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 where it is fast and rough will do: as good as its 8 bits. Elsewhere the same bits as without."""
    out, a, b = random(n, m + 9), random(n, k + 5, seed=1), random(k + 3, m + 4, seed=2)
    less = random(n, k, seed=3)
    monkeypatch.setattr(_dense, "WORTH_ROUNDING", 50 * 30 * 20)
    found = {}
    for fast, rough in ((False, False), (False, True), (True, False), (True, True)):
        monkeypatch.setattr(_dense, "half_is_fast", lambda fast=fast: fast)
        found[fast, rough] = out.clone()
        parts = (found[fast, rough][:, 4 : 4 + m], a[:, 2 : 2 + k], b[1 : 1 + k, 3 : 3 + m], less)
        _dense.add_product(*parts, rough=rough)
    exact = found.pop((False, False))
    moved = (found[True, True] - exact).square().mean().sqrt()
    spread = 2**0.5 * k**0.5  # of the products that are added
    assert 2**-12 * spread < moved < 2**-8 * spread
    assert torch.equal(found[False, True], exact)
    assert torch.equal(found[True, False], exact)
    monkeypatch.setattr(_dense, "WORTH_ROUNDING", n * k * m + 1)
    small = out.clone()
    _dense.add_product(small[:, 4 : 4 + m], a[:, 2 : 2 + k], b[1 : 1 + k, 3 : 3 + m], less, rough=True)
    assert torch.equal(small, exact)


@pytest.mark.parametrize(
    ("found", "pairs", "fast"),
    [("", True, False), ("avx512_bf16", True, True), ("avx512_bf16", False, False), ("avx512_bf16 amx", False, True)],
)
def test_where_half_is_fast(found: str, pairs: bool, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(name, name in found.split(), "") for name in ("avx2", "avx512_bf16", "amx")]
    module = SimpleNamespace(levels=lambda: rows, fast_bf16_products=lambda: pairs)
    monkeypatch.setattr(_features, "native", module)
    assert _features.half_is_fast() is fast


def test_without_a_native_module_half_is_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_features, "native", None)
    assert not _features.half_is_fast()


@pytest.mark.usefixtures("rounding")
def test_rough_product() -> None:
    a, b = random(40, 70), random(70, 50, seed=1)
    wanted = a.double() @ b.double()
    assert error(_dense.product(a, b), wanted) < 1e-6
    for left, right in ((a, b), (a.T.contiguous().T, b.T.contiguous().T)):
        got = _dense.product(left, right, rough=True)
        assert got.dtype == torch.float32
        assert 1e-4 < error(got, wanted) < 5e-3
    assert torch.equal(_dense.product(a[:2], b[:, :5], rough=True), _dense.product(a[:2], b[:, :5]))
    batched = a.expand(3, *a.shape)
    assert torch.equal(_dense.product(batched, b.expand(3, *b.shape), rough=True)[1], a @ b)


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("bias", [False, True])
def test_layers_multiply_roughly_where_that_will_do(bias: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(70, 50, bias=bias), torch.nn.Linear(50, 3, bias=bias))
    large, small = model
    with torch.no_grad():
        for layer in model:
            if layer.bias is not None:
                layer.bias.fill_(1000.0)  # stays fp32: in bf16 it would cover all else
    x = random(2, 20, 70)
    weight, offset = large.weight.detach().double(), large.bias.detach().double() if bias else 0
    wanted = x.double() @ weight.T
    for rough, least, most in ((False, 0, 1e-6 * (1000 if bias else 1)), (True, 1e-4, 5e-3)):
        with _dense.dense_by_onednn(model, rough=rough), torch.no_grad():
            assert least <= error(large(x).double() - offset, wanted) < most
            few = random(2, 50)
            torch.testing.assert_close(small(few), torch.nn.Linear.forward(small, few), rtol=1e-5, atol=1e-6)
        with _dense.dense_by_onednn(model, rough=rough):
            leaf = x.clone().requires_grad_()
            slope = random(2, 20, 50, seed=3)
            large(leaf).backward(slope)
            assert least <= error(leaf.grad, slope.double() @ weight) < max(most, 1e-6)
            assert large.weight.grad is None
    assert "forward" not in vars(large)


@pytest.mark.usefixtures("rounding")
def test_rough_sums_over_tokens() -> None:
    x, dense = random(60, 30), random(60, 30, seed=1)
    wanted = x.double().T @ x.double()
    output, shift = OutputHessian(30), InputShift(30)
    output.add(x.view(2, 30, 30), rough=True)
    shift.add(dense, x, rough=True)
    assert error(Hessian(30).add(x).raw(), wanted) < 1e-6
    sums = {"hessian": Hessian(30).add(x, rough=True).raw(), "output": output.parts[0].raw()}
    for got in sums.values():
        assert 1e-4 < error(got, wanted) < 5e-3
        assert torch.equal(got, got.T)
    assert 1e-4 < error(shift.sum, (dense - x).double().T @ x.double()) < 5e-3
