import pytest
import tiny
import torch

from llmkern import blocks
from llmkern.shared_inputs import SharedInputs
from llmkern.stages import parts

LISTS = {
    "llama": {"model.layers": 3},
    "gemma3": {"model.layers": 4},
    "gpt2": {"transformer.h": 2},
    "opt": {"model.decoder.layers": 2},
    "bert": {"bert.encoder.layer": 2},
    "t5": {"encoder.block": 2, "decoder.block": 2},
    "albert": {"albert.encoder.albert_layer_groups": 1},
}
PER_BLOCK = {"llama": 7, "gemma3": 7, "gpt2": 4, "opt": 6, "bert": 6, "albert": 6}


def learn(kind, model):
    with torch.no_grad():
        return blocks.learn(model, lambda: model(**tiny.inputs(kind, tiny.token_ids(1)), use_cache=False))


def collect(module, x):
    shared = SharedInputs(blocks.linears(module, "m"))
    with torch.no_grad():
        shared.forward(lambda: module(x))
    return shared


@pytest.mark.parametrize("kind", LISTS)
def test_blocks_are_found_without_names(kind):
    model = tiny.MODELS[kind]()
    assert {name: len(found) for name, found in blocks.find_lists(model)} == LISTS[kind]


@pytest.mark.parametrize("kind", PER_BLOCK)
def test_linear_layers_of_a_block_are_listed(kind):
    name, found = blocks.find_lists(tiny.MODELS[kind]())[0]
    assert len(blocks.linears(found[0], f"{name}.0")) == PER_BLOCK[kind]


def test_a_model_without_blocks_has_none():
    assert blocks.find_lists(tiny.mlp()) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
def test_every_block_follows_the_one_before(kind):
    (chain,), irregular = learn(kind, tiny.MODELS[kind]())
    assert irregular == []
    assert chain.follows == [False] + [True] * (len(chain.blocks) - 1)
    assert set(chain.kind) == {0}


def test_blocks_with_other_masks_are_another_kind():
    (chain,), _ = learn("gemma3", tiny.gemma3())
    assert chain.kind == [0, 1, 0, 1]
    assert all(chain.follows[1:])


def test_chains_come_in_the_order_they_run():
    chains, irregular = learn("t5", tiny.t5())
    assert [chain.names[0] for chain in chains] == ["encoder.block.0", "decoder.block.0"]
    assert irregular == []


def test_a_block_that_runs_several_times_is_no_chain():
    chains, irregular = learn("albert", tiny.albert())
    assert chains == []
    assert irregular == ["albert.encoder.albert_layer_groups.0"]


def test_layers_that_read_one_tensor_share_a_hessian():
    model = tiny.llama()
    (chain,), _ = learn("llama", model)
    with torch.no_grad():
        call = blocks.capture(chain, lambda: model(tiny.token_ids(2)), [0])[0]
        shared = SharedInputs(blocks.linears(chain.blocks[0], "b"))
        shared.forward(lambda: chain.blocks[0](*call.args, **call.kwargs))
    groups = {frozenset(name.split(".")[-1] for name in group) for group in shared.shared_by().values()}
    assert groups == {
        frozenset({"q_proj", "k_proj", "v_proj"}),
        frozenset({"o_proj"}),
        frozenset({"gate_proj", "up_proj"}),
        frozenset({"down_proj"}),
    }
    assert shared.hessian("b.self_attn.q_proj") is shared.hessian("b.self_attn.v_proj")
    assert set(shared.tokens.values()) == {2 * tiny.LENGTH}


class Flat(torch.nn.Module):
    """a reads [batch, length, K], b the same tokens as one row, c only the first of each."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.b(self.a(x).reshape(-1, 8)).sum() + self.c(x[:, 0]).sum()


def test_padding_is_left_out_however_tokens_are_laid_out():
    module, x = Flat(), torch.randn(8, 5, 8)
    shared = SharedInputs(blocks.linears(module, "m"))
    shared.rows = torch.arange(5) < torch.randint(1, 5, (8, 1))
    with torch.no_grad():
        shared.forward(lambda: module(x))
        kept = module.a(x)[shared.rows]
    count = int(shared.rows.sum())
    assert shared.tokens == {"m.a": count, "m.b": count, "m.c": 8}
    assert torch.allclose(shared.hessian("m.b").raw(), kept.T @ kept, atol=1e-4)
    assert shared.unmasked == {"m.c"}


class Turning(torch.nn.Module):
    """The order of the layers is another in every forward, as that of experts sorted by their load."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        one, two = (self.a, self.b) if x[0, 0] > 0 else (self.b, self.a)
        return two(one(x).clone())


