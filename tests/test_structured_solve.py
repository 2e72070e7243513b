"""The mathematics of structured pruning against float64: costs, greedy choice, restoration."""

import pytest
import torch

from llmkern.prune import selection
from llmkern.prune.restore import Fit
from llmkern.solvers import Hessian

DAMP = 0.01


def layer(n, k, generator, tokens=400):
    """A weight [n, k] and correlated inputs [tokens, k]."""
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    return torch.randn(n, k, generator=generator), torch.randn(tokens, k, generator=generator) @ mix


def damped(x):
    h = x.double().T @ x.double()
    return h + DAMP * h.diagonal().mean() * torch.eye(len(h))


def least_squares(w, h, kept):
    """(W H)_K H_KK⁻¹ in float64, [n, k] with zeros elsewhere."""
    full = torch.zeros_like(w, dtype=torch.float64)
    full[:, kept] = torch.linalg.solve(h[kept][:, kept], (w.double() @ h)[:, kept].T).T
    return full


def loss(w, restored, h):
    lost = w.double() - restored
    return float((lost @ h * lost).sum())


@pytest.mark.parametrize(("k", "unit"), [(7, 1), (12, 3), (30, 5), (300, 1), (16, 16)])
def test_obs_costs_are_what_least_squares_loses(k, unit, generator):
    w, x = layer(5, k, generator)
    h = damped(x)
    costs = selection.Surgeon(w, Hessian(k).add(x), DAMP).of_units(unit)
    assert len(costs) == k // unit
    for at in (0, len(costs) - 1):
        gone = range(at * unit, (at + 1) * unit)
        kept = [j for j in range(k) if j not in gone]
        assert float(costs[at]) == pytest.approx(loss(w, least_squares(w, h, kept), h), rel=1e-3)


@pytest.mark.parametrize("steps", [[[3]], [[0, 9], [4]], [[1, 2, 3], [11, 0]]])
def test_removal_leaves_the_least_squares_of_the_rest(steps, generator):
    w, x = layer(4, 12, generator)
    h = damped(x)
    surgeon = selection.Surgeon(w, Hessian(12).add(x), DAMP)
    gone = [j for step in steps for j in step]
    kept = [j for j in range(12) if j not in gone]
    for step in steps:
        surgeon.remove(torch.tensor(step))
    torch.testing.assert_close(surgeon.weight.double(), least_squares(w, h, kept), rtol=1e-3, atol=1e-3)
    inverse = torch.linalg.inv(h[kept][:, kept])
    torch.testing.assert_close(surgeon.inverse[kept][:, kept].double(), inverse, rtol=1e-3, atol=1e-6)
    costs = surgeon.of_units(1)
    for at, j in enumerate(kept):
        rest = kept[:at] + kept[at + 1 :]
        wanted = loss(w, least_squares(w, h, rest), h) - loss(w, least_squares(w, h, kept), h)
        assert float(costs[j]) == pytest.approx(wanted, rel=2e-3)


def test_obs_is_greedy_one_by_one_below_a_round(generator):
    w, x = layer(6, 20, generator)
    h = damped(x)
    kept = list(range(20))
    for _ in range(8):
        kept.remove(min(kept, key=lambda j: loss(w, least_squares(w, h, [i for i in kept if i != j]), h)))
    costs = selection.costs("obs", w, Hessian(20).add(x), torch.zeros(20), DAMP)
    assert selection.choose(costs, list(range(20)), 1, 12) == kept


def test_rounds_remove_exactly_what_is_asked(generator):
    w, x = layer(6, 200, generator)
    costs = selection.costs("obs", w, Hessian(200).add(x), torch.zeros(200), DAMP)
    kept = selection.choose(costs, list(range(200)), 1, 99)  # 101 in steps of 4
    assert len(kept) == len(set(kept)) == 99
    assert kept == sorted(kept)


