import copy
import pickle
import re
import weakref

import pytest
import tiny
import torch

import llmkern
from llmkern import experts, patching
from llmkern.experts import Experts
from llmkern.nn import PackedLinear, is_linear
from llmkern.solvers import rtn

KINDS = tuple(tiny.MIXTURES)
FIRST = "gate_up_proj"


def compress(model, recipe, calibration, **fields):
    return llmkern.compress(model, llmkern.Recipe.parse(recipe, **fields), calibration, progress=False)


def typical_error(got, wanted):
    """The median over tokens of the relative error: a token that just so goes to another expert is no error."""
    return ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median()


@pytest.mark.parametrize("kind", KINDS)
def test_unfused_computes_the_same_and_goes_back(kind):
    model, ids = tiny.MODELS[kind](), tiny.token_ids(2)
    before, modules = tiny.output(kind, model, ids), dict(model.named_modules())
    with experts.unfused(model):
        found = {name: mixture.fused for name, mixture in experts.mixtures(model).items()}
        assert found == {name: modules[name] for name in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")}
        torch.testing.assert_close(tiny.output(kind, model, ids), before, rtol=1e-5, atol=1e-5)
    assert dict(model.named_modules()) == modules
    assert torch.equal(tiny.output(kind, model, ids), before)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_an_expert_get_nothing(kind):
    """Expert parallelism marks them with an index of `num_experts`; so does padding during calibration."""
    fused = tiny.MODELS[kind]().model.layers[0].mlp.experts
    mixture = experts.build(fused)
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    index = torch.tensor([[0, 1], [mixture.num_experts, 2], [mixture.num_experts, mixture.num_experts], [3, 0], [1, 3]])
    got = mixture(x, index, weights)
    wanted = fused(x, index.clamp(max=3), weights.masked_fill(index == mixture.num_experts, 0))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(mixture(x, torch.full((5, 2), mixture.num_experts), weights), torch.zeros(5, 64))


@pytest.mark.parametrize("everything", [False, True])
def test_what_a_mixture_returns_follows_the_routing_while_inputs_are_collected(everything):
    mixture = experts.build(tiny.gpt_oss().model.layers[0].mlp.experts)
    x, weights = torch.randn(12, 64), torch.rand(12, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(12)])
    rows = torch.rand(3, 4) < 0.7
    wanted = mixture(x, index, weights)
    with mixture.counting(everything, None):
        torch.testing.assert_close(mixture(x, index, weights), wanted, rtol=1e-5, atol=1e-5)
    with mixture.counting(everything, rows):
        wanted = torch.where(rows.reshape(-1, 1), wanted, 0.0)
        torch.testing.assert_close(mixture(x, index, weights), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_patch_and_unpatch(kind):
    model, ids = tiny.MODELS[kind](), tiny.token_ids(2)
    before, modules = tiny.output(kind, model, ids), dict(model.named_modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = llmkern.patch(model, "rtn-int8")
    rows = {row.name: row for row in report.rows}
    assert rows["model.layers.1.mlp.experts.3.down_proj"].shape == (64, 32 if kind == "qwen3_moe" else 48)
    assert {skip.name for skip in report.skipped} == {
        "lm_head", *(f"model.layers.{at}.mlp.{'router' if kind == 'gpt_oss' else 'gate'}" for at in (0, 1))
    }  # fmt: skip
    assert sum(row.bytes_before for row in report.rows) + sum(skip.bytes for skip in report.skipped) == sum(
        parameter.nbytes for name, parameter in tiny.MODELS[kind]().named_parameters()
        if parameter.ndim > 1 and "bias" not in name and "embed" not in name
    )  # fmt: skip
    after = tiny.output(kind, model, ids)
    twin = tiny.MODELS[kind]()
    for name in rows:
        set_weight(twin, name, model.get_submodule(name).unpack())
    torch.testing.assert_close(after, tiny.output(kind, twin, ids), rtol=1e-4, atol=1e-4)
    assert 0 < typical_error(after, before) < 0.03
    assert report.model_bytes_after < 0.4 * report.model_bytes_before
    llmkern.unpatch(model)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(tiny.output(kind, model, ids), before)


def test_a_refused_patch_leaves_the_mixtures_alone():
    model = tiny.mixtral()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="group_size"):
        llmkern.patch(model, "rtn-int4-g64")
    assert dict(model.named_modules()) == modules


def test_patterns_name_experts_and_the_rest_stays_dense():
    model, ids = tiny.mixtral(), tiny.token_ids(2)
    modules, before = dict(model.named_modules()), tiny.output("mixtral", model, ids)
    recipe = llmkern.Recipe.parse(
        "rtn-int8", ignore=["lm_head", "re:.*layers.0.mlp.experts", "experts.2.down_proj"],
        overrides={r"re:.*experts\.3\.": "rtn-int4-g16"},
    )  # fmt: skip
    report = llmkern.patch(model, recipe)
    assert model.model.layers[0].mlp.experts is modules["model.layers.0.mlp.experts"]
    mixture = model.model.layers[1].mlp.experts
    assert type(mixture.projections(2)["down_proj"]) is torch.nn.Linear
    # The layer that is left no longer holds on to the memory of all experts.
    weight = mixture.projections(2)["down_proj"].weight
    assert weight.untyped_storage().nbytes() == weight.nbytes
    methods = {row.name: row.method for row in report.rows}
    assert methods["model.layers.1.mlp.experts.3.down_proj"] == "rtn-int4-g16"
    assert methods["model.layers.1.mlp.experts.2.gate_up_proj"] == "rtn-int8"
    assert sum("layers.0.mlp.experts" in skip.name for skip in report.skipped) == 8
    assert 0 < typical_error(tiny.output("mixtral", model, ids), before) < 0.1
    llmkern.unpatch(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(tiny.output("mixtral", model, ids), before)


def test_the_mixture_behaves_like_a_module():
    model, ids = tiny.gpt_oss(), tiny.token_ids(2)
    llmkern.patch(model, "rtn-int4-g16", keep_originals=False)
    wanted = tiny.output("gpt_oss", model, ids)
    assert torch.equal(tiny.output("gpt_oss", copy.deepcopy(model), ids), wanted)
    other = tiny.gpt_oss()
    llmkern.patch(other, "rtn-int4-g16")
    for layer in other.modules():
        if isinstance(layer, PackedLinear):
            layer.words.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(tiny.output("gpt_oss", other, ids), wanted)
    mixture = model.model.layers[0].mlp.experts
    x, index, weights = torch.randn(5, 64), torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0], [1, 3]]), torch.rand(5, 2)
    assert torch.equal(pickle.loads(pickle.dumps(mixture))(x, index, weights), mixture(x, index, weights))
    before = {name: layer.unpack() for name, layer in mixture.named_modules() if isinstance(layer, PackedLinear)}
    mixture.to(torch.bfloat16)
    assert all(torch.equal(mixture.get_submodule(name).unpack(), weight) for name, weight in before.items())
    assert mixture(x.bfloat16(), index, weights.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_to_tokens_and_router(kind):
    model = tiny.MODELS[kind]()
    mixture = experts.build(model.model.layers[0].mlp.experts)
    fused = mixture.fused
    x, weights = torch.randn(6, 64), torch.rand(6, 2)
    index = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0], [1, 3], [0, 2]])
    grads = []
    for module in (fused, mixture):
        leaf, shares = x.clone().requires_grad_(), weights.clone().requires_grad_()
        module(leaf, index, shares).square().sum().backward()
        grads.append((leaf.grad, shares.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:save. llmkern.load reads this folder")
@pytest.mark.parametrize("padded", [False, True])
def test_experts_whose_tokens_come_scaled_and_sorted(padded, monkeypatch, tmp_path):
    """Llama 4: the routing is in the zeros of what the experts are given."""
    seen = {}

    def solve(weight, hessian, recipe, *others):
        seen[weight.data_ptr()] = (hessian.raw().clone(), hessian.tokens)
        return rtn(weight, None, bits=8, group_size=None)

    monkeypatch.setattr(patching, "solve", solve)
    model, twin, batches, home = tiny.llama4(), tiny.llama4(), batches_of(padded), "model.layers.0.feed_forward.experts"
    fused, read = twin.get_submodule(home), []

    def keep(module, args):
        counted = batch["attention_mask"].reshape(-1).bool()
        x = args[0].view(4, -1, 64)
        read.append([part[counted & part.any(-1)] for part in x])

    with experts.unfused(model):
        pointers = {name: layer.weight.data_ptr() for name, layer in model.named_modules() if is_linear(layer)}
    report = compress(model, "gptq-int8", batches, objective="layer")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):  # solved before
        set_weight(twin, name := f"model.layers.0.self_attn.{name}", model.get_submodule(name).unpack())
    with fused.register_forward_pre_hook(keep), torch.no_grad():
        for batch in batches:
            twin(**batch)
    tokens = {row.name: row.tokens for row in report.rows}
    for at in range(4):
        x = torch.cat([parts[at] for parts in read])
        gate, up = (x @ model.get_submodule(f"{home}.{at}.gate_up_proj").unpack().T).chunk(2, -1)
        for name, inputs in (("gate_up_proj", x), ("down_proj", torch.nn.functional.silu(gate) * up)):
            hessian, count = seen[pointers[f"{home}.{at}.{name}"]]
            assert count == len(inputs) == tokens[f"{home}.{at}.{name}"]
            wanted = inputs.T @ inputs
            assert (hessian - wanted).norm() < 1e-4 * wanted.norm()
    llmkern.save(model, tmp_path / "m")
    ids = tiny.token_ids(2)
    assert torch.equal(tiny.output("llama4", llmkern.load(tmp_path / "m"), ids), tiny.output("llama4", model, ids))
    assert typical_error(tiny.output("llama4", model, ids), tiny.output("llama4", tiny.llama4(), ids)) < 0.03


def test_experts_whose_tokens_come_scaled_know_no_others():
    model, ids = tiny.llama4(), tiny.token_ids(2)
    before = tiny.output("llama4", model, ids)
    with pytest.raises(ValueError, match='experts="all": Llama4TextExperts gets its tokens scaled'):
        compress(model, "gptq-int8", tiny.token_ids(), experts="all")
    model = tiny.llama4()
    modules = dict(model.named_modules())
    llmkern.patch(model, "rtn-int8")
    assert 0 < typical_error(tiny.output("llama4", model, ids), before) < 0.03
    llmkern.unpatch(model)
    assert dict(model.named_modules()) == modules


class Described(torch.nn.Module):
    """What `build` goes by, with a forward that the test changes."""

    is_transposed, has_bias, act_fn = False, False, torch.nn.SiLU()

    def __init__(self, act_fn=None, down=(4, 16, 24)):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(4, 48, 16))
        self.down_proj = torch.nn.Parameter(torch.randn(*down))

    def _apply_gate(self, x):
        gate, up = x.chunk(2, -1)
        return torch.relu(gate) * up

    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for token in range(len(x)):
            for expert, weight in zip(index[token], weights[token], strict=True):
                hidden = self._apply_gate(self.gate_up_proj[expert] @ x[token])
                out[token] += weight * (self.down_proj[expert] @ hidden)
        return out