def test_a_forward_is_not_cut_short_before_every_layer_ran():
    module = Turning()
    shared = SharedInputs(blocks.linears(module, "m"))
    with torch.no_grad():
        for x in (torch.ones(4, 8), -torch.ones(4, 8)):
            shared.forward(lambda x=x: module(x))
    assert shared.tokens == {"m.a": 8, "m.b": 8}


class InPlace(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        x = x.clone()
        y = self.a(x)
        x.mul_(2)
        return y + self.b(x)


class Sometimes(torch.nn.Module):
    """b runs on the same tensor as a, but only when the first value is positive."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x)
        return y + self.b(x) if x[0, 0] > 0 else y


def test_a_tensor_that_is_written_to_in_between_is_not_shared():
    x = torch.randn(4, 8)
    shared = collect(InPlace(), x)
    assert torch.allclose(shared.hessian("m.b").raw(), 4 * x.T @ x, atol=1e-4)
    assert torch.allclose(shared.hessian("m.a").raw(), x.T @ x, atol=1e-4)


class ByName(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.a(input=x)


def test_a_layer_may_be_called_by_keyword():
    x = torch.randn(4, 8)
    assert torch.allclose(collect(ByName(), x).hessian("m.a").raw(), x.T @ x, atol=1e-4)


def test_a_layer_that_joins_late_gets_its_own_hessian():
    module = Sometimes()
    skipping, joining = -torch.ones(4, 8), torch.ones(4, 8)
    shared = SharedInputs(blocks.linears(module, "m"))
    with torch.no_grad():
        for x in (skipping, joining, joining):
            shared.forward(lambda x=x: module(x))
    assert shared.hessian("m.a").tokens == 12
    assert shared.hessian("m.b").tokens == 8


def test_a_layer_that_leaves_its_group_is_an_error():
    module = Sometimes()
    shared = SharedInputs(blocks.linears(module, "m"))
    with torch.no_grad():
        for x in (torch.ones(4, 8), -torch.ones(4, 8)):
            shared.forward(lambda x=x: module(x))
    with pytest.raises(RuntimeError, match="shared their input in one batch, but not in every batch"):
        shared.hessian("m.b")


def test_hooks_are_gone_even_after_an_error():
    model = tiny.llama()
    with pytest.raises(RuntimeError, match="broken"):
        blocks.learn(model, _raise)
    (chain,), _ = learn("llama", model)
    with pytest.raises(RuntimeError, match="broken"):
        blocks.capture(chain, _raise, [0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _raise():
    raise RuntimeError("broken")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_learning_needs_no_logits(kind):
    model = tiny.MODELS[kind]()
    model.get_output_embeddings().register_forward_hook(lambda *args: pytest.fail("the head ran"))
    chains, irregular = blocks.learn(model, lambda: model(**tiny.inputs(kind, tiny.token_ids(1))))
    assert [len(chain.blocks) for chain in chains] == ([3] if kind == "llama" else [2, 2])
    assert irregular == []


def test_parts_without_data_leave_blocks_whole():
    blocks_of = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "c1": "c"}
    sizes = dict.fromkeys(["in1", "in2", "in3", *blocks_of, "out"], 4)
    assert parts(sizes, blocks_of, 8) == [["in1", "in2"], ["in3", "a1", "a2", "a3"], ["b1", "c1"], ["out"]]
    assert parts(sizes, {}, 12) == [["in1", "in2", "in3"], ["a1", "a2", "a3"], ["b1", "c1", "out"]]
    assert parts(sizes, blocks_of, 100) == [list(sizes)]
