"""from_pretrained and save_pretrained of transformers, on folders that llmkern.save wrote."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import SCHEMES, assert_same_model, damage, patched, reseal

import llmkern
from llmkern.experts import Experts
from llmkern.nn import PackedLinear

transformers = pytest.importorskip("transformers")
AUTO = {"bert": "AutoModelForMaskedLM", "albert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(other readers cannot|have zero points|was changed since)")
        yield
    llmkern.hf.reset()


@pytest.fixture
def said(caplog):
    """What transformers logs while it loads: its table of tensors that are missing or left over."""
    logger = transformers.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if "LOAD REPORT" in record.getMessage()]
    logger.removeHandler(caplog.handler)


def auto(kind, folder, **keywords):
    return getattr(transformers, AUTO.get(kind, "AutoModelForCausalLM")).from_pretrained(folder, **keywords)


def saved(kind, scheme, folder, **changes):
    """A model's folder, as llmkern.load reads it."""
    model = tiny.MODELS[kind](**changes)
    llmkern.patch(model, scheme)
    llmkern.save(model, folder)
    # A copy: torch's products round otherwise where a file's tensors are not aligned in memory.
    return copy.deepcopy(llmkern.load(folder))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_folders_of_every_format(scheme, tmp_path, said):
    wanted = saved("llama", scheme, tmp_path / "m")
    model = auto("llama", tmp_path / "m")
    assert_same_model("llama", model, wanted)
    assert not said()
    report = llmkern.hf.report(model)
    assert {row.name for row in report.rows} == {n for n, m in wanted.named_modules() if isinstance(m, PackedLinear)}
    assert all(row.kernel for row in report.rows)
    assert [(skip.name, skip.reason) for skip in report.skipped] == [("lm_head", "it is dense in the folder")]


@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "opt", "bert", "t5", "albert"])
@pytest.mark.parametrize("scheme", ["rtn-int4-g32", "w8a8", "magnitude-2:4"])
def test_every_kind_of_model(kind, scheme, tmp_path, said):
    wanted = saved(kind, scheme, tmp_path / "m")
    assert_same_model(kind, auto(kind, tmp_path / "m"), wanted)
    assert not said()


@pytest.mark.parametrize("scheme", ["rtn-int4-g16", "w8a8", "magnitude-2:4", "magnitude-0.5"])
@pytest.mark.parametrize("kind", tiny.MIXTURES)
@pytest.mark.parametrize("left", [{}, {"re:.*1.mlp.experts": None}, {"experts.1.down_proj": None}])
def test_mixtures_of_experts(kind, scheme, left, tmp_path, said):
    model = tiny.MODELS[kind]()
    llmkern.patch(model, llmkern.Recipe.parse(scheme, overrides=left))
    llmkern.save(model, tmp_path / "m")
    loaded = auto(kind, tmp_path / "m")
    assert_same_model(kind, loaded, model)
    assert not said()
    assert all(module.fused is None for module in loaded.modules() if isinstance(module, Experts))
    skipped = {skip.name for skip in llmkern.hf.report(loaded).skipped}
    assert ("model.layers.1.mlp.experts" in skipped) == ("re:.*1.mlp.experts" in left)
    assert ("model.layers.0.mlp.experts.1.down_proj" in skipped) == ("experts.1.down_proj" in left)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "llmkern"])
def test_packed_experts_run_whatever_implementation_is_asked_for(implementation, tmp_path):
    wanted = saved("mixtral", "rtn-int8", tmp_path / "m")
    model = auto("mixtral", tmp_path / "m", experts_implementation=implementation)
    assert_same_model("mixtral", model, wanted)


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_the_experts_implementation_of_that_name(kind, tmp_path):
    model, ids = tiny.MODELS[kind](), tiny.token_ids(2)
    model.set_experts_implementation("eager")
    wanted = tiny.output(kind, model, ids)
    model.set_experts_implementation("llmkern")
    assert set(model.get_experts_implementation().values()) == {"llmkern"}
    assert torch.equal(tiny.output(kind, model, ids), wanted)
    llmkern.patch(model, "rtn-int8")
    assert isinstance(model.model.layers[0].mlp.experts, Experts)
    model.save_pretrained(tmp_path / "m")
    again = auto(kind, tmp_path / "m", experts_implementation="llmkern")
    assert torch.equal(tiny.output(kind, again, ids), tiny.output(kind, model, ids))


