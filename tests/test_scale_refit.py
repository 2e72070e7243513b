"""Scales refit by least squares once the codes are chosen."""

from dataclasses import replace

import pytest
import tiny
import torch
from test_output import cost, damped, inputs, outputs

import llmkern
from llmkern.formats import _base
from llmkern.solvers import Hessian, gptq, sparsegpt
from llmkern.solvers.grid import find_grid
from llmkern.solvers.polish import DESCENT, SCALE_STEPS
from llmkern.solvers.refit import conjugate_gradients
from llmkern.solvers.scales import refit_scales

GROUP = 4


def problem(n, k, generator, *, symmetric=True, coupled=True):
    """A weight, a damped Hessian, a grid with rounded weights, and what couples the rows (or None)."""
    w, h = torch.randn(n, k, generator=generator), Hessian(k).add(inputs(6 * k, k, generator)).damped(0.01)
    grid = find_grid(w, None, bits=3, group_size=min(GROUP, k), symmetric=symmetric, clip=None)
    return w, h, grid, grid.nearest(w), outputs(n, generator) if coupled else None


def matrix_of(found, n):
    return torch.eye(n, dtype=torch.float64) if found is None else damped(found)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("n", "k"), [(5, 14), (1, 1), (6, 4)])
def test_scales_are_the_least_squares_solution(n, k, symmetric, coupled, generator):
    """Against the normal equations of all scales together, in float64; the last group may be short."""
    w, h, grid, q, found = problem(n, k, generator, symmetric=symmetric, coupled=coupled)
    got, better = refit_scales(w, q, grid, h, 300, found)
    codes = (q / grid.scales.repeat_interleave(GROUP, 1)[:, :k]).round().double()
    groups = grid.scales.shape[1]
    basis = torch.zeros(n, groups, n, k, dtype=torch.float64)
    for row in range(n):
        for group in range(groups):
            at = slice(group * GROUP, group * GROUP + GROUP)
            basis[row, group, row, at] = codes[row, at]
    basis = basis.view(n * groups, n * k)
    quadratic = torch.kron(matrix_of(found, n), h.double())
    wanted = torch.linalg.lstsq(basis @ quadratic @ basis.T, basis @ quadratic @ w.double().reshape(-1)).solution
    used = basis.abs().sum(1) > 0
    assert (wanted[used] > 0).all()  # else they would stay as they were
    torch.testing.assert_close(better.scales.double().reshape(-1)[used], wanted[used], rtol=2e-3, atol=1e-4)
    assert torch.equal(better.scales.reshape(-1)[~used], grid.scales.reshape(-1)[~used])
    spread = better.scales.repeat_interleave(GROUP, 1)[:, :k]
    assert torch.equal(got, codes.float() * spread)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_objective_falls_and_codes_stay(dtype, coupled, generator):
    n, k = 40, 36
    w, h, _, _, found = problem(n, k, generator, coupled=coupled)
    grid = find_grid(w, None, bits=3, group_size=8, symmetric=True, clip=None, scale_dtype=dtype)
    q, o = grid.nearest(w), matrix_of(found, n)
    before = cost(w - q, o, h)
    for steps in (1, 10):
        got, better = refit_scales(w, q, grid, h, steps, found)
        after = cost(w - got, o, h)
        assert after < 0.99 * before
        before = after
        assert torch.equal(better.scales, better.scales.to(dtype).float())
        codes = [_base.quantize(x, one.scales, None, 8, 3) for x, one in ((q, grid), (got, better))]
        assert torch.equal(*codes)


def test_rows_stay_where_nothing_is_gained(generator):
    """Scales that are the best already, rounded to a coarse dtype, would only be worse."""
    w, h, grid, q, _ = problem(9, 16, generator, coupled=False)
    q, grid = refit_scales(w, q, grid, h, 300)
    again, same = refit_scales(w, q, replace(grid, scale_dtype=torch.bfloat16), h, 300)
    assert torch.equal(again, q)
    assert torch.equal(same.scales, grid.scales)


def test_a_scale_is_never_negative(generator):
    """Codes of the wrong sign throughout would be best on a negative scale; 0 would do as well."""
    w, h, grid, q, _ = problem(3, GROUP, generator, coupled=False)
    got, better = refit_scales(w, -q, grid, h, 10)
    assert torch.equal(better.scales, grid.scales)
    assert torch.equal(got, -q)


