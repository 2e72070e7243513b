"""Errors measured by what they do to the model's outputs: rows that are coupled, and the gradients they come from."""

import pytest
import tiny
import torch

import llmkern
from llmkern import fisher, layer_solver
from llmkern.blocks import Call
from llmkern.calibration import quiet
from llmkern.nn import is_linear
from llmkern.solvers import Hessian, OutputHessian, coupled, gptq, output, sparsegpt
from llmkern.solvers.admm import _Ridge
from llmkern.solvers.columns import blocks
from llmkern.solvers.coupled import coupled_columns, coupled_descent
from llmkern.solvers.grid import find_grid
from llmkern.solvers.output import DAMP
from llmkern.solvers.refit import refit


def inputs(n, k, generator):
    """n tokens of k features that go together."""
    mix = torch.randn(k, k, generator=generator)
    return torch.randn(n, k, generator=generator) @ mix


def outputs(n, generator, tokens=200):
    found = OutputHessian(n)
    found.add(inputs(tokens, n, generator))
    return found


def damped(found):
    """[N, N] in float64, blocks of PART rows on the diagonal."""
    return torch.block_diag(*(found.damped(at) for at in range(len(found.parts)))).double()


def cost(difference, o, h):
    return float(torch.trace(o @ difference.double() @ h.double() @ difference.double().T))


def nearest_plane(w, h, o, grid, places, mask):
    """Babai's nearest plane on the whole problem: one quadratic form of N * K unknowns, in float64."""
    n, k = w.shape
    quadratic = torch.kron(o, h)[places][:, places]
    upper = torch.linalg.cholesky(quadratic.flip(0, 1)).flip(0, 1)
    unit = upper / upper.diagonal()
    flat, kept = w.double().reshape(-1)[places], mask.reshape(-1)[places]
    scales = grid.scales.double().repeat_interleave(grid.group_size, 1)[:, :k].reshape(-1)[places]
    moved = torch.zeros(n * k, dtype=torch.float64)
    for at in range(n * k):
        value = flat[at] + moved[:at] @ unit[:at, at]
        low = 2 ** (grid.bits - 1)
        code = (value / scales[at]).round().clamp(-low, low - 1)
        moved[at] = flat[at] - (code * scales[at] if kept[at] else 0)
    q = torch.empty(n * k, dtype=torch.float64)
    q[places] = flat - moved
    return q.view(n, k)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_and_columns_together_are_the_nearest_plane(masked, generator, monkeypatch):
    """Column by column and row by row, with one row per step, equals the one big problem of Kronecker factors."""
    monkeypatch.setattr(coupled, "ROWS", 1)
    monkeypatch.setattr(coupled, "blocks", lambda k, width=5: blocks(k, width))  # of columns, several
    n, k = 7, 12
    w, hessian = torch.randn(n, k, generator=generator), Hessian(k).add(inputs(60, k, generator))
    found = outputs(n, generator)
    grid = find_grid(w, None, bits=3, group_size=4, symmetric=True, clip=None)
    mask = torch.rand(n, k, generator=generator) < 0.6 if masked else torch.ones(n, k, dtype=torch.bool)
    factor = hessian.factor("activation", 0.01)
    got = coupled_columns(w, factor, grid, mask if masked else None, found)
    places = (found.factor(0).order[:, None] * k + factor.order).reshape(-1)
    wanted = nearest_plane(w, hessian.damped(0.01).double(), damped(found), grid, places, mask)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "k"), [(48, 136), (530, 40), (1, 1), (60, 130)])
def test_coupled_rows_cost_the_model_less(n, k, generator):
    w, hessian = torch.randn(n, k, generator=generator), Hessian(k).add(inputs(4 * k + 9, k, generator))
    found, before = outputs(n, generator, 4 * n), w.clone()
    alone = gptq(w, hessian, bits=3, group_size=None)
    together = gptq(w, hessian, bits=3, group_size=None, output=found, scale_refit=0, descent=0)
    assert torch.equal(w, before)
    o, h = damped(found), hessian.damped(0.01)
    costs = [cost(w - solution.weight, o, h) for solution in (alone, together)]
    assert costs[1] < 0.97 * costs[0] if n > 1 else costs[1] == pytest.approx(costs[0])
    assert together.packed.unpack().equal(together.weight)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("rows", [1, 16])