def test_gradients_flow_through_packed_layers(tmp_path):
    saved("llama", "rtn-int4-g32", tmp_path / "m")
    model = auto("llama", tmp_path / "m")
    model(tiny.token_ids(1)).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["llama", "opt", "t5", "bert", "albert"])
def test_a_packed_head_that_was_tied(kind, tmp_path, said):
    model = tiny.MODELS[kind](**({"tie_word_embeddings": True} if kind == "llama" else {}))
    llmkern.patch(model, "rtn-int8", ignore=())
    llmkern.save(model, tmp_path / "m")
    loaded = auto(kind, tmp_path / "m")
    assert_same_model(kind, loaded, copy.deepcopy(llmkern.load(tmp_path / "m")))
    assert isinstance(loaded.get_output_embeddings(), PackedLinear)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    assert not said()


def test_tied_embeddings_stay_tied(tmp_path):
    saved("llama", "rtn-int4-g32", tmp_path / "m", tie_word_embeddings=True)
    model = auto("llama", tmp_path / "m")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_gptq_folder(tmp_path):
    model = tiny.llama()
    llmkern.patch(model, llmkern.Recipe.parse("rtn-int4-g32", scale_dtype="float16"))
    llmkern.save(model, tmp_path / "m", "gptq")
    loaded = auto("llama", tmp_path / "m")
    assert_same_model("llama", loaded, copy.deepcopy(llmkern.load(tmp_path / "m")))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    assert_same_model("llama", auto("llama", tmp_path / "again"), loaded)


def test_a_dense_folder_stays_dense(tmp_path):
    model = patched("llama", "rtn-int4-g32")
    llmkern.save(model, tmp_path / "m", "dense")
    loaded = auto("llama", tmp_path / "m")
    assert not any(isinstance(module, PackedLinear) for module in loaded.modules())
    assert len(llmkern.hf.report(loaded).skipped) == 22


def test_another_class_than_the_saved_one(tmp_path):
    wanted = saved("llama", "rtn-int4-g32", tmp_path / "m")
    ids = tiny.token_ids(2)
    base = transformers.AutoModel.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, wanted.model(ids).last_hidden_state)
    assert "loaded as LlamaModel" in llmkern.hf.report(base).notes[0]
    head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", num_labels=3)
    assert head.score.weight.shape == (3, 64)
    assert isinstance(head.model.layers[0].mlp.up_proj, PackedLinear)
    base.save_pretrained(tmp_path / "base")
    whole = auto("llama", tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(whole.model(ids).last_hidden_state, wanted.model(ids).last_hidden_state)


def test_a_packed_head_that_the_class_does_not_have_is_in_the_report(tmp_path):
    model = tiny.llama()
    llmkern.patch(model, "rtn-int8", ignore=())
    llmkern.save(model, tmp_path / "m")
    report = llmkern.hf.report(transformers.AutoModel.from_pretrained(tmp_path / "m"))
    assert [(skip.name, skip.reason) for skip in report.skipped] == [("lm_head", "a LlamaModel has no such layer")]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["greedy", "sampled", "static"])
def test_generate_as_llmkern_load_does(kind, how, tmp_path):
    wanted = saved(kind, "rtn-int4-g32", tmp_path / "m")
    keywords = {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "top_k": 20},
        "static": {"do_sample": False, "cache_implementation": "static"},
    }[how]
    ids = tiny.token_ids(2, 5)
    texts = []
    for model in (auto(kind, tmp_path / "m"), wanted):
        torch.manual_seed(0)
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, pad_token_id=0,
                                    disable_compile=True, **keywords))  # fmt: skip
    assert texts[0].shape == (2, 13)
    assert torch.equal(*texts)


def test_compiles_as_one_graph(tmp_path):
    saved("llama", "rtn-int4-g32", tmp_path / "m")
    model = auto("llama", tmp_path / "m")
    ids = tiny.token_ids(2)
    wanted = tiny.output("llama", model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), wanted)


def test_dtype_is_of_everything_but_packed_weights(tmp_path):
    saved("gpt2", "rtn-int4-g32", tmp_path / "m")
    model = auto("gpt2", tmp_path / "m", dtype=torch.bfloat16)
    layer = model.transformer.h[0].mlp.c_fc
    assert (model.dtype, layer.bias.dtype, layer.scales.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert tiny.output("gpt2", model, tiny.token_ids(2)).dtype == torch.bfloat16
    wanted = llmkern.load(tmp_path / "m").to(torch.bfloat16)
    assert_same_model("gpt2", model, copy.deepcopy(wanted))
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="quantized model"):
            cast()


