"""Layers that make up for what those before them have changed (`llmkern.solvers.shift`)."""

import pytest
import tiny
import torch
from test_pipeline import blocks_in_order, calibration_of, compress
from torch import nn

import llmkern
from llmkern import layer_solver, patching, streaming
from llmkern.dense_twin import DenseTwin
from llmkern.nn import dense_weight, is_linear
from llmkern.shared_inputs import DenseRun, SharedInputs
from llmkern.solve import solve
from llmkern.solvers import Hessian, InputShift, corrected, gptq, rtn

RECIPE = llmkern.Recipe.parse("gptq-int3-g16", objective="layer", input_correction=1)


def collected(x, dense):
    hessian, shift = Hessian(x.shape[1]).add(x), InputShift(x.shape[1])
    for part, reference in zip(x.split(50), dense.split(50), strict=True):
        shift.add(reference, part)
    return hessian, shift


@pytest.mark.parametrize("damp", [0.01, 0.9])
@pytest.mark.parametrize("k", [1, 3, 64, 300])
def test_the_correction_is_the_closed_form(k, damp):
    x = torch.randn(4 * k + 20, k)
    dense, w = x + 0.1 * torch.randn_like(x) + 0.2 * x.roll(1, 1), torch.randn(7, k)
    hessian, shift = collected(x, dense)
    assert shift.tokens == len(x)
    x, dense, wide = x.double(), dense.double(), w.double()
    ridge = max(damp, 2 * k / len(x)) * x.square().sum() / k
    step = wide @ (dense - x).T @ x @ torch.linalg.inv(x.T @ x + ridge * torch.eye(k, dtype=torch.float64))
    for strength in (1.0, 0.3):
        got = corrected(w, hessian, shift, strength, damp) - w
        torch.testing.assert_close(got.double(), strength * step, rtol=1e-3, atol=1e-4)


