"""use_for: checkpoints in the formats of others, written here from the formats' definitions, run packed."""

import json
import re
import warnings

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import assert_same_model

import llmkern
from llmkern.formats import Int4Weight, Int8Weight
from llmkern.nn import PackedLinear

transformers = pytest.importorskip("transformers")
LAYERS = r"\.(self_attn|mlp|block_sparse_moe\.experts\.\d+)\.\w+(?<!gate)\.weight$"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.fixture(autouse=True)
def _reset():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*other readers cannot")
        yield
    llmkern.hf.reset()


def pack(fields, bits=4):
    """Unsigned codes [R, C] -> int32 words [R, C * bits / 32], least significant first."""
    per = 32 // bits
    words = (fields.long().view(len(fields), -1, per) << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def int4(weight, generator):
    packed = Int4Weight.pack(weight, group_size=16)
    words = {"weight_packed": packed.words, "weight_scale": packed.scales}
    return {**words, "weight_shape": torch.tensor(weight.shape)}, packed.unpack()


def w8a8(weight, generator):
    packed = Int8Weight.pack(weight, group_size=None)
    return {"weight": packed.codes, "weight_scale": packed.scales}, packed.unpack()


def gptq(weight, generator, order=False):
    packed = Int4Weight.pack(weight, group_size=16, scale_dtype=torch.float16)
    n, k = weight.shape
    columns = torch.randperm(k, generator=generator) if order else torch.arange(k)
    codes = (packed.codes() + 8)[:, columns]
    zeros = torch.full((k // 16, n), 7)
    tensors = {"qweight": pack(codes).T.contiguous(), "qzeros": pack(zeros), "scales": packed.scales.T.contiguous()}
    return {**tensors, "g_idx": (columns // 16).to(torch.int32)}, packed.unpack()[:, columns]


def act_order(weight, generator):
    return gptq(weight, generator, order=True)


def awq(weight, generator):
    packed = Int4Weight.pack(weight, group_size=16, symmetric=False, scale_dtype=torch.float16)

    def words(fields):
        eights = fields.view(len(fields), -1, 8)[..., AWQ_ORDER]
        return pack(eights.flatten(1))

    tensors = {"qweight": words((packed.codes() + 8).T), "qzeros": words((packed.zeros + 8).T)}
    return {**tensors, "scales": packed.scales.T.contiguous()}, packed.unpack()


def ct_config(bits, group_size, format, dynamic=False):
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
               "strategy": "group" if group_size else "channel", "group_size": group_size}  # fmt: skip
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if dynamic else None}
    return {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"group_0": group}}  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "checkpoint_format": "gptq"}
KINDS = {
    "compressed-tensors int4": (int4, ct_config(4, 16, "pack-quantized")),
    "compressed-tensors w8a8": (w8a8, ct_config(8, None, "int-quantized", dynamic=True)),
    "gptq": (gptq, {**GPTQ, "desc_act": False}),
    "gptq act-order": (act_order, {**GPTQ, "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}),
}


def write(kind, folder, generator, family="llama", **changes):
    """A checkpoint of the kind in folder/m, and the dense model with the same values."""
    encode, config = KINDS[kind]
    model = tiny.MODELS[family](**changes)
    model.save_pretrained(folder / "m")
    tensors, dense = load_file(folder / "m" / "model.safetensors"), {}
    for key in [key for key in tensors if re.search(LAYERS, key)]:
        stored, values = encode(tensors.pop(key), generator)
        tensors |= {f"{key.removesuffix('.weight')}.{leaf}": tensor for leaf, tensor in stored.items()}
        dense[key] = values
    save_file({**load_file(folder / "m" / "model.safetensors"), **dense}, folder / "dense.safetensors")
    save_file(tensors, folder / "m" / "model.safetensors", {"format": "pt"})
    path = folder / "m" / "config.json"
    plain = path.read_text()
    path.write_text(json.dumps({**json.loads(plain), "quantization_config": config}))
    (folder / "d").mkdir()
    (folder / "d" / "config.json").write_text(plain)
    (folder / "dense.safetensors").rename(folder / "d" / "model.safetensors")
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "d")


def load(folder, **keywords):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "m", **keywords)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_checkpoints_of_others_run_packed(kind, family, tmp_path, generator, caplog):
    dense = write(kind, tmp_path, generator, family, **({"intermediate_size": 64} if family == "mixtral" else {}))
    if (family, kind) == ("mixtral", "gptq act-order"):
        # Gate and up are one packed weight, which has one order of columns.
        with llmkern.hf.use_for("gptq"), pytest.raises(ValueError, match=r"experts\.0\.gate_up_proj: layers that"):
            load(tmp_path)
        return
    llmkern.hf.use_for(KINDS[kind][1]["quant_method"])
    model = load(tmp_path)
    ids = tiny.token_ids(2)
    got, wanted = tiny.output(family, model, ids), tiny.output(family, dense, ids)
    assert (got - wanted).norm() < (0.03 if "w8a8" in kind else 1e-5) * wanted.norm()
    report = llmkern.hf.report(model)
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert {row.name for row in report.rows} == packed
    assert len(packed) == {"llama": 21, "mixtral": 2 * (4 + 4 * 2)}[family]
    assert "lm_head" in {skip.name for skip in report.skipped}
    assert_same_model(family, model, llmkern.load(tmp_path / "m"))
    if kind == "gptq act-order":
        assert model.model.layers[0].mlp.up_proj.input_order is not None


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors int4"])
def test_they_generate_save_and_load_again(kind, tmp_path, generator):
    write(kind, tmp_path, generator)
    with llmkern.hf.use_for("gptq", "compressed-tensors"):
        model = load(tmp_path)
    ids = tiny.token_ids(1, 5)
    keywords = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same_model("llama", again, model)
    assert torch.equal(again.generate(ids, **keywords), model.generate(ids, **keywords))


def test_tied_embeddings_and_dtypes(tmp_path, generator):
    write("gptq", tmp_path, generator, tie_word_embeddings=True)
    llmkern.hf.use_for("gptq")
    model = load(tmp_path, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.dtype, model.model.layers[0].mlp.up_proj.scales.dtype) == (torch.bfloat16, torch.float16)
    assert tiny.output("llama", model, tiny.token_ids(2)).isfinite().all()
    dense = load(tmp_path, quantization_config=llmkern.hf.LoadConfig(dequantize=True))
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_without_use_for_transformers_reads_them(tmp_path, generator):
    pytest.importorskip("compressed_tensors")
    write("compressed-tensors int4", tmp_path, generator)

    def packed(model):
        return any(isinstance(module, PackedLinear) for module in model.modules())

    assert not packed(load(tmp_path))
    with llmkern.hf.use_for("gptq", "awq"):
        assert not packed(load(tmp_path))
        with llmkern.hf.use_for("compressed-tensors"):
            assert packed(load(tmp_path))
            with llmkern.hf.stock():
                assert not packed(load(tmp_path))
        assert not packed(load(tmp_path))
    llmkern.hf.use_for("compressed-tensors")
    assert packed(load(tmp_path))
    llmkern.hf.reset()
    assert not packed(load(tmp_path))


def test_dense_checkpoints_are_no_business_of_use_for(tmp_path):
    llmkern.hf.use_for(*llmkern.hf.METHODS)
    tiny.llama().save_pretrained(tmp_path / "m")
    model = load(tmp_path, use_cache=False)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert model.config.use_cache is False


def test_an_unknown_method_is_refused():
    with pytest.raises(
        ValueError, match="use_for: unknown method 'bitsandbytes'; known: gptq, awq, compressed-tensors"
    ):
        llmkern.hf.use_for("gptq", "bitsandbytes")


def test_another_class_than_the_stored_one(tmp_path, generator):
    dense = write("gptq", tmp_path, generator)
    llmkern.hf.use_for("gptq")
    base = transformers.AutoModel.from_pretrained(tmp_path / "m")
    ids = tiny.token_ids(2)
    with torch.no_grad():
        torch.testing.assert_close(
            base(ids).last_hidden_state, dense.model(ids).last_hidden_state, rtol=1e-4, atol=1e-4
        )
    assert "loaded as LlamaModel" in llmkern.hf.report(base).notes[-1]


# Bad input

NAME = "model.layers.1.mlp.down_proj"
BAD = {
    "float8": (None, {"format": "float-quantized"}, "float-quantized.*to leave this checkpoint to transformers"),
    "scale": ("weight_scale", lambda t: t * float("inf"), rf"tensor '{NAME}.weight_scale' must be finite"),
    "words": ("weight_packed", lambda t: t[:, :3].contiguous(), rf"tensor '{NAME}.weight_packed' must be"),
    "missing": ("weight_packed", None, rf"tensor '{NAME}.weight_packed' is missing"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_checkpoints_are_refused_by_name(bad, tmp_path, generator):
    write("compressed-tensors int4", tmp_path, generator)
    llmkern.hf.use_for("compressed-tensors")
    leaf, change, text = BAD[bad]
    if leaf is None:
        path = tmp_path / "m" / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= change
        path.write_text(json.dumps(config))
    else:
        tensors = load_file(tmp_path / "m" / "model.safetensors")
        tensor = tensors.pop(f"{NAME}.{leaf}")
        if change is not None:
            tensors[f"{NAME}.{leaf}"] = change(tensor)
        save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=text):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", f"{NAME}.*"])
def test_a_tensor_that_lacks_is_refused(name, tmp_path, generator):
    write("gptq", tmp_path, generator)
    llmkern.hf.use_for("gptq")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not re.fullmatch(name, key)}
    save_file(kept, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"no values for {name.replace('*', 'weight')}"):
        load(tmp_path)


def test_a_tensor_too_many_is_refused(tmp_path, generator):
    write("gptq", tmp_path, generator)
    llmkern.hf.use_for("gptq")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file({**tensors, "model.foo": torch.ones(2)}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no place for tensor 'model\.foo'"):
        load(tmp_path)
