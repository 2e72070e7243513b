"""Folders of models as other projects write them: layers packed, their values exact, the outputs the same."""

import json
import shutil
import warnings
import zlib

import pytest
import tiny
import torch
from foreign import (
    DYNAMIC,
    awq,
    awq_config,
    ct_config,
    gptq,
    gptq_config,
    int_quantized,
    make,
    marlin_24,
    mask_24,
    pack_quantized,
    sparse_24_bitmask,
    sparse_bitmask,
    write,
)
from safetensors.torch import load_file, save_file

import llmkern
from llmkern.checkpoints import describe, read_model
from llmkern.experts import Experts
from llmkern.nn import PackedLinear, dense_weight

transformers = pytest.importorskip("transformers")

EXPERT_NAMES = {"mixtral": ("w1", "w2", "w3"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


def linear_names(model):
    """The matrices that a tool of others would pack: linear layers of blocks, and experts one by one."""
    heads = ("lm_head", "decoder", "score")
    return {
        name for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or type(module).__name__ == "Conv1D") and not name.endswith(heads)
    }  # fmt: skip


def seed_of(name):
    """No two matrices of a model are alike."""
    return zlib.crc32(name.encode()) % 10_000


def chosen_of(model):
    names = linear_names(model)
    return lambda name: name in names or (".experts." in name and not name.endswith("gate"))


def twin(kind, path, model):
    dense = type(model).from_pretrained(path / "dense", dtype=torch.float32).eval()
    return dense


def assert_loaded(kind, path, model, made, **changes):
    """What is loaded has the values of the dense twin, exactly, and its outputs up to rounding."""
    loaded = llmkern.load(path / "packed")
    dense = twin(kind, path, model)
    packed = {name: module for name, module in loaded.named_modules() if isinstance(module, PackedLinear)}
    whole = {name: module for name, module in packed.items() if ".experts." not in name}
    assert set(whole) == linear_names(model)
    for name, module in whole.items():
        assert torch.equal(module.unpack(), dense_weight(dense.get_submodule(name))), name
    for home, mixture in ((n, m) for n, m in loaded.named_modules() if isinstance(m, Experts)):
        fused = dense.get_submodule(home)
        for at in range(mixture.num_experts):
            for projection, module in mixture.projections(at).items():
                assert isinstance(module, PackedLinear)
                assert torch.equal(module.unpack(), getattr(fused, projection)[at]), (home, at, projection)
    ids = tiny.token_ids(2)
    got, wanted = tiny.output(kind, loaded, ids), tiny.output(kind, dense, ids)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    if not changes.get("rounded"):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))
    return loaded