def test_what_a_mixture_is_shows_in_its_attributes():
    assert isinstance(experts.build(Described()), Experts)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "is_transposed", None), "does not say how it is laid out"),
        (lambda m: setattr(m, "_is_expert_parallel", True), "spread over several processes"),
        (lambda m: setattr(m, "down_proj", torch.nn.Parameter(torch.randn(3, 16, 24))), r"got \[4, 48, 16\] and \[3,"),
        (lambda m: setattr(m, "forward", lambda *args: 2 * type(m).forward(m, *args)), "the outputs differ by"),
        (lambda m: setattr(m, "forward", lambda x: x), "does not take tokens, experts and weights: TypeError"),
        (lambda m: setattr(m, "forward", lambda x, index, weights: (x, index)), "its forward returns tuple"),
    ],
)  # fmt: skip
def test_a_mixture_that_is_not_understood_is_left_and_reported(change, reason):
    module = Described()
    change(module)
    model = torch.nn.ModuleDict({"experts": module, "linear": torch.nn.Linear(8, 8)})
    report = llmkern.patch(model, "rtn-int8")
    assert model["experts"] is module
    (skip,) = report.skipped
    assert re.search(reason, skip.reason)
    assert skip.bytes == module.gate_up_proj.nbytes + module.down_proj.nbytes