def test_dtypes_of_the_files_are_kept_without_one(tmp_path):
    model = tiny.llama()
    model.model.norm.to(torch.bfloat16)
    llmkern.patch(model, "rtn-int8")
    llmkern.save(model, tmp_path / "m")
    for keywords in ({}, {"dtype": "auto"}):
        assert auto("llama", tmp_path / "m", **keywords).model.norm.weight.dtype == torch.bfloat16
    assert auto("llama", tmp_path / "m", dtype="float32").model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps_of_one_device(device_map, tmp_path):
    pytest.importorskip("accelerate")
    wanted = saved("llama", "rtn-int8", tmp_path / "m")
    if device_map != "auto" or not torch.cuda.is_available():
        assert_same_model("llama", auto("llama", tmp_path / "m", device_map=device_map), wanted)


def test_device_maps_of_several_devices_are_refused(tmp_path):
    pytest.importorskip("accelerate")
    saved("llama", "rtn-int8", tmp_path / "m")
    for device_map in ({"model": "cpu", "lm_head": "disk"}, {"": "disk"}):
        with pytest.raises(ValueError, match=r"packed layers are on one device, got a device_map with .*disk"):
            auto("llama", tmp_path / "m", device_map=device_map, offload_folder=tmp_path / "off")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_dequantize(kind, tmp_path):
    wanted = saved(kind, "rtn-int8", tmp_path / "m")
    ids = tiny.token_ids(2)
    model = auto(kind, tmp_path / "m")
    model.dequantize()
    again = auto(kind, tmp_path / "m", quantization_config=llmkern.hf.LoadConfig(dequantize=True))
    for dense in (model, again):
        assert not any(isinstance(module, PackedLinear | Experts) for module in dense.modules())
        assert [type(m) for m in dense.modules()] == [type(m) for m in tiny.MODELS[kind]().modules()]
        torch.testing.assert_close(tiny.output(kind, dense, ids), tiny.output(kind, wanted, ids), rtol=1e-4, atol=1e-4)
        assert getattr(dense, "hf_quantizer", None) is None
        assert not hasattr(dense.config, "quantization_config")
    # Dense and no longer ours: transformers writes and reads it by itself.
    again.save_pretrained(tmp_path / "dense")
    with llmkern.hf.stock():
        stock = auto(kind, tmp_path / "dense")
    torch.testing.assert_close(tiny.output(kind, stock, ids), tiny.output(kind, again, ids), rtol=1e-5, atol=1e-5)


def test_only_a_load_config_goes_with_packed_layers(tmp_path):
    saved("llama", "rtn-int8", tmp_path / "m")
    with pytest.raises(ValueError, match=r"take a llmkern\.hf\.LoadConfig as quantization_config, got GPTQConfig"):
        auto("llama", tmp_path / "m", quantization_config=transformers.GPTQConfig(bits=4))
    tiny.llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="pre-quantized"):
        auto("llama", tmp_path / "dense", quantization_config=llmkern.hf.LoadConfig())


def test_stock_leaves_folders_to_transformers(tmp_path):
    saved("llama", "magnitude-2:4", tmp_path / "m")
    with llmkern.hf.stock():
        model = auto("llama", tmp_path / "m")
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    with pytest.raises(ValueError, match="this LlamaForCausalLM was not loaded into packed layers"):
        llmkern.hf.report(model)


def test_fields_of_the_configuration_may_be_given(tmp_path):
    saved("llama", "rtn-int8", tmp_path / "m")
    for cls in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        model = cls.from_pretrained(tmp_path / "m", attn_implementation="eager", use_cache=False)
        assert (model.config._attn_implementation, model.config.use_cache) == ("eager", False)
    config = transformers.LlamaConfig.from_pretrained(tmp_path / "m")
    before = copy.deepcopy(config.to_dict())
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m", config=config)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    assert config.to_dict() == before
    model, info = auto("llama", tmp_path / "m", output_loading_info=True)
    assert not any(info.values())


def test_a_subfolder(tmp_path):
    wanted = saved("llama", "rtn-int8", tmp_path / "all" / "m")
    assert_same_model("llama", auto("llama", tmp_path / "all", subfolder="m"), wanted)