def test_descent_lowers_what_the_model_feels(rows, alike, generator, monkeypatch):
    """Also where 16 rows do the same to the output, and each would make up for the whole of an error."""
    monkeypatch.setattr(coupled, "ROWS", rows)
    n, k = 40, 40
    w, hessian = torch.randn(n, k, generator=generator), Hessian(k).add(inputs(200, k, generator))
    found = OutputHessian(n)
    found.add(torch.randn(200, 1, generator=generator).expand(200, n) if alike else inputs(200, n, generator))
    grid = find_grid(w, None, bits=3, group_size=8, symmetric=True, clip=None)
    h, o = hessian.damped(0.01), damped(found)
    q = coupled_columns(w, hessian.factor("activation", 0.01), grid, None, found) if alike else grid.nearest(w)
    before = cost(w - q, o, h)
    for passes in (1, 2):
        q = coupled_descent(w, q, h, grid, None, passes, found)
        after = cost(w - q, o, h)
        assert after <= before * (1 + 1e-6) if alike else after < before
        before = after


def test_refit_of_coupled_rows_is_least_squares(generator):
    n, k = 6, 10
    w, h = torch.randn(n, k, generator=generator), Hessian(k).add(inputs(80, k, generator)).damped(0.01)
    found = outputs(n, generator)
    mask = torch.rand(n, k, generator=generator) < 0.5
    got = refit(w, w * mask, mask, h, 200, found)
    quadratic = torch.kron(damped(found), h.double())
    at = mask.reshape(-1)
    wanted = torch.zeros(n * k, dtype=torch.float64)
    wanted[at] = torch.linalg.solve(quadratic[at][:, at], (quadratic @ w.double().reshape(-1))[at])
    assert got[~mask].abs().sum() == 0
    assert (got.double() - wanted.view(n, k)).norm() < 1e-3 * wanted.norm()