def test_a_corrected_weight_is_nearer_to_the_dense_output():
    x, w = torch.randn(500, 32), torch.randn(16, 32)
    dense = x @ (torch.eye(32) + 0.1 * torch.randn(32, 32)) + 0.05 * torch.randn(500, 32)
    hessian, shift = collected(x, dense)
    errors = [(dense @ w.T - x @ corrected(w, hessian, shift, s).T).norm() for s in (0.0, 0.5, 1.0, 2.0)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < errors[3]


def test_few_tokens_correct_less():
    """What is noise alone is not followed: on tokens that were not seen it would only be an error more."""
    w, errors = torch.randn(16, 64), []
    x, noise = torch.randn(80, 64), 0.3 * torch.randn(80, 64)
    other = torch.randn(500, 64)
    for few in (True, False):
        hessian, shift = collected(x, x + noise)
        if not few:  # as if each token had been seen a hundred times
            hessian, shift.tokens = Hessian.from_partial(hessian.partial(), 8000), 8000
        errors.append((other @ (corrected(w, hessian, shift) - w).T).norm())
    assert errors[0] < 0.5 * errors[1]


def test_features_that_are_dead_stay_out():
    x, w = torch.randn(100, 8), torch.randn(4, 8)
    x[:, 3] = 0
    hessian, shift = collected(x, x + torch.randn_like(x))
    got = corrected(w, hessian, shift)
    assert torch.equal(got[:, 3], w[:, 3])
    assert not torch.allclose(got[:, 2], w[:, 2])


def test_wrong_inputs_are_refused():
    shift, x = InputShift(8), torch.randn(20, 8)
    shift.add(torch.full((20, 8), torch.nan), x)
    with pytest.raises(ValueError, match="the dense model's input has non-finite values"):
        corrected(torch.randn(3, 8), Hessian(8).add(x), shift)
    hessian = Hessian(4).add(torch.randn(9, 4))
    with pytest.raises(ValueError, match=r"\[N, K\]=\[3, 4\], the Hessian of K=4, the shift of K=8"):
        corrected(torch.randn(3, 4), hessian, shift)
    with pytest.raises(ValueError, match="the Hessian has 9 tokens, the shift 0"):
        corrected(torch.randn(3, 4), hessian, InputShift(4))


def moved(kind, twin, dense, names, batches):
    """Layer -> Σ (x' - x) xᵀ, brute force: both whole models on all data."""
    found = {}
    with torch.no_grad():
        for batch in batches:
            inputs = []
            for model in (twin, dense):
                seen = {}
                handles = [
                    model.get_submodule(name).register_forward_pre_hook(
                        lambda layer, args, name=name, seen=seen: seen.update({name: args[0]})
                    )
                    for name in names
                ]
                model(**batch)
                for handle in handles:
                    handle.remove()
                inputs.append(seen)
            for name in names:
                x, reference = (seen[name].flatten(0, -2).double() for seen in inputs)
                found[name] = found.get(name, 0) + (reference - x).T @ x
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "bert"])
def test_every_shift_is_from_the_dense_model_to_the_compressed_one_so_far(kind, monkeypatch):
    seen = {}

    def solve(weight, hessian, recipe, output, shift):
        seen[weight.data_ptr()] = None if shift is None else shift.sum.clone()  # None: outside of the blocks
        return rtn(weight, None, bits=3, group_size=16)

    monkeypatch.setattr(patching, "solve", solve)
    model, twin, dense = (tiny.MODELS[kind]() for _ in range(3))
    pointers = {name: module.weight.data_ptr() for name, module in model.named_modules() if is_linear(module)}
    calibration = calibration_of(kind)
    compress(model, RECIPE, calibration)
    first = True
    for layers in blocks_in_order(twin, kind):
        for name in layers:
            wanted = moved(kind, twin, dense, [name], [tiny.inputs(kind, calibration)])[name]
            got = seen[pointers[name]].double()
            # In rough products, where those are fast.
            assert (got - wanted).norm() < 4e-3 * wanted.norm() or (first and not got.any() and not wanted.any()), name
            weight = dense_weight(twin.get_submodule(name))
            weight.copy_(rtn(weight, None, bits=3, group_size=16).weight)
        assert any(seen[pointers[name]].any() for name in layers)
        first = False


@pytest.mark.parametrize(
    ("kind", "ignore"),
    [("llama", ()), ("llama", ("down_proj",)), ("mixtral", ()), ("mixtral", ("gate_up_proj", "down_proj"))],
)
def test_the_dense_model_is_not_run_again_to_go_on(kind, ignore, monkeypatch):
    """Where its last comparison of a block could end with the block, that has handed on what `advance` would."""
    calibration, dense = [tiny.inputs(kind, ids) for ids in tiny.token_ids(10).split(4)], tiny.MODELS[kind]()
    runs, blocks, wanted = [], list(dense.model.layers[1:]), {}
    for block in blocks:
        block.register_forward_pre_hook(lambda block, args: wanted.setdefault(block, []).append(args[0]))
    for batch in calibration:
        dense(**batch)
    advance = DenseTwin.advance

    def watched(self):
        before = len(runs)
        bound = self._bound
        self._bound = lambda call: lambda: (runs.append(1), bound(call)())[1]
        advance(self)
        del self._bound
        states = [self.hidden.get(at) for at in range(len(calibration))]
        for got, state in zip(states, wanted.pop(blocks.pop(0)), strict=True):
            torch.testing.assert_close(got, state)
        # What was routed to experts is no comparison of all tokens, so a block that ends with experts is run again.
        routed_last = kind == "mixtral" and not ignore
        assert len(runs) - before == (len(calibration) if routed_last else 0)

    monkeypatch.setattr(DenseTwin, "advance", watched)
    compress(tiny.MODELS[kind](), llmkern.Recipe.parse(RECIPE, ignore=("lm_head", *ignore)), calibration)
    assert not wanted
    assert bool(runs) == (kind == "mixtral" and not ignore)