def expert_inputs(fused, x, index, at, projection, everything):
    """What one expert's layer reads, computed from the fused parameters alone."""
    x = x if everything else x[(index == at).any(1)]
    if projection != "down_proj":
        return x
    weight = fused.gate_up_proj[at] if fused.is_transposed else fused.gate_up_proj[at].T
    x = x @ weight
    return fused._apply_gate(x + fused.gate_up_proj_bias[at] if fused.has_bias else x)


def brute_force(model, name, batches, everything):
    """Σ xxᵀ of a layer's inputs over whole-model forwards, padding left out, and how many there were."""
    home, _, place = name.partition(".experts.")
    total, tokens = 0, 0

    def add(module, args):
        nonlocal total, tokens
        x = args[0].reshape(-1, args[0].shape[-1])[counted]
        if place:
            at, projection = place.split(".")
            x = expert_inputs(module, x, args[1][counted], int(at), projection, everything)
        total, tokens = total + x.double().T @ x.double(), tokens + len(x)

    module = model.get_submodule(f"{home}.experts" if place else home)
    handle = module.register_forward_pre_hook(add)
    with torch.no_grad():
        for batch in batches:
            counted = batch["attention_mask"].reshape(-1).bool()
            model(**batch)
    handle.remove()
    return total, tokens


