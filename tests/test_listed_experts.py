"""Mixtures whose experts are modules in a list, as in models with code of their own."""

import pytest
import tiny
import torch

import llmkern
import llmkern.stages
from llmkern import listed_experts, patching
from llmkern.nn import PackedLinear
from llmkern.solvers import rtn
from llmkern.stages import split, stages

EXPERTS = 5


class Expert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = torch.nn.Linear(16, 24, bias=False), torch.nn.Linear(16, 24, bias=False)
        self.w2 = torch.nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return self.w2(torch.relu(self.w1(x)) * self.w3(x))


class Mixture(torch.nn.Module):
    """Every token to the expert that likes it best, experts in the order of their load."""

    def __init__(self, starved=None):
        super().__init__()
        self.gate = torch.nn.Linear(16, EXPERTS, bias=False)
        self.experts = torch.nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.starved = starved

    def route(self, flat):
        scores = self.gate(flat)
        if self.starved is not None:
            scores[:, self.starved] = -torch.inf
        return scores.argmax(-1)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        choice, out = self.route(flat), torch.zeros_like(flat)
        for at in choice.bincount(minlength=EXPERTS).argsort().tolist():
            rows = (choice == at).nonzero()[:, 0]
            if len(rows):
                out[rows] = self.experts[at](flat[rows])
        return x + out.view_as(x)


class Block(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.mix, self.moe = torch.nn.Linear(16, 16), Mixture(**options)

    def forward(self, x):
        return self.moe(torch.tanh(self.mix(x)))


class Model(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block(**options) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 8, 16, generator=generator) for _ in range(4)]


def compress(model, batches, **fields):
    return llmkern.compress(model, llmkern.Recipe.parse("gptq-int4", **fields), batches, progress=False)


def wanted_inputs(block, x, everything):
    """Layer of the block -> the rows that it reads, by the block's own weights."""
    found = {"mix": x.reshape(-1, 16)}
    flat = torch.tanh(block.mix(x)).reshape(-1, 16)
    found["moe.gate"] = flat
    choice = block.moe.route(flat)
    for at, expert in enumerate(block.moe.experts):
        rows = flat if everything else flat[choice == at]
        found |= {f"moe.experts.{at}.w1": rows, f"moe.experts.{at}.w3": rows}
        found[f"moe.experts.{at}.w2"] = torch.relu(expert.w1(rows)) * expert.w3(rows)
    return found


