"""A packed layer whose columns are in another order than x's."""

import copy
import pickle

import pytest
import tiny
import torch
from test_checkpoint import reseal

import llmkern
from llmkern.formats import Int4Weight, Int8Weight
from llmkern.nn import PackedLinear


def layer_and_weight(generator, kind=Int4Weight, n=24, k=48):
    order = torch.randperm(k, generator=generator)
    packed = kind.pack(torch.randn(n, k, generator=generator), group_size=16)
    weight = torch.empty(n, k)
    weight[:, order] = packed.unpack()
    return PackedLinear(packed, torch.randn(n, generator=generator), input_order=order), weight


@pytest.mark.parametrize("kind", [Int4Weight, Int8Weight])
@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 5, 48), (0, 48)])
def test_the_product_is_that_of_the_weight_in_its_own_order(kind, shape, generator):
    layer, weight = layer_and_weight(generator, kind)
    assert torch.equal(layer.unpack(), weight)
    x = torch.randn(shape, generator=generator)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, layer.bias), rtol=1e-4, atol=1e-4)


def test_it_is_a_buffer_that_travels_with_the_layer(generator):
    layer, weight = layer_and_weight(generator)
    assert layer.state_dict()["input_order"].dtype == torch.int32
    assert "input_order" in repr(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to(torch.bfloat16)):
        assert torch.equal(other.unpack(), weight)
    plain = PackedLinear(layer.packed)
    assert "input_order" not in plain.state_dict()
    assert layer.nbytes == plain.nbytes + 48 * 4


def test_gradients_and_compile(generator):
    layer, weight = layer_and_weight(generator)
    x = torch.randn(3, 48, generator=generator, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 48), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (torch.arange(47), r"int32 \[K\]=\[48\]"),
        (torch.arange(48).float(), "int32"),
        (torch.arange(48).clamp(max=46), r"each of 0..47 once"),
        (torch.arange(1, 49), r"each of 0..47 once"),
    ],
)
def test_what_is_no_order_is_refused(order, text, generator):
    packed = Int4Weight.pack(torch.randn(24, 48, generator=generator), group_size=16)
    with pytest.raises(ValueError, match=text):
        PackedLinear(packed, input_order=order)


def ordered_model():
    model = tiny.llama()
    llmkern.patch(model, "rtn-int4-g32")
    generator = torch.Generator().manual_seed(0)
    layer = model.model.layers[1].mlp.down_proj
    layer.input_order = torch.randperm(layer.in_features, generator=generator).int()
    return model


def test_a_saved_model_comes_back_with_it(tmp_path):
    model = ordered_model()
    with pytest.warns(UserWarning, match="down_proj: its columns are in an order of their own"):
        llmkern.save(model, tmp_path / "m")
    loaded, ids = llmkern.load(tmp_path / "m"), tiny.token_ids(2)
    assert torch.equal(
        loaded.model.layers[1].mlp.down_proj.input_order, model.model.layers[1].mlp.down_proj.input_order
    )
    assert torch.equal(tiny.output("llama", loaded, ids), tiny.output("llama", model, ids))
    (tmp_path / "m" / "llmkern.safetensors").unlink()
    reseal(tmp_path / "m")
    with pytest.raises(ValueError, match=r"lacks tensor model.layers.1.mlp.down_proj.input_order"):
        llmkern.load(tmp_path / "m")


def test_other_readers_refuse_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    with pytest.warns(UserWarning, match="other readers cannot"):
        llmkern.save(ordered_model(), tmp_path / "m")
    with llmkern.hf.stock(), pytest.raises(ValueError, match="format"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_dense_and_gptq(tmp_path):
    model = ordered_model()
    llmkern.save(model, tmp_path / "dense", "dense")
    dense = llmkern.load(tmp_path / "dense").model.layers[1].mlp.down_proj.weight
    assert torch.equal(dense, model.model.layers[1].mlp.down_proj.unpack())
    model = tiny.llama()
    llmkern.patch(model, llmkern.Recipe.parse("rtn-int4-g32", scale_dtype="float16"))
    model.model.layers[0].mlp.up_proj.input_order = torch.arange(64).flip(0).int()
    with pytest.raises(ValueError, match="up_proj: gptq: columns in an order of their own"):
        llmkern.save(model, tmp_path / "gptq", "gptq")