def test_the_ridge_of_coupled_rows_is_solved(generator, monkeypatch):
    """Two blocks of outputs, each with eigenvectors of its own."""
    monkeypatch.setattr(output, "PART", 4)
    n, k, penalty = 7, 9, 0.3
    w, hessian = torch.randn(n, k, generator=generator), Hessian(k).add(inputs(80, k, generator))
    found = outputs(n, generator)
    assert [at.stop for at in found.places] == [4, 7]
    towards = torch.randn(n, k, generator=generator)
    got = _Ridge(w, hessian, 0.01, found).solve(towards, penalty)
    o, h = damped(found), hessian.damped(0.01).double()
    rows, columns = o.diagonal().sqrt(), h.diagonal().sqrt()
    quadratic = torch.kron(o / rows / rows[:, None], h / columns / columns[:, None])
    target = (w.double() * rows[:, None] * columns).reshape(-1)
    right = quadratic @ target + penalty * towards.double().reshape(-1)
    wanted = torch.linalg.solve(quadratic + penalty * torch.eye(n * k), right)
    torch.testing.assert_close(got.double(), wanted.view(n, k), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("bits", [None, 4])
def test_sparse_layers_cost_the_model_less(sparsity, bits, generator):
    n, k = 48, 64
    w, hessian = torch.randn(n, k, generator=generator), Hessian(k).add(inputs(400, k, generator))
    found = outputs(n, generator)
    options = {"sparsity": sparsity, "bits": bits, "group_size": 32}
    alone, together = sparsegpt(w, hessian, **options), sparsegpt(w, hessian, **options, output=found)
    o, h = damped(found), hessian.damped(0.01)
    assert cost(w - together.weight, o, h) < 0.97 * cost(w - alone.weight, o, h)
    assert int((~together.mask).sum()) == n * k // 2
    assert together.weight[~together.mask].abs().sum() == 0


def test_what_does_not_fit_is_refused():
    w, found = torch.randn(8, 16), OutputHessian(8)
    with pytest.raises(ValueError, match="gptq: output has seen zero tokens"):
        gptq(w, torch.eye(16), group_size=8, output=found)
    found.add(torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"sparsegpt: weight is \[N, K\]=\[4, 16\], but output is of N=8"):
        sparsegpt(w[:4], torch.eye(16), output=found)
    with pytest.raises(ValueError, match="gptq: weight is on cpu, but output is on meta"):
        gptq(w, torch.eye(16), group_size=8, output=found.to(torch.device("meta")))
    with pytest.raises(ValueError, match='got act_order="dynamic"'):
        gptq(w, torch.eye(16), group_size=8, act_order="dynamic", output=found)
    with pytest.raises(ValueError, match="output needs refit=True"):
        sparsegpt(w, torch.eye(16), refit=False, output=found)
    for fields in ({"act_order": "dynamic"}, {"refit": False}):
        with pytest.raises(ValueError, match='objective="model" goes with neither'):
            llmkern.Recipe.parse("gptq-int4", objective="model", **fields)
    with pytest.raises(ValueError, match='objective="model" is for gptq and sparsegpt, got rtn'):
        llmkern.Recipe.parse("rtn-int4", objective="model")


def gathered(model, batches):
    layers = {name: module for name, module in model.named_modules() if is_linear(module) and name != "lm_head"}
    found = fisher.Sensitivity(layers)
    with quiet(model):
        fisher.gather(model, layers, dict(enumerate(batches)), found)
    return layers, found


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "opt", "bert", "t5", "albert", "mixtral"])
def test_gradients_are_those_of_the_whole_model(kind, monkeypatch):
    """Against one backward pass with everything kept, parameters that have gradients, and the same labels."""
    monkeypatch.setattr(fisher, "TOKENS", 2 * tiny.LENGTH)
    maker = tiny.MODELS.get(kind) or getattr(tiny, kind)
    model, ids = maker(), tiny.token_ids(4)
    batches = [Call((), tiny.inputs(kind, ids))]
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    layers, found = gathered(model, batches)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    gradients = {name: [] for name in layers}
    hooks = [
        layer.register_forward_hook(
            lambda _, args, out, name=name: out.register_hook(lambda g: gradients[name].append(g)) and None
        )
        for name, layer in layers.items()
    ]
    draw = torch.Generator().manual_seed(0)
    for part in ids.split(2):
        logits = model(**tiny.inputs(kind, part)).logits
        _, gradient = fisher._drawn(type("Out", (), {"logits": logits}), None, draw)
        logits.backward(gradient)
    for hook in hooks:
        hook.remove()
    for name, parts in gradients.items():
        got = found.outputs[name]
        if not parts:
            assert got.tokens == 0, name
            continue
        g = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).double()
        wanted = g.T @ g
        for at, part in zip(got.places, got.parts, strict=True):
            assert (part.raw().double() - wanted[at, at]).norm() < 1e-4 * wanted.norm(), name
        if name in found.tokens:
            torch.testing.assert_close(
                found.tokens[name][0].reshape(-1).double(), g.square().sum(1), rtol=1e-3, atol=1e-6
            )
    assert all(name in found.tokens for name in layers) == (kind not in ("opt", "albert"))