@pytest.mark.parametrize("mode", ["routed", "all"])
def test_every_hessian_is_that_of_the_compressed_model_so_far(mode, monkeypatch):
    seen = {}

    def solve(weight, hessian, recipe, *others):
        seen[weight.data_ptr()] = (hessian.raw().clone(), hessian.tokens)
        return rtn(weight, None, bits=4, group_size=16)

    monkeypatch.setattr(patching, "solve", solve)
    model, twin, hidden = Model(), Model(), torch.cat(data())
    pointers = {name: m.weight.data_ptr() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    report = compress(model, data(), experts=mode, objective="layer")
    tokens = {row.name: row.tokens for row in report.rows}
    assert not any("changed nothing" in note for note in report.notes)
    with torch.no_grad():
        for at, block in enumerate(twin.blocks):
            names = wanted_inputs(block, hidden, mode == "all")
            first = [name for name in names if name.endswith(("w1", "w3"))]
            gate = [["moe.gate"], first] if mode == "routed" else [["moe.gate", *first]]  # these share their input
            for stage in (["mix"], *gate, [name for name in names if name.endswith("w2")]):
                inputs = wanted_inputs(block, hidden, mode == "all")
                for name in stage:
                    hessian, count = seen[pointers[f"blocks.{at}.{name}"]]
                    assert count == len(inputs[name]) == tokens[f"blocks.{at}.{name}"]
                    torch.testing.assert_close(hessian, inputs[name].T @ inputs[name], rtol=1e-4, atol=1e-3)
                for name in stage:
                    weight = block.get_submodule(name).weight
                    weight.copy_(rtn(weight, None, bits=4, group_size=16).weight)
            hidden = block(hidden)


def test_an_expert_without_tokens():
    with pytest.raises(ValueError, match=r'experts\.3\.w1 saw no calibration tokens.*experts="all"'):
        compress(Model(starved=3), data())
    model = Model(starved=3)
    report = compress(model, data(), experts="all")
    assert {row.tokens for row in report.rows if "experts" in row.name} == {96}
    assert isinstance(model.blocks[1].moe.experts[3].w2, PackedLinear)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_all_without_a_mixture_is_noted():
    report = compress(torch.nn.Sequential(torch.nn.Linear(16, 16)), [torch.randn(20, 16)], experts="all")
    assert report.notes == ['experts="all" changed nothing: no mixture of experts ran during calibration']


class Chained(torch.nn.Module):
    """A list whose modules feed each other."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(16, 16)) for _ in range(3))

    def forward(self, x):
        for part in self.parts:
            x = torch.tanh(part(x))
        return x


def test_only_lists_that_are_given_the_tokens_are_mixtures():
    x = data()[0]
    model = torch.nn.ModuleDict({"mixture": Mixture(), "chain": Chained()})

    def run():
        model["mixture"](x)
        model["chain"](x)

    (found,) = listed_experts.find(model, run)
    assert found.experts == tuple(model["mixture"].experts)
    assert found.around is model["mixture"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("mode", ["routed", "all"])
def test_experts_in_a_dict_with_a_forward(mode):
    """As Switch Transformers has them; one token of each sequence and expert may be dropped by the router."""
    ids, model = tiny.token_ids(24), tiny.switch()
    before = tiny.output("switch", model, ids)
    calibration = [tiny.inputs("switch", part) for part in ids.split(8)]
    report = llmkern.compress(model, llmkern.Recipe.parse("gptq-int8", experts=mode), calibration, progress=False)
    after = tiny.output("switch", model, ids)
    experts = {row.name: row.tokens for row in report.rows if ".expert_" in row.name}
    assert len(experts) == 2 * 2 * 4
    assert all(tokens == ids.numel() for tokens in experts.values()) == (mode == "all")
    assert 0 < ((after - before).norm(dim=-1) / before.norm(dim=-1)).median() < 0.03


def layers_of(experts, *names):
    return [f"b.7.experts.{at}.{name}" for at in experts for name in names]


def test_stages_of_few_inputs_are_those_inputs():
    groups = [["b.q", "b.k"], ["b.o"], ["b.experts.0.w1"], ["b.experts.1.w1"]]
    assert stages([name for group in groups for name in group], groups) == groups


def test_stages_of_experts_are_kinds():
    layers = ["b.7.q", "b.7.o", *layers_of(range(9), "w1", "w3", "w2")]
    ran = [["b.7.q"], ["b.7.o"]]
    for at in (4, 2, 0, 1, 3, 5, 6, 7):  # the last expert is not hit
        ran += [layers_of([at], "w1", "w3"), layers_of([at], "w2")]
    found = stages(layers, ran)
    assert [set(stage) for stage in found] == [
        {"b.7.q"}, {"b.7.o"}, set(layers_of(range(9), "w1", "w3")), set(layers_of(range(9), "w2"))
    ]  # fmt: skip


def test_stages_of_fused_experts_are_kinds_however_few():
    groups = [["b.q"], ["b.experts.0.up"], ["b.experts.0.down"], ["b.experts.1.up"], ["b.experts.1.down"]]
    layers = [name for group in groups for name in group]
    found = stages(layers, groups, routed={name for name in layers if "experts" in name})
    assert found == [["b.q"], ["b.experts.0.up", "b.experts.1.up"], ["b.experts.0.down", "b.experts.1.down"]]


def test_stages_are_split_by_the_memory_of_their_hessians(monkeypatch):
    monkeypatch.setattr(llmkern.stages, "MAX_HESSIANS", 4 * 2 * 16 * 16)
    groups = [[f"e.{at}.w1", f"e.{at}.w3"] for at in range(4)]
    stage = [*(name for group in groups for name in group), "e.4.w1", "e.4.w3"]  # the last two have not run yet
    found = split(stage, groups, dict.fromkeys(stage, 16))
    assert found == [[*groups[0], *groups[1]], [*groups[2], *groups[3]], ["e.4.w1", "e.4.w3"]]
    assert split(stage[:4], groups, dict.fromkeys(stage, 1000)) == groups[:2]


@pytest.mark.parametrize("mode", ["routed", "all"])
def test_a_split_stage_gives_the_same(mode, monkeypatch):
    whole = compress(Model(), data(), experts=mode)
    monkeypatch.setattr(llmkern.stages, "MAX_HESSIANS", 4 * 3 * 24 * 24)
    parts = compress(Model(), data(), experts=mode)
    losses = {row.name: row.loss for row in whole.rows}
    assert {row.name: row.loss for row in parts.rows} == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ([f"b.{name}" for name in "abcdefghi"], [[f"b.{name}"] for name in "abcdefghi"]),  # nine inputs
        (["b.q", "b.never"], [["b.q"]]),
    ],
)
def test_stages_that_cannot_be_told_are_one(layers, groups):
    assert stages(layers, groups) == [layers]