def batches_of(padded):
    ids = tiny.token_ids(11)
    mask = torch.ones_like(ids)
    if padded:
        mask[:, 20:] = 0
        mask[::2, 17:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["routed", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_hessian_is_that_of_the_compressed_model_so_far(kind, mode, padded, monkeypatch):
    """Layer after layer against the fused model, whose parameters are set to what was solved before."""
    seen = {}

    def solve(weight, hessian, recipe, *others):
        seen[weight.data_ptr()] = (hessian.raw().clone(), hessian.tokens)
        return rtn(weight, None, bits=4, group_size=16)

    monkeypatch.setattr(patching, "solve", solve)
    model, twin = tiny.MODELS[kind](), tiny.MODELS[kind]()
    with experts.unfused(model):
        pointers = {name: layer.weight.data_ptr() for name, layer in model.named_modules() if is_linear(layer)}
    batches = batches_of(padded)
    report = compress(model, "gptq-int4-g16", batches, experts=mode, objective="layer")
    assert report.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    tokens = {row.name: row.tokens for row in report.rows}
    assert len(tokens) == 2 * (4 + 2 * twin.model.layers[0].mlp.experts.num_experts)
    for name in sorted(tokens, key=order_of_solving):
        wanted, count = brute_force(twin, name, batches, mode == "all")
        got, counted = seen[pointers[name]]
        assert count == counted == tokens[name], name
        assert (got.double() - wanted).norm() < 1e-4 * wanted.norm(), name
        set_weight(twin, name)


def order_of_solving(name):
    """Block, then stage: q/k/v, o, all first projections, all second ones."""
    stages = ("q_proj", "k_proj", "v_proj", "o_proj", FIRST, "down_proj")
    return int(name.split(".")[2]), stages.index(name.rpartition(".")[2])


def set_weight(model, name, value=None):
    """Give a layer of the dense model this weight [N, K], or its own after round-to-nearest."""
    home, _, place = name.partition(".experts.")
    with torch.no_grad():
        if not place:
            weight = model.get_submodule(name).weight
        else:
            at, projection = place.split(".")
            fused = model.get_submodule(f"{home}.experts")
            weight = getattr(fused, projection)[int(at)]
            weight = weight.T if fused.is_transposed else weight
        weight.copy_(rtn(weight, None, bits=4, group_size=16).weight if value is None else value)


@pytest.mark.parametrize("mode", ["routed", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_mixture_is_close_and_whole(kind, mode):
    model, ids = tiny.MODELS[kind](), tiny.token_ids(2)
    before = tiny.output(kind, model, ids)
    report = compress(model, "gptq-int8", tiny.token_ids(24), experts=mode)
    after = tiny.output(kind, model, ids)
    assert 0 < typical_error(after, before) < 0.03
    assert not any(is_linear(m) for name, m in model.named_modules() if name != "lm_head")
    routers = sum(skip.bytes for skip in report.skipped if "as routers do" in skip.reason)
    head = sum(skip.bytes for skip in report.skipped if skip.name == "lm_head")
    sums = report.totals
    assert sums["linear_bytes_before"] / sums["coverage"] == pytest.approx(sums["linear_bytes_before"] + routers + head)
    # Nothing keeps the 3-D parameters alive.
    assert all(
        module.fused is None and module.mode is None for module in model.modules() if isinstance(module, Experts)
    )
    few = [row for row in report.rows if any("calibration tokens for" in note for note in row.notes)]
    assert {row.name for row in few} == {row.name for row in report.rows if row.tokens < row.shape[1]}
    assert len(few) == int(report.notes[0].split()[0] if few else 0)


def test_experts_that_few_tokens_reach_are_reported():
    report = compress(tiny.qwen3_moe(), "gptq-int8", tiny.token_ids(6))
    few = {row.name: row for row in report.rows if any("calibration tokens for" in note for note in row.notes)}
    worst = min(few.values(), key=lambda row: row.tokens / row.shape[1])
    assert f"{worst.tokens} calibration tokens for {worst.shape[1]} input features" in worst.notes
    (note,) = report.notes
    assert note.startswith(
        f"{len(few)} layers saw fewer calibration tokens than they have input features, {worst.name} "
    )
    assert note in str(report)


@pytest.mark.parametrize(
    "recipe", ["gptq-int4-g16", "sparsegpt-2:4", "sparsegpt-0.5", "wanda-2:4-int4-g16", "gptq-w8a8"]
)
def test_every_method_beats_doing_it_without_data(recipe):
    ids = tiny.token_ids(24)
    free = recipe.replace("gptq", "rtn").replace("wanda", "magnitude").replace("sparsegpt", "magnitude")
    wanted = tiny.output("mixtral", tiny.mixtral(), ids)
    errors = []
    for name in (recipe, free):
        model = tiny.mixtral()
        compress(model, name, ids)
        errors.append(typical_error(tiny.output("mixtral", model, ids), wanted))
    assert errors[0] < errors[1] * (1.1 if "8" in recipe else 1.0)


def test_the_memory_of_a_mixture_is_free_when_its_block_is_done(monkeypatch):
    model = tiny.mixtral()
    first = weakref.ref(model.model.layers[0].mlp.experts.gate_up_proj)
    alive = []

    def solve(weight, hessian, recipe, *others):
        alive.append(first() is not None)
        return rtn(weight, None, bits=4, group_size=16)

    monkeypatch.setattr(patching, "solve", solve)
    compress(model, "gptq-int4-g16", tiny.token_ids())
    assert alive == [True] * 12 + [False] * 12


def starved():
    """No token of this model is ever routed to expert 2 of layer 1."""
    model = tiny.gpt_oss()
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[2] = -1e4
    return model


def test_an_expert_without_tokens_is_an_error_that_says_what_to_do():
    model = starved()
    with pytest.raises(
        ValueError, match=r'1\.mlp\.experts\.2\.gate_up_proj saw no calibration tokens.*experts="all".*or ignore'
    ):
        compress(model, "gptq-int4-g16", tiny.token_ids(12))
    assert tiny.output("gpt_oss", model, tiny.token_ids(2)).isfinite().all()
    assert isinstance(model.model.layers[0].mlp.experts, Experts)


@pytest.mark.parametrize("fields", [{"experts": "all"}, {"ignore": ["lm_head", r"re:.*1\.mlp\.experts\.2\."]}])
def test_its_remedies_work(fields):
    model = starved()
    report = compress(model, "gptq-int4-g16", tiny.token_ids(12), **fields)
    tokens = {row.name: row.tokens for row in report.rows}
    assert tokens.get("model.layers.1.mlp.experts.2.down_proj") == (288 if "experts" in fields else None)


def test_a_cast_reports_experts_too():
    model = tiny.mixtral()
    report = compress(model, "bf16", None)
    assert sum("experts" in row.name for row in report.rows) == 16
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16


def test_experts_is_a_field_of_recipes():
    recipe = llmkern.Recipe.parse("gptq-int4", experts="all")
    assert llmkern.Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ValueError, match='experts must be "routed" or "all", got \'some\''):
        llmkern.Recipe.parse("gptq-int4", experts="some")
    with pytest.raises(ValueError, match="unknown key 'experts'"):
        llmkern.Recipe.parse("gptq-int4", overrides={"q_proj": {"experts": "all"}})