def test_what_is_outside_of_the_blocks_or_routed_says_so():
    report = compress(tiny.llama(), llmkern.Recipe.parse(RECIPE, ignore=()), tiny.token_ids(20))
    unknown = {row.name for row in report.rows if layer_solver.NO_SHIFT in row.notes}
    assert unknown == {"lm_head"}
    report = compress(tiny.mixtral(), RECIPE, tiny.token_ids(40))
    for row in report.rows:
        assert (layer_solver.NO_SHIFT in row.notes) == ("experts" in row.name), row.name


@pytest.mark.parametrize("weighted", [False, True])
def test_tokens_count_as_they_do_in_the_hessian(weighted):
    layer, x, dense = nn.Linear(8, 4), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    shared, weight = SharedInputs({"layer": layer}, shifts=True), torch.rand(2, 5) if weighted else torch.ones(2, 5)
    shared.weights = {"layer": weight} if weighted else {}
    shared.rows = torch.tensor([[True] * 5, [True, False, True, False, False]])
    for _ in range(2):
        shared.forward(lambda: layer(x), DenseRun(lambda: layer(dense), 10))
    kept = weight * shared.rows
    wanted = 2 * torch.einsum("bt,bti,btj->ij", kept, dense - x, x)
    torch.testing.assert_close(shared.shift("layer").sum, wanted)
    torch.testing.assert_close(shared.hessian("layer").raw(), 2 * torch.einsum("bt,bti,btj->ij", kept, x, x))
    assert shared.shift("layer").tokens == shared.hessian("layer").tokens == 14