def test_wanda_and_magnitude(generator):
    w, x = layer(3, 10, generator)
    hessian, written = Hessian(10).add(x), torch.rand(10, generator=generator) * 20
    wanda = w.square().sum(0) * x.square().sum(0)
    kept = selection.choose(selection.costs("wanda", w, hessian, written, DAMP), list(range(10)), 1, 4)
    assert kept == sorted(wanda.argsort(descending=True)[:4].tolist())
    magnitude = (w.square().sum(0) + written).view(5, 2).sum(1)
    kept = selection.choose(selection.costs("magnitude", w, None, written, DAMP), list(range(5)), 2, 3)
    assert kept == sorted(magnitude.argsort(descending=True)[:3].tolist())


@pytest.mark.parametrize("method", ["obs", "wanda"])
def test_a_feature_that_is_always_0_goes_first(method, generator):
    w, x = layer(3, 9, generator)
    w[:, 5] *= 100
    x[:, 5] = 0
    kept = selection.choose(selection.costs(method, w, Hessian(9).add(x), torch.zeros(9), DAMP), list(range(9)), 1, 8)
    assert kept == [0, 1, 2, 3, 4, 6, 7, 8]


def test_every_run_keeps_as_many():
    energies = torch.tensor([1.0, 2, 3, 9, 8, 7, 0, 0, 0, 5, 4, 6]).repeat_interleave(2)
    # Groups 0, 1 and 3 of three heads are there.
    alive = [0, 1, 2, 3, 4, 5, 9, 10, 11]
    assert selection.choose(selection.Fixed(energies), alive, 2, 2, per=3) == [1, 2, 3, 4, 9, 11]


def test_equal_costs_go_in_order():
    assert selection.choose(selection.Fixed(torch.ones(6)), list(range(6)), 1, 2) == [4, 5]


def errors(e, x, w, b, wanted):
    return float((e - x @ w.T - b).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 7), (3, 40), (70, 300)])
def test_fit_is_least_squares(n, k, bias, generator):
    x = torch.randn(900, k, generator=generator) + 0.7
    e = x @ torch.randn(k, n, generator=generator) + torch.randn(900, n, generator=generator) + 2.0
    wanted = torch.randn(900, n, generator=generator) * 3
    fit = Fit(n, k, torch.device("cpu"), bias)
    for part in (slice(0, 500), slice(500, 501), slice(501, 900)):
        fit.add(x[part], e[part], wanted[part])
    found = fit.solve(DAMP)
    x, e, wanted = x.double(), e.double(), wanted.double()
    xc, ec = (x - x.mean(0), e - e.mean(0)) if bias else (x, e)
    h = xc.T @ xc
    w = torch.linalg.solve(h + DAMP * h.diagonal().mean() * torch.eye(k), xc.T @ ec).T
    torch.testing.assert_close(found.weight.double(), w, rtol=1e-3, atol=1e-4)
    b = e.mean(0) - w @ x.mean(0) if bias else torch.zeros(n, dtype=torch.float64)
    if bias:
        torch.testing.assert_close(found.bias.double(), b, rtol=1e-3, atol=1e-3)
    else:
        assert found.bias is None
    assert found.before == pytest.approx(errors(e, x, 0 * w, 0, wanted), rel=1e-4)
    assert found.after == pytest.approx(errors(e, x, w, b, wanted), rel=1e-3)


def test_what_is_missing_makes_the_closed_form(generator):
    """With E = W_R X_R the refitted weights are (W H)_K H_KK⁻¹."""
    w, x = layer(6, 24, generator)
    kept, gone = list(range(0, 24, 2)), list(range(1, 24, 2))
    fit = Fit(6, 12, torch.device("cpu"), bias=False)
    fit.add(x[:, kept], x[:, gone] @ w[:, gone].T, x @ w.T)
    found = w[:, kept] + fit.solve(1e-9).weight
    h = x.double().T @ x.double()
    torch.testing.assert_close(found.double(), least_squares(w, h, kept)[:, kept], rtol=1e-3, atol=1e-4)


def test_dead_inputs_and_nothing_missing():
    x = torch.randn(50, 6)
    x[:, 2] = 0
    fit = Fit(3, 6, torch.device("cpu"), bias=True)
    fit.add(x, torch.zeros(50, 3), torch.zeros(50, 3))
    found = fit.solve(DAMP)
    assert not found.weight.any()
    assert not found.bias.any()
    assert found.before == found.after == 0