# What save_pretrained writes


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("scheme", ["rtn-int4-g32", "magnitude-2:4"])
def test_save_pretrained_writes_a_folder_that_loads_again(kind, scheme, tmp_path):
    model = patched(kind, scheme if kind != "mixtral" else scheme.replace("g32", "g16"))
    model.save_pretrained(tmp_path / "m")
    first = auto(kind, tmp_path / "m")
    assert_same_model(kind, first, model)
    first.save_pretrained(tmp_path / "n")
    assert_same_model(kind, copy.deepcopy(llmkern.load(tmp_path / "n")), model)
    for name in ("config.json", "llmkern.json", "model.safetensors"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "n" / name).read_bytes()


def test_shards(tmp_path):
    model = patched("llama", "rtn-int4-g32")
    model.save_pretrained(tmp_path / "m", max_shard_size="50KB")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    assert_same_model("llama", auto("llama", tmp_path / "m"), model)
    model.save_pretrained(tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").glob("model*")] == ["model.safetensors"]
    assert_same_model("llama", auto("llama", tmp_path / "m"), model)


def test_save_pretrained_leaves_other_files(tmp_path):
    model = patched("llama", "rtn-int4-g32")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    (tmp_path / "m" / "model-00001-of-00002.safetensors").write_text("of an earlier save")
    model.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {"tokenizer.json", "config.json", "generation_config.json", "llmkern.json", "model.safetensors"}
    assert not [path for path in tmp_path.iterdir() if path.name != "m"]


@pytest.mark.parametrize(
    "keywords", [{"state_dict": {}}, {"push_to_hub": True}, {"variant": "x"}, {"distributed_checkpoint": True}]
)
def test_save_pretrained_refuses_what_it_cannot_do(keywords, tmp_path):
    with pytest.raises(ValueError, match=f"save_pretrained: {next(iter(keywords))} does not go with"):
        patched("llama", "rtn-int8").save_pretrained(tmp_path / "m", **keywords)
    assert not (tmp_path / "m").exists()
    patched("llama", "rtn-int8").save_pretrained(tmp_path / "m", is_main_process=False)
    assert not (tmp_path / "m").exists()


def test_dense_models_are_saved_by_transformers(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / "llmkern.json").exists()


# Bad input


def edited(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    reseal(folder)


NAME = "model.layers.1.mlp.down_proj"


def put(key, value):
    return lambda tensors: tensors.__setitem__(key, value(tensors[key]))


def nan_scale(scales):
    return scales.index_fill(1, torch.tensor([1]), float("nan"))


BAD = {
    "scale": (put(f"{NAME}.weight_scale", nan_scale), f"layer {NAME}: Int4Weight: scales must be finite and positive"),
    "words": (
        put(f"{NAME}.weight_packed", lambda t: t[:, :2].contiguous()),
        f"layer {NAME}: Int4Weight: words must be",
    ),
    "no words": (lambda t: t.pop(f"{NAME}.weight_packed"), f"layer {NAME}: missing tensor 'weight_packed'"),
    "shape": (put(f"{NAME}.weight_shape", lambda t: t.flip(0)), f"layer {NAME}: weight_shape is"),
    "no norm": (lambda t: t.pop("model.norm.weight"), r"model\.safetensors lacks 1 tensors: model\.norm\.weight"),
    "unknown": (lambda t: t.update(foo=torch.ones(1)), r"model\.safetensors holds 1 unknown tensors: foo"),
    "leaf": (lambda t: t.update({f"{NAME}.foo": torch.ones(1)}), rf"holds 1 unknown tensors: {NAME}\.foo"),
    "dtype": (put("model.norm.weight", lambda t: t.to(torch.int32)), r"model\.norm\.weight must be of a dtype such as"),
    "norm": (put("model.norm.weight", lambda t: t[:3].clone()), r"model\.norm\.weight must be \[64\], got \[3\]"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_tensors_are_refused_by_name(bad, tmp_path):
    change, text = BAD[bad]
    saved("llama", "rtn-int4-g32", tmp_path / "m")
    edited(tmp_path / "m", change)
    with pytest.raises(ValueError, match=f"from_pretrained: .*{text}"):
        auto("llama", tmp_path / "m")


def test_a_truncated_file_is_refused_by_name(tmp_path):
    saved("llama", "rtn-int4-g32", tmp_path / "m")
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(ValueError, match=r"from_pretrained: model\.safetensors cannot be read"):
        auto("llama", tmp_path / "m")


@pytest.mark.parametrize("bad", [{"format_version": 99}, {"format": "gguf"}, {"layers": []}, {"model_class": 3}])
def test_a_bad_manifest_is_refused(bad, tmp_path):
    saved("llama", "rtn-int4-g32", tmp_path / "m")
    meta = json.loads((tmp_path / "m" / "llmkern.json").read_text())
    (tmp_path / "m" / "llmkern.json").write_text(json.dumps({**meta, **bad}))
    with pytest.raises(ValueError, match=r"llmkern\.json"):
        auto("llama", tmp_path / "m")


def test_a_layer_that_the_model_does_not_have_is_refused(tmp_path):
    saved("llama", "rtn-int4-g32", tmp_path / "m")
    name = "model.layers.{}.mlp.up_proj"
    damage(tmp_path / "m", lambda meta: meta["layers"].update({name.format(7): meta["layers"].pop(name.format(1))}))
    with pytest.raises(ValueError, match=r"names the layer model\.layers\.7\.mlp\.up_proj, which the model does not"):
        auto("llama", tmp_path / "m")


def test_a_tie_that_the_model_does_not_have_is_refused(tmp_path):
    saved("llama", "rtn-int4-g32", tmp_path / "m")
    edited(tmp_path / "m", lambda tensors: tensors.pop("lm_head.weight"))
    damage(tmp_path / "m", lambda meta: meta["tied"].update({"lm_head.weight": "model.embed_tokens.weight"}))
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, which the model does"):
        auto("llama", tmp_path / "m")


def test_what_was_changed_since_it_was_saved_is_refused(tmp_path):
    saved("llama", "rtn-int4-g32", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file({**tensors, "foo": torch.ones(1)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=r"the header of model\.safetensors was changed since it was saved"):
        auto("llama", tmp_path / "m")


def test_a_layer_of_another_shape_is_refused(tmp_path):
    saved("llama", "rtn-int4-g32", tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 128}))
    with pytest.raises(ValueError, match=r"gate_proj is \[96, 64\] in the checkpoint, \[128, 64\] in the model"):
        auto("llama", tmp_path / "m")


# The order of imports


def run(code, *arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(llmkern.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


ORDERS = {
    "llmkern first": "import llmkern; import transformers",
    "transformers first": "import transformers; import llmkern",
    "model class first": "from transformers import LlamaForCausalLM; import llmkern; import transformers",
    "models in between": "import transformers; from transformers import AutoModelForCausalLM; import llmkern",
    "twice": "import sys, llmkern; del sys.modules['llmkern.hf._hook']; import llmkern.hf._hook as h; h.wait(); "
    "h.wait(); import transformers",
}


@pytest.mark.parametrize("order", ORDERS)
def test_import_order(order, tmp_path):
    saved("llama", "rtn-int4-g32", tmp_path / "m")
    code = (
        f"{ORDERS[order]}; import sys, inspect\n"
        "kind = type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj)\n"
        "hooks = sum('llmkern' in type(finder).__module__ for finder in sys.meta_path)\n"
        "print(kind.__module__, hooks, len(inspect.getsource(transformers.modeling_utils)) > 1000,"
        " hasattr(transformers.PreTrainedModel.save_pretrained.__wrapped__, '__wrapped__'))"
    )
    assert run(code, tmp_path / "m") == ["llmkern.nn", "0", "True", "False"]


def test_llmkern_alone_imports_nothing_of_transformers():
    code = (
        "import llmkern, sys; llmkern.hf.use_for('gptq'); llmkern.hf.reset()\n"
        "print(any(name.split('.')[0] in ('transformers', 'safetensors') for name in sys.modules))"
    )
    assert run(code) == ["False"]


def test_an_import_of_transformers_that_fails_can_be_tried_again(tmp_path):
    saved("llama", "rtn-int4-g32", tmp_path / "m")
    code = (
        "import llmkern, sys\n"
        "import transformers.utils, transformers.core_model_loading\n"
        "held = sys.modules.pop('transformers.core_model_loading')\n"
        "sys.modules['transformers.core_model_loading'] = None\n"
        "try:\n    import transformers.modeling_utils\nexcept ImportError:\n    print('failed')\n"
        "sys.modules['transformers.core_model_loading'] = held\n"
        "import transformers\n"
        "print(type(transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__module__)"
    )
    assert run(code, tmp_path / "m") == ["failed", "llmkern.nn"]