class Sometimes(nn.Module):
    """A layer that takes all tokens, or half of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        y = self.first(x)
        return y + self.second(y if x[0, 0, 0] > 0 else y[:, ::2]).sum()


def test_a_layer_that_takes_some_of_the_tokens_is_not_corrected():
    model = nn.Module()
    model.blocks = nn.ModuleList([Sometimes(), Sometimes()])
    model.forward = lambda x: model.blocks[1](model.blocks[0](x))
    x = torch.randn(4, 2, 30, 16)
    x[:, 0, 0, 0] = torch.tensor([1.0, -1, 1, -1])
    report = compress(model, RECIPE, list(x))
    uncorrected = {row.name for row in report.rows if layer_solver.NO_SHIFT in row.notes}
    assert uncorrected == {"blocks.0.second", "blocks.1.second"}


def test_padding_does_not_count():
    ids, mask = tiny.token_ids(8), torch.ones(8, tiny.LENGTH, dtype=torch.int64)
    mask[::2, 15:] = 0
    padded = ids.masked_fill(mask == 0, 7)
    shifts = []
    for batch in (ids, padded):
        seen = []

        def record(*args, seen=seen, keep=layer_solver.solve_and_keep):
            seen.append(args[-1].sum)
            return keep(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer_solver, "solve_and_keep", record)
            compress(tiny.llama(), RECIPE, [{"input_ids": batch, "attention_mask": mask}])
        shifts.append(seen)
    assert len(shifts[0]) == 21
    for one, other in zip(*shifts, strict=True):
        assert (one - other).norm() <= 1e-3 * one.norm()


def test_the_compressed_model_stays_nearer_to_the_dense_one():
    ids = tiny.token_ids(64)
    wanted, errors = tiny.output("llama", tiny.llama(num_hidden_layers=6), ids), []
    for strength in (0, None):
        model = tiny.llama(num_hidden_layers=6)
        compress(model, llmkern.Recipe.parse(RECIPE, input_correction=strength), ids)
        errors.append((tiny.output("llama", model, ids) - wanted).norm())
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("strength", [None, 0, 0.9])
def test_a_layer_is_corrected_as_far_as_its_recipe_says(strength):
    x, w = torch.randn(200, 32), torch.randn(16, 32)
    hessian, shift = collected(x, x + 0.3 * torch.randn_like(x))
    recipe = llmkern.Recipe.parse("gptq-int4-g16", input_correction=strength)
    wanted = gptq(corrected(w, hessian, shift, 0.5 if strength is None else strength), hessian, group_size=16)
    assert torch.equal(solve(w, hessian, recipe, shift=shift).weight, wanted.weight)


@pytest.mark.parametrize("recipe", ["sparsegpt-2:4", "sparsegpt-2:4-int4-g16", "gptq-int4"])
@pytest.mark.parametrize("objective", ["model", "layer"])
def test_every_solver_takes_it(recipe, objective):
    plain, other = tiny.llama(), tiny.llama()
    compress(plain, llmkern.Recipe.parse(recipe, objective=objective, input_correction=0), tiny.token_ids(20))
    report = compress(other, llmkern.Recipe.parse(recipe, objective=objective), tiny.token_ids(20))
    assert len(report.rows) == 21
    assert not any(row.notes for row in report.rows)
    assert not torch.equal(*(tiny.output("llama", model, tiny.token_ids(2)) for model in (plain, other)))


def test_spilled_and_streamed_it_is_the_same(tmp_path):
    ids = tiny.token_ids(20)
    model, small = tiny.llama(), tiny.llama()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    compress(model, RECIPE, ids)
    compress(small, RECIPE, ids, activation_budget=10_000)
    streamed = streaming.stream(tmp_path)
    compress(streamed, RECIPE, ids)
    wanted = tiny.output("llama", model, ids)
    for other in (small, streamed):
        assert torch.equal(tiny.output("llama", other, ids), wanted)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_goes_on_with_the_same_bits(stop, tmp_path, monkeypatch):
    ids, whole, other = tiny.token_ids(20), tiny.llama(), tiny.llama()
    compress(whole, RECIPE, ids)

    def broken(*args):
        if f"layers.{stop}." in args[1]:
            raise RuntimeError("stopped")
        return keep(*args)

    keep = layer_solver.solve_and_keep
    monkeypatch.setattr(layer_solver, "solve_and_keep", broken)
    with pytest.raises(RuntimeError, match="stopped"):
        compress(tiny.llama(), RECIPE, ids, state_dir=tmp_path / "state")
    monkeypatch.setattr(layer_solver, "solve_and_keep", keep)
    compress(other, RECIPE, ids, state_dir=tmp_path / "state")
    assert torch.equal(tiny.output("llama", other, ids), tiny.output("llama", whole, ids))
    with pytest.raises(ValueError, match="input_correction"):
        compress(tiny.llama(), llmkern.Recipe.parse(RECIPE, input_correction=0.5), ids, state_dir=tmp_path / "state")


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "much"])
def test_a_strength_is_a_share(value):
    with pytest.raises(ValueError, match=r"recipe: input_correction must be None or in \[0, 1\], got"):
        llmkern.Recipe.parse("gptq-int4", input_correction=value)


def test_methods_without_a_least_squares_weight_refuse_it():
    with pytest.raises(ValueError, match="input_correction is for gptq and sparsegpt, got wanda"):
        llmkern.Recipe.parse("wanda-2:4", input_correction=1)


def test_published_forms_are_not_corrected():
    assert llmkern.Recipe.parse("gptq-int4").correction == 0.5
    assert llmkern.Recipe.parse("sparsegpt-2:4", objective="layer").correction == 0.5
    for recipe in ("wanda-2:4", "rtn-int4", "wanda-2:4-int4"):
        assert not llmkern.Recipe.parse(recipe).correction
    assert not llmkern.Recipe.parse("gptq-int4", act_order="dynamic").correction
    assert llmkern.Recipe.parse("gptq-int4", act_order="dynamic", input_correction=1).correction == 1
    assert not llmkern.Recipe.parse("sparsegpt-2:4", refit=False).correction