def gptq_layers(bits, *, version="gptq", symmetric=True, group=16, order=False, seeds=None):
    def encode(name, n, k):
        # The layers that read one input have one order of columns, as they have one Hessian.
        made = make(n, k, bits, symmetric=symmetric, group=group, order=order, seed=seed_of(name))
        if order:
            other = make(1, k, bits, symmetric=symmetric, group=group, order=True)
            made.index = other.index
        return gptq(made, version), made.dense()

    return encode


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen3_moe", "bert"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", [False, True])
def test_gptq(kind, version, order, tmp_path):
    model = tiny.MODELS[kind]()
    symmetric = version == "gptq"
    quantization = gptq_config(4, 16, sym=symmetric, desc_act=order, checkpoint_format=version)
    encode = gptq_layers(4, version=version, symmetric=symmetric, order=order)
    made = write(tmp_path, model, encode, quantization, chosen_of(model))
    loaded = assert_loaded(kind, tmp_path, model, made)
    layers = [module for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert all((layer.input_order is not None) == order for layer in layers)
    assert all(layer.scales.dtype == torch.float16 for layer in layers)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gptq_of_other_bits(bits, tmp_path):
    model = tiny.llama()
    made = write(tmp_path, model, gptq_layers(bits), gptq_config(bits, 16), chosen_of(model))
    loaded = assert_loaded("llama", tmp_path, model, made)
    # Saved again they are what they were.
    llmkern.save(loaded, tmp_path / "again", "gptq")
    before = load_file(tmp_path / "packed" / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen3_moe", "bert"])
def test_awq(kind, tmp_path):
    def encode(name, n, k):
        made = make(n, k, 4, symmetric=False, group=16, seed=seed_of(name))
        return awq(made), made.dense()

    model = tiny.MODELS[kind]()
    quantization = awq_config(16, modules_to_not_convert=["gate"])
    made = write(tmp_path, model, encode, quantization, chosen_of(model))
    assert_loaded(kind, tmp_path, model, made)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen3_moe", "bert"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized(kind, symmetric, tmp_path):
    def encode(name, n, k):
        made = make(n, k, 4, symmetric=symmetric, group=16, dtype=torch.bfloat16, seed=seed_of(name))
        return pack_quantized(made, symmetric=symmetric), made.dense()

    model = tiny.MODELS[kind]()
    targets = ["Linear", "Conv1D", "re:.*experts.*"] if kind != "llama" else ["Linear"]
    quantization = ct_config("pack-quantized", 4, 16, symmetric=symmetric, targets=targets)
    made = write(tmp_path, model, encode, quantization, chosen_of(model), shards=3)
    assert_loaded(kind, tmp_path, model, made)


@pytest.mark.parametrize("activations", [DYNAMIC, None])
def test_int_quantized(activations, tmp_path):
    def encode(name, n, k):
        made = make(n, k, 8, symmetric=True, dtype=torch.bfloat16, seed=seed_of(name))
        return int_quantized(made), made.dense()

    model = tiny.llama()
    quantization = ct_config("int-quantized", 8, None, activations=activations)
    made = write(tmp_path, model, encode, quantization, chosen_of(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = assert_loaded("llama", tmp_path, model, made, rounded=activations is not None)
    expected = "int8" if activations else None
    assert all(layer.activations == expected for layer in loaded.modules() if isinstance(layer, PackedLinear))


def test_fixed_activation_scales_become_dynamic_and_it_is_said(tmp_path):
    def encode(name, n, k):
        made = make(n, k, 8, symmetric=True, seed=seed_of(name))
        return int_quantized(made) | {"input_scale": torch.tensor([0.05])}, made.dense()

    model = tiny.llama()
    static = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    made = write(tmp_path, model, encode, ct_config("int-quantized", 8, None, activations=static), chosen_of(model))
    with pytest.warns(UserWarning, match="quantized per token as they come; the config's fixed scales are not used"):
        loaded = assert_loaded("llama", tmp_path, model, made, rounded=True)
    assert loaded.model.layers[0].mlp.up_proj.activations == "int8"
    assert "fixed scales" in describe(tmp_path / "packed").notes[0]


def test_groups_of_a_mixed_checkpoint(tmp_path):
    """By a name, a pattern and a class, the most exact first; what is ignored stays dense."""

    def encode(name, n, k):
        if name.endswith("layers.0.mlp.up_proj"):
            made = make(n, k, 8, symmetric=True, seed=seed_of(name))
            return int_quantized(made), made.dense()
        bits = 3 if "self_attn" in name else 4
        made = make(n, k, bits, symmetric=bits == 4, group=32, seed=seed_of(name))
        return pack_quantized(made, symmetric=bits == 4), made.dense()

    model = tiny.llama()
    quantization = ct_config("pack-quantized", 4, 32)
    weights = quantization["config_groups"]["group_0"]["weights"]
    quantization["config_groups"] |= {
        "a": {"targets": ["re:.*self_attn.*"], "weights": weights | {"num_bits": 3, "symmetric": False}},
        "b": {
            "targets": ["model.layers.0.mlp.up_proj"], "format": "int-quantized",
            "weights": weights | {"num_bits": 8, "strategy": "channel", "group_size": None},
            "input_activations": DYNAMIC,
        },
    }  # fmt: skip
    quantization |= {"format": "mixed-precision", "ignore": ["lm_head", "re:.*layers.2.*"]}
    quantization["config_groups"]["a"]["format"] = "pack-quantized"
    linear = linear_names(model)
    write(tmp_path, model, encode, quantization, lambda name: name in linear and "layers.2" not in name)
    loaded, dense = llmkern.load(tmp_path / "packed"), twin("llama", tmp_path, model)
    for name in linear:
        module = loaded.get_submodule(name)
        assert isinstance(module, PackedLinear) == ("layers.2" not in name), name
        own = module.unpack() if isinstance(module, PackedLinear) else module.weight
        assert torch.equal(own, dense.get_submodule(name).weight)
    assert loaded.model.layers[0].mlp.up_proj.activations == "int8"
    assert loaded.model.layers[1].mlp.up_proj.activations is None
    found = {layer.name: layer for layer in describe(tmp_path / "packed").layers}
    assert found["model.layers.1.self_attn.q_proj"].bits == 3
    assert found["model.layers.1.self_attn.q_proj"].symmetric is False
    assert found["model.layers.2.self_attn.q_proj"].packed is None
    assert found["model.layers.0.mlp.up_proj"].packed == "Int8Weight"


@pytest.mark.parametrize("layout", ["sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("codes", [False, True])
def test_sparse(layout, codes, tmp_path, generator):
    def encode(name, n, k):
        mask = mask_24(n, k, generator) if "24" in layout else torch.rand(n, k, generator=generator) < 0.3
        values = torch.randn(n, k, generator=generator) * 0.1 * mask
        scales = {}
        if codes:
            scales = {"weight_scale": torch.full((n, 1), 0.01)}
            values = (values * 100).round().clamp(-128, 127).to(torch.int8)
        encoded = sparse_24_bitmask(values, mask) if "24" in layout else sparse_bitmask(values, mask)
        return encoded | scales, values.float() * (scales["weight_scale"] if codes else 1)

    model = tiny.llama()
    sparsity = {"format": layout, "targets": ["Linear"], "ignore": ["lm_head"], "sparsity_structure": "2:4"}
    quantization = ct_config("int-quantized", 8, None, activations=DYNAMIC) | {"sparsity_config": sparsity}
    if not codes:
        quantization = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    made = write(tmp_path, model, encode, quantization, chosen_of(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = assert_loaded("llama", tmp_path, model, made)
    assert loaded.model.layers[0].mlp.up_proj.format == ("Sparse24Weight" if "24" in layout else "BitmaskWeight")
    assert any("kept as they are: layers are sparse" in str(one.message) for one in caught) == codes


def test_marlin_24(tmp_path, generator):
    def encode(name, n, k):
        made = make(n, k, 4, symmetric=True, seed=seed_of(name))
        made.u = torch.where(mask_24(n, k, generator), made.u, 8)
        return marlin_24(made.u - 8, made.s, 4, None), made.dense()

    model = tiny.llama(num_key_value_heads=4, intermediate_size=128)
    made = write(tmp_path, model, encode, ct_config("marlin-24", 4, None), chosen_of(model))
    loaded = assert_loaded("llama", tmp_path, model, made)
    assert loaded.model.layers[0].mlp.up_proj.format == "Sparse24Int4Weight"


def test_zeros_are_left_out_where_asked(tmp_path, generator):
    def encode(name, n, k):
        made = make(n, k, 4, symmetric=True, group=16, seed=seed_of(name))
        made.u = torch.where(mask_24(n, k, generator), made.u, 8)
        return pack_quantized(made, symmetric=True), made.dense()

    model = tiny.llama()
    write(tmp_path, model, encode, ct_config("pack-quantized", 4, 16), chosen_of(model))
    sparse, dense = read_model(tmp_path / "packed", find_24=True), read_model(tmp_path / "packed")
    for name in linear_names(model):
        one, two = sparse.get_submodule(name), dense.get_submodule(name)
        assert (one.format, two.format) == ("Sparse24Int4Weight", "Int4Weight")
        assert torch.equal(one.unpack(), two.unpack())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_packed_head(kind, tmp_path):
    model = tiny.MODELS[kind](**({"tie_word_embeddings": True} if kind == "llama" else {}))
    encode = gptq_layers(4)
    write(tmp_path, model, encode, gptq_config(4, 16, lm_head=True), chosen_of(model))
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    own, values = encode("lm_head", tiny.VOCABULARY, 64)
    save_file(tensors | {f"lm_head.{leaf}": part for leaf, part in own.items()}, file)
    loaded = llmkern.load(tmp_path / "packed")
    assert torch.equal(loaded.lm_head.unpack(), values)
    assert isinstance(loaded.get_input_embeddings(), torch.nn.Embedding)
    llmkern.save(loaded, tmp_path / "again")
    assert torch.equal(llmkern.load(tmp_path / "again").lm_head.unpack(), values)


def test_rules_for_single_layers_of_gptqmodel(tmp_path):
    def encode(name, n, k):
        bits, group = (8, 32) if "down_proj" in name else (4, 16)
        made = make(n, k, bits, symmetric=True, group=group, seed=seed_of(name))
        return gptq(made), made.dense()

    model = tiny.llama()
    dynamic = {r"-:.*\.q_proj": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 32, "mse": 2.4}}
    linear = linear_names(model)
    write(
        tmp_path, model, encode, gptq_config(4, 16, dynamic=dynamic),
        lambda name: name in linear and not name.endswith("q_proj"),
    )  # fmt: skip
    loaded, dense = llmkern.load(tmp_path / "packed"), twin("llama", tmp_path, model)
    layer = loaded.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, torch.nn.Linear)
    assert (layer.mlp.down_proj.format, layer.mlp.down_proj.group_size) == ("Int8Weight", 32)
    assert torch.equal(layer.mlp.down_proj.unpack(), dense.model.layers[0].mlp.down_proj.weight)


def test_a_config_in_a_file_of_its_own_and_a_file_of_its_own_name(tmp_path):
    model = tiny.llama()
    made = write(tmp_path, model, gptq_layers(4), gptq_config(4, 16), chosen_of(model))
    folder = tmp_path / "packed"
    config = json.loads((folder / "config.json").read_text())
    own = config.pop("quantization_config")
    del own["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(own))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-16g.safetensors")
    assert_loaded("llama", tmp_path, model, made)


def test_who_wrote_a_v1_file_is_read_from_the_other_config(tmp_path):
    def encode(name, n, k):
        made = make(n, k, 4, symmetric=False, group=16, low_zero=0, seed=seed_of(name))
        return gptq(made, borrow=True), made.dense()

    model = tiny.llama()
    made = write(tmp_path, model, encode, gptq_config(4, 16, sym=False), chosen_of(model))
    own = gptq_config(4, 16, sym=False, meta={"quantizer": ["gptqmodel:4.0"]})
    (tmp_path / "packed" / "quantize_config.json").write_text(json.dumps(own))
    assert_loaded("llama", tmp_path, model, made)


def test_what_we_write_is_read_as_others_read_it(tmp_path):
    """Without llmkern.json, our own folders are ordinary checkpoints."""
    for scheme, layout in (
        ("rtn-int4-g32", "compressed-tensors"),
        ("w8a8", "compressed-tensors"),
        ("rtn-int8", "gptq"),
    ):
        model = tiny.llama()
        llmkern.patch(model, llmkern.Recipe.parse(scheme, scale_dtype="float16"))
        llmkern.save(model, tmp_path / scheme, layout)
        (tmp_path / scheme / "llmkern.json").unlink()
        loaded = llmkern.load(tmp_path / scheme)
        ids = tiny.token_ids(2)
        assert torch.equal(tiny.output("llama", loaded, ids), tiny.output("llama", model, ids))
        assert loaded.model.layers[0].mlp.up_proj.activations == model.model.layers[0].mlp.up_proj.activations


@pytest.mark.parametrize("link", [False, True])
def test_the_hubs_cache_of_links(link, tmp_path):
    """snapshots/<revision>/x -> ../../blobs/<hash>: these may leave the folder, others may not."""
    model = tiny.llama()
    write(tmp_path, model, gptq_layers(4), gptq_config(4, 16), chosen_of(model))
    target = tmp_path / ("blobs" if not link else "elsewhere")
    target.mkdir()
    folder = tmp_path / "snapshots" / "main"
    folder.parent.mkdir()
    shutil.move(tmp_path / "packed", folder)
    shutil.move(folder / "model.safetensors", target / "abc")
    (folder / "model.safetensors").symlink_to(target / "abc")
    if not link:
        llmkern.load(folder)
        return
    with pytest.raises(ValueError, match=r"model\.safetensors is a link out of its folder, to .*elsewhere"):
        llmkern.load(folder)


@pytest.mark.parametrize("layout", ["gptq", "awq", "pack-quantized"])
def test_describe(layout, tmp_path):
    def encode(name, n, k):
        made = make(n, k, 4, symmetric=layout != "awq", group=16, seed=seed_of(name))
        encoders = {"gptq": gptq, "awq": awq, "pack-quantized": lambda made: pack_quantized(made, symmetric=True)}
        return encoders[layout](made), made.dense()

    model = tiny.llama()
    configs = {
        "gptq": gptq_config(4, 16, desc_act=True),
        "awq": awq_config(16),
        "pack-quantized": ct_config("pack-quantized", 4, 16),
    }
    write(tmp_path, model, encode, configs[layout], chosen_of(model), shards=2)
    found = describe(tmp_path / "packed")
    coded = {layer.name: layer for layer in found.layers if layer.packed}
    assert set(coded) == linear_names(model)
    for name, layer in coded.items():
        assert layer.shape == tuple(model.get_submodule(name).weight.shape)
        assert (layer.format, layer.packed, layer.bits, layer.group_size) == (layout, "Int4Weight", 4, 16)
        assert layer.symmetric == (layout != "awq")
        assert layer.act_order == (layout == "gptq")
    files = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    assert files - 100_000 < found.nbytes < files
    assert found.layer_bytes == sum(layer.nbytes for layer in found.layers) < found.nbytes
    json.dumps(found.to_dict())
    assert llmkern.checkpoints.describe is describe


def test_describe_our_own_folder(tmp_path):
    model = tiny.llama()
    llmkern.patch(model, "rtn-int4-g32")
    llmkern.save(model, tmp_path / "m")
    found = {layer.name: layer for layer in describe(tmp_path / "m").layers}
    layer = found["model.layers.0.mlp.up_proj"]
    assert (layer.packed, layer.bits, layer.group_size, layer.shape) == ("Int4Weight", 4, 32, (96, 64))
    assert found["lm_head"].packed is None