def test_labels_are_drawn_from_the_model():
    """E[g gᵀ] over drawn labels is diag(p) - p pᵀ, and E[g] is 0."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).repeat(20000, 1).requires_grad_()
    _, g = fisher._drawn(type("Out", (), {"logits": logits}), None, torch.Generator().manual_seed(1))
    p = torch.softmax(logits[0].detach(), -1)
    torch.testing.assert_close(g.T @ g / len(g), torch.diag(p) - torch.outer(p, p), rtol=0, atol=0.01)
    assert g.mean(0).abs().max() < 0.02


def test_padding_has_no_gradient():
    ids = tiny.token_ids(3)
    padded, mask = torch.nn.functional.pad(ids, (0, 8)), torch.nn.functional.pad(torch.ones_like(ids), (0, 8))
    _, found = gathered(tiny.llama(), [Call((), {"input_ids": padded, "attention_mask": mask})])
    for name, (weights,) in found.tokens.items():
        assert weights[:, tiny.LENGTH :].abs().max() == 0, name
        assert weights[:, 1 : tiny.LENGTH].min() > 0, name


def test_tokens_are_weighted_in_the_hessian(monkeypatch):
    seen, keep = {}, layer_solver.solve_and_keep

    def record(caller, name, layer, hessian, recipe, found, shift):
        seen[name] = (hessian.raw().clone(), found)
        return keep(caller, name, layer, hessian, recipe, found, shift)

    monkeypatch.setattr(layer_solver, "solve_and_keep", record)
    ids, caught = tiny.token_ids(11), {}
    llmkern.compress(tiny.llama(), "gptq-int4-g32", ids, progress=False)
    model = tiny.llama()
    _, found = gathered(model, [Call((part,), {}) for part in ids.split(8)])
    squares = {name: torch.cat(parts) for name, parts in found.tokens.items()}
    first = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]
    hook = model.get_submodule(first[0]).register_forward_pre_hook(lambda _, args: caught.update(x=args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    weights = sum((squares[name] / squares[name].mean()).sqrt() for name in first)
    x = (caught["x"] * weights.sqrt().unsqueeze(-1)).reshape(-1, 64).double()
    for name in first:
        hessian, of_outputs = seen[name]
        assert (hessian.double() - x.T @ x).norm() < 1e-4 * (x.T @ x).norm()
        assert torch.equal(of_outputs.damped(0), found.outputs[name].damped(0))


def test_the_default_is_nearer_to_the_dense_model():
    """In KL divergence on other tokens, for a model of little noise: many more tokens than features."""
    ids, others = tiny.token_ids(64), tiny.token_ids(32, seed=1)
    wanted = torch.log_softmax(tiny.output("llama", tiny.llama(), others), -1)
    divergences = []
    for objective in ("layer", "model"):
        model = tiny.llama()
        recipe = llmkern.Recipe.parse("gptq-int3-g32", objective=objective)
        llmkern.compress(model, recipe, ids, progress=False)
        got = torch.log_softmax(tiny.output("llama", model, others), -1)
        divergences.append(float((wanted.exp() * (wanted - got)).sum(-1).mean()))
    assert divergences[1] < divergences[0]


class Blind(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(16, 16)

    def forward(self, x):
        return self.inner(x).argmax(-1)


def test_a_model_without_gradients_is_reported():
    report = llmkern.compress(Blind(), "gptq-int4", [torch.randn(40, 16)], progress=False)
    assert any("what the model's output feels of it is not known" in note for note in report.rows[0].notes)
    assert any("its output has no gradient" in note for note in report.notes)
    with pytest.raises(ValueError, match=r"its output has no gradient \(strict\)"):
        llmkern.compress(Blind(), "gptq-int4", [torch.randn(40, 16)], progress=False, strict=True)
    quiet = llmkern.compress(
        Blind(),
        llmkern.Recipe.parse("gptq-int4", objective="layer"),
        [torch.randn(40, 16)],
        progress=False,
        strict=True,
    )
    assert not any("not known" in note for note in quiet.rows[0].notes)


def test_a_plain_tensor_is_measured_by_its_squared_error():
    model, x = tiny.mlp(), torch.randn(4000, 32)
    _, found = gathered(model, [Call((x,), {})])
    weight = model[2].weight.detach()
    part = found.outputs["2"].parts[0]
    torch.testing.assert_close(part.matrix(), torch.eye(len(weight)), rtol=0, atol=0.15)


def test_blocks_of_outputs_cover_them():
    assert [at.stop - at.start for at in OutputHessian(1100).places] == [512, 512, 76]
    assert blocks(5, 16) == [slice(0, 5)]
    assert DAMP > 0
