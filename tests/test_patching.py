import copy
import pickle

import pytest
import tiny
import torch

import llmkern
from llmkern.formats import Sparse24Weight
from llmkern.nn import PackedLinear

SCHEMES = (
    "rtn-int8", "rtn-int4-g32", "rtn-int4-g32-asym", "rtn-int4", "w8a8", "rtn-int4-g32-a8", "magnitude-2:4",
    "magnitude-0.5", "magnitude-2:4-int4-g32", "magnitude-0.5-int8", "magnitude-2:4-int8",
)  # fmt: skip


def packed_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def dense_twin(model):
    """The same model computed by torch alone: every packed layer as an nn.Linear with the unpacked weight."""
    twin = copy.deepcopy(model)
    for name, layer in packed_layers(twin).items():
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight = torch.nn.Parameter(layer.unpack())
        linear.bias = layer.bias
        twin.set_submodule(name, linear)
    return twin


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "t5"])
def test_patch_replaces_every_layer_and_unpatch_restores(kind):
    model = tiny.MODELS[kind]()
    ids = tiny.token_ids(2)
    before, modules = tiny.output(kind, model, ids), dict(model.named_modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = llmkern.patch(model, "rtn-int8")
    assert {row.name for row in report.rows} == set(packed_layers(model))
    linears = {name for name, module in modules.items() if type(module).__name__ in ("Linear", "Conv1D")}
    assert {row.name for row in report.rows} | {skip.name for skip in report.skipped} == linears
    after = tiny.output(kind, model, ids)
    torch.testing.assert_close(after, tiny.output(kind, dense_twin(model), ids), rtol=1e-4, atol=1e-4)
    assert not torch.equal(before, after)
    llmkern.unpatch(model)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(tiny.output(kind, model, ids), before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_computes_its_own_unpacked_weight(scheme):
    model = tiny.llama()
    report = llmkern.patch(model, scheme)
    ids = tiny.token_ids(2)
    wanted = tiny.output("llama", dense_twin(model), ids)
    error = (tiny.output("llama", model, ids) - wanted).norm() / wanted.norm()
    assert error < (0.03 if scheme.endswith("a8") else 1e-5)
    assert all(row.bytes_after < row.bytes_before and row.kernel for row in report.rows)
    assert all(0 < row.loss < 1 for row in report.rows)


def test_the_patched_model_behaves_like_a_module():
    model = tiny.llama()
    llmkern.patch(model, "rtn-int4-g32", keep_originals=False)
    ids = tiny.token_ids(2)
    wanted = tiny.output("llama", model, ids)
    assert torch.equal(tiny.output("llama", copy.deepcopy(model), ids), wanted)
    other = tiny.llama()
    llmkern.patch(other, "rtn-int4-g32")
    for layer in packed_layers(other).values():
        layer.words.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(tiny.output("llama", other, ids), wanted)
    layer = next(iter(packed_layers(model).values()))
    x = torch.randn(3, layer.in_features)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_a_cast_keeps_the_packed_weight():
    model = tiny.llama()
    llmkern.patch(model, "rtn-int4-g32")
    before = {name: layer.unpack() for name, layer in packed_layers(model).items()}
    model.to(torch.bfloat16)
    assert all(torch.equal(layer.unpack(), before[name]) for name, layer in packed_layers(model).items())
    assert tiny.output("llama", model, tiny.token_ids(2)).dtype == torch.bfloat16


def test_a_patched_layer_compiles_without_a_graph_break():
    layer = torch.nn.Linear(32, 16)
    model = torch.nn.Sequential(layer)
    llmkern.patch(model, "rtn-int8")
    x = torch.randn(3, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_gradients_flow_to_x_and_bias_only():
    model = tiny.mlp()
    llmkern.patch(model, "rtn-int8")
    x = torch.randn(3, 32, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert model[0].bias.grad is not None
    model[0].scales.requires_grad_()
    with pytest.raises(RuntimeError, match="packed weights have none"):
        model(x)


def test_the_bias_stays_the_same_parameter():
    model = tiny.mlp()
    bias = model[0].bias.requires_grad_(False)
    llmkern.patch(model, "rtn-int8")
    assert model[0].bias is bias
    assert model[2].bias is None


def test_the_layer_describes_itself():
    model = tiny.mlp()
    llmkern.patch(model, "rtn-int4-g16-a8")
    assert repr(model[0]) == ("PackedLinear(32, 32, Int4Weight, int32, group_size=16, bias=True, activations=int8)")


def test_sparse_weights_are_packed_unchanged():
    model = tiny.mlp()
    with torch.no_grad():
        model[0].weight.view(32, 8, 4)[..., :2] = 0
        model[2].weight.view(32, 8, 4)[..., 1:3] = 0
    dense = [model[0].weight.clone(), model[2].weight.clone()]
    report = llmkern.patch(model, llmkern.Recipe.parse("pack-2:4", dtype="float32"))
    assert isinstance(model[0].packed, Sparse24Weight)
    assert torch.equal(model[0].unpack(), dense[0])
    assert torch.equal(model[2].unpack(), dense[1])
    assert [row.loss for row in report.rows] == [0.0, 0.0]


def test_only_the_given_model_is_touched():
    one, two = tiny.mlp(), tiny.mlp()
    llmkern.patch(one, "rtn-int8")
    assert type(two[0]) is torch.nn.Linear
    copied = copy.deepcopy(one)
    llmkern.unpatch(copied)
    assert type(copied[0]) is torch.nn.Linear
    assert isinstance(one[0], PackedLinear)


def test_a_layer_that_sits_in_two_places_is_replaced_in_both():
    layer = torch.nn.Linear(16, 16)
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), layer)
    llmkern.patch(model, "rtn-int8")
    assert isinstance(model[0], PackedLinear)
    assert model[0] is model[2]
    llmkern.unpatch(model)
    assert model[0] is layer
    assert model[2] is layer


class Tied(torch.nn.Module):
    """Two linear layers with one weight, neither of them an output head."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(16, 16) for _ in range(3))
        self.b.weight = self.a.weight


def test_layers_that_share_a_weight_are_left_and_reported():
    model = Tied()
    report = llmkern.patch(model, "rtn-int8")
    assert [row.name for row in report.rows] == ["c"]
    assert {skip.name for skip in report.skipped if skip.reason.startswith("its weight is tied")} == {"a", "b"}
    assert model.a.weight is model.b.weight


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "t5"])
def test_a_tied_head_is_packed_on_request(kind):
    model = tiny.MODELS[kind](**({"tie_word_embeddings": True} if kind == "llama" else {}))
    ids, embeddings, head = tiny.token_ids(2), model.get_input_embeddings(), model.get_output_embeddings()
    before, dense = tiny.output(kind, model, ids), embeddings.weight.clone()
    report = llmkern.patch(model, "rtn-int8", ignore=())
    packed = model.get_output_embeddings()
    row = next(row for row in report.rows if model.get_submodule(row.name) is packed)
    assert any(note.startswith("its weight was tied to that of ") for note in row.notes)
    assert isinstance(packed, PackedLinear)
    assert torch.equal(embeddings.weight, dense)
    assert 0 < (tiny.output(kind, model, ids) - before).norm() < 0.05 * before.norm()
    llmkern.unpatch(model)
    assert model.get_output_embeddings() is head
    assert head.weight is embeddings.weight


def test_a_model_that_is_a_linear_layer_has_no_place_for_another():
    with pytest.raises(ValueError, match="itself a linear layer"):
        llmkern.patch(torch.nn.Linear(8, 8), "rtn-int8")


def test_modules_with_a_weight_in_a_forward_of_their_own_are_reported():
    model = torch.nn.ModuleDict({
        "attention": torch.nn.MultiheadAttention(16, 2), "lstm": torch.nn.LSTM(16, 16),
        "bilinear": torch.nn.Bilinear(4, 4, 4), "linear": torch.nn.Linear(16, 16), "conv": torch.nn.Conv1d(4, 4, 3),
        "embedding": torch.nn.Embedding(8, 16), "norm": torch.nn.LayerNorm(16), "raw": torch.nn.Module(),
    })  # fmt: skip
    for name in ("w1", "position_embeddings", "class_token", "relative_bias"):
        size = (1, 1, 8) if name == "class_token" else (6, 8)
        model["raw"].register_parameter(name, torch.nn.Parameter(torch.randn(size)))
    report = llmkern.patch(model, "rtn-int8")
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert reasons.keys() == {"attention", "attention.out_proj", "lstm", "bilinear", "raw"}
    assert (
        reasons["attention"] == "MultiheadAttention multiplies with its weight in a forward of its own (as routers do)"
    )
    assert "a subclass of nn.Linear" in reasons["attention.out_proj"]
    assert "does not say how it is laid out" in reasons["bilinear"]
    sizes = {skip.name: skip.bytes for skip in report.skipped}
    assert sizes["attention"] == 4 * 48 * 16
    assert sizes["raw"] == 4 * 6 * 8


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mask", [False, True])
def test_torch_s_own_encoder_runs_on_packed_layers(mask):
    """Its layers hand their weights to one fused kernel where they can."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model, x = torch.nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 5, 32)
    padding = {"src_key_padding_mask": torch.arange(5) > torch.tensor([[4], [3], [2]])} if mask else {}
    counts = ~padding.get("src_key_padding_mask", torch.zeros(3, 5, dtype=torch.bool))
    with torch.no_grad():
        before = model(x, **padding)
        report = llmkern.patch(model, "rtn-int8")
        after = model(x, **padding)
    assert {row.name.split(".", 2)[2] for row in report.rows} == {"linear1", "linear2"}
    error = (after - before)[counts].norm() / before[counts].norm()
    assert 0 < error < 0.01
    with pytest.raises(TypeError, match="linear: a packed layer has no dense weight"):
        torch.nn.functional.linear(x, model.layers[0].linear1.weight)


def test_a_layer_with_two_names_is_reported_once_with_both():
    layer = torch.nn.Linear(16, 16)
    model = torch.nn.ModuleDict({"a": layer, "b": layer, "c": torch.nn.Linear(16, 16)})
    report = llmkern.patch(model, "rtn-int8", targets=["b"])  # either name will do
    assert [row.name for row in report.rows] == ["a"]
    assert report.rows[0].notes[-1] == "the same module is also b, replaced with it"
    assert model["a"] is model["b"]
    assert isinstance(model["a"], PackedLinear)


@pytest.mark.parametrize(
    ("scheme", "fields", "text"),
    [
        ("gptq-int4-g32", {}, "needs calibration"),
        ("bf16", {}, "packs nothing"),
        ("rtn-int4-g64", {}, r"layer 0 .*group_size must be in \[1, K=32\]"),
        ("pack-2:4", {}, "layer 0 .*not 2:4"),
        ("rtn-int8", {"targets": ["q_proj"]}, "matches no linear layer"),
        ("rtn-int8", {"ignore": ["re:."]}, "no linear layer is left"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(scheme, fields, text):
    model = tiny.mlp()
    with pytest.raises(ValueError, match=text) as error:
        llmkern.patch(model, scheme, **fields)
    assert "\n" not in str(error.value)
    assert packed_layers(model) == {}


def test_patching_twice_is_refused():
    model = tiny.mlp()
    llmkern.patch(model, "rtn-int8")
    with pytest.raises(ValueError, match="packed already"):
        llmkern.patch(model, "rtn-int8")
    llmkern.unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        llmkern.unpatch(model)
    with pytest.raises(ValueError, match="no linear layers"):
        llmkern.patch(torch.nn.ReLU(), "rtn-int8")