def test_weights_of_zeros_and_dead_rows(generator):
    w, h, _, _, found = problem(6, 12, generator)
    w[2] = 0
    grid = find_grid(w, None, bits=4, group_size=GROUP, symmetric=True, clip=None)
    got, better = refit_scales(w, grid.nearest(w), grid, h, 10, found)
    assert not got[2].any()
    assert torch.equal(better.scales[2], grid.scales[2])
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("coupled", [False, True])
def test_a_group_of_zeros_does_not_hold_up_the_others(coupled, generator):
    w, h, _, _, found = problem(6, 12, generator, coupled=coupled)
    w[:, GROUP : 2 * GROUP] = 0
    grid = find_grid(w, None, bits=4, group_size=GROUP, symmetric=True, clip=None)
    _, better = refit_scales(w, grid.nearest(w), grid, h, 10, found)
    assert torch.equal(better.scales[:, 1], grid.scales[:, 1])
    assert (better.scales[:, [0, 2]] != grid.scales[:, [0, 2]]).all()


@pytest.mark.parametrize("together", [False, True])
def test_as_many_steps_as_unknowns(together, generator):
    """Of conjugate gradients; any other way takes many more."""
    n, p = (4, 7) if not together else (2, 3)
    size = n * p if together else p
    mix = torch.randn(size, size, generator=generator) + 2 * torch.eye(size)
    matrix, wanted = mix @ mix.T, torch.randn(n, p, generator=generator)

    def image_of(x):
        return (x.reshape(-1) @ matrix).view(n, p) if together else x @ matrix

    ones = torch.ones(n, p)
    got = conjugate_gradients(torch.zeros(n, p), image_of(wanted), ones, image_of, size + 2, together=together)
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
def test_in_gptq(symmetric, coupled, generator):
    n, k = 48, 72
    w, hessian = torch.randn(n, k, generator=generator), Hessian(k).add(inputs(4 * k, k, generator))
    found = outputs(n, generator) if coupled else None
    options = {"bits": 3, "group_size": 16, "symmetric": symmetric, "output": found}
    h, o = hessian.damped(0.01), matrix_of(found, n)
    ways = ({"scale_refit": 0, "descent": 0}, {"scale_refit": 10, "descent": 0}, {"scale_refit": 10, "descent": 2}, {})
    plain, refitted, polished, default = (gptq(w, hessian, **options, **way) for way in ways)
    assert cost(w - polished.weight, o, h) < 0.99 * cost(w - refitted.weight, o, h)
    assert cost(w - refitted.weight, o, h) < 0.99 * cost(w - plain.weight, o, h)
    usual = gptq(w, hessian, **options, scale_refit=SCALE_STEPS, descent=DESCENT) if coupled else plain
    assert torch.equal(default.weight, usual.weight)
    assert torch.equal(refitted.packed.unpack(), refitted.weight)
    grid = replace(
        find_grid(w, None, bits=3, group_size=16, symmetric=symmetric, clip=None), scales=polished.packed.scales
    )
    again, _ = refit_scales(w, polished.weight, grid, h, 10, found)
    assert cost(w - again, o, h) > 0.999 * cost(w - polished.weight, o, h)
    if not coupled:
        assert refitted.loss < plain.loss


@pytest.mark.parametrize("coupled", [False, True])
def test_in_sparsegpt(coupled, generator):
    n, k = 32, 64
    w, hessian = torch.randn(n, k, generator=generator), Hessian(k).add(inputs(4 * k, k, generator))
    found = outputs(n, generator) if coupled else None
    options = {"sparsity": "2:4", "bits": 3, "group_size": 16, "descent": 0, "output": found}
    h, o = hessian.damped(0.01), matrix_of(found, n)
    plain, refitted = (sparsegpt(w, hessian, **options, scale_refit=steps) for steps in (0, 10))
    assert cost(w - refitted.weight, o, h) < 0.99 * cost(w - plain.weight, o, h)
    assert torch.equal(refitted.mask, plain.mask)
    assert not refitted.weight[~refitted.mask].any()
    assert torch.equal(refitted.packed.unpack(), refitted.weight)


@pytest.mark.parametrize("bad", [-1, 1.5, True, "10"])
@pytest.mark.parametrize("solve", [gptq, sparsegpt])
def test_a_number_of_steps_that_is_none(solve, bad):
    with pytest.raises(ValueError, match=rf"{solve.__name__}: scale_refit must be an int >= 0, got {bad!r}"):
        solve(torch.randn(4, 8), torch.eye(8), bits=4, group_size=None, scale_refit=bad)


@pytest.mark.parametrize("recipe", ["gptq-int3-g16", "wanda-2:4-int4-g16", "sparsegpt-2:4-int4-g16"])
def test_a_recipe_can_ask_for_it_without_coupled_rows(recipe):
    losses = {}
    for descent, steps in ((0, 0), (0, 10), (2, 10)):
        fields = {"descent": descent, "scale_refit": steps, "objective": "layer"}
        if recipe.startswith("wanda"):
            del fields["objective"]
        report = llmkern.compress(
            tiny.llama(), llmkern.Recipe.parse(recipe, **fields), tiny.token_ids(20), progress=False
        )
        losses[descent, steps] = report.rows[0].loss  # of the first layer, whose input is the same each time
    assert losses[2, 10] < losses[0, 10] < losses[0, 0]
