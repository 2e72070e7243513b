import copy
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import llmkern
from llmkern.checkpoint_folder import header_digest, seal
from llmkern.experts import Experts
from llmkern.nn import PackedLinear

SCHEMES = (
    "rtn-int2-g32", "rtn-int3-g32", "rtn-int3-g24-asym", "rtn-int4-g32", "rtn-int4-g24-asym", "rtn-int8",
    "rtn-int8-g32-asym", "w8a8", "rtn-int4-g32-a8", "magnitude-2:4", "magnitude-2:4-int3-g32", "magnitude-2:4-int4-g32",
    "magnitude-2:4-int8", "magnitude-0.5", "magnitude-0.5-int8",
)  # fmt: skip


def bits_of(tensor):
    return tensor.contiguous().view(torch.uint8)


def assert_same_model(kind, got, wanted):
    ids = tiny.token_ids(2)
    states = got.state_dict(), wanted.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert states[0][name].dtype == tensor.dtype, name
        assert torch.equal(bits_of(states[0][name]), bits_of(tensor)), name
    for one, two in zip(got.modules(), wanted.modules(), strict=True):
        assert type(one) is type(two)
        if isinstance(one, PackedLinear):
            for key in ("format", "group_size", "activations", "method", "num_bits", "act_order", "conv1d"):
                assert getattr(one, key) == getattr(two, key), key
    # torch's own products depend on where their operands lie.
    torch.testing.assert_close(tiny.output(kind, got, ids), tiny.output(kind, wanted, ids), rtol=1e-5, atol=1e-5)


def patched(kind, scheme):
    model = tiny.MODELS[kind]()
    llmkern.patch(model, scheme)
    return model


@pytest.fixture(autouse=True)
def _no_reader_warnings():
    # What transformers reads here, it reads by itself.
    with warnings.catch_warnings(), llmkern.hf.stock():
        warnings.filterwarnings("ignore", message=".*(other readers cannot|have zero points)")
        yield


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_comes_back_bit_for_bit(scheme, tmp_path):
    model = patched("llama", scheme)
    llmkern.save(model, tmp_path / "m")
    assert_same_model("llama", llmkern.load(tmp_path / "m"), model)


@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "opt", "bert", "t5", "albert"])
@pytest.mark.parametrize("scheme", ["rtn-int4-g32", "w8a8", "magnitude-2:4"])
def test_every_kind_of_model_comes_back(kind, scheme, tmp_path):
    model = patched(kind, scheme)
    llmkern.save(model, tmp_path / "m")
    assert_same_model(kind, llmkern.load(tmp_path / "m"), model)


@pytest.mark.parametrize("scheme", ["rtn-int4-g16", "w8a8", "magnitude-2:4", "magnitude-0.5", "magnitude-2:4-int4-g16"])
@pytest.mark.parametrize("kind", tiny.MIXTURES)
@pytest.mark.parametrize("left", [{}, {"re:.*1.mlp.experts": None}, {"experts.1.down_proj": None}])
def test_mixtures_of_experts_come_back(kind, scheme, left, tmp_path):
    model = tiny.MODELS[kind]()
    report = llmkern.patch(model, llmkern.Recipe.parse(scheme, overrides=left))
    llmkern.save(model, tmp_path / "m", report=report)
    loaded = llmkern.load(tmp_path / "m")
    # A copy: torch's product of all experts rounds otherwise where a file's tensors are not aligned in memory.
    assert_same_model(kind, copy.deepcopy(loaded), model)
    assert all(module.fused is None for module in loaded.modules() if isinstance(module, Experts))


@pytest.mark.parametrize("kind", ["llama", "opt", "t5", "bert", "albert"])
def test_a_packed_head_that_was_tied_comes_back(kind, tmp_path):
    model = tiny.MODELS[kind](**({"tie_word_embeddings": True} if kind == "llama" else {}))
    llmkern.patch(model, "rtn-int8", ignore=())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        llmkern.save(model, tmp_path / "m")
    loaded = llmkern.load(tmp_path / "m")
    assert_same_model(kind, loaded, model)
    assert isinstance(loaded.get_output_embeddings(), PackedLinear)
    ties = [name for name, _ in loaded.named_parameters(remove_duplicate=False)]
    assert len(ties) - len(list(loaded.parameters())) == len(
        list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters()))  # fmt: skip
    said = any("its weight was tied to the embeddings" in str(warning.message) for warning in caught)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    # Where only the head was tied, config.json can say that it no longer is.
    assert said == (kind not in ("llama", "opt"))
    assert said or config["tie_word_embeddings"] is False


@pytest.mark.parametrize("recipe", ["gptq-int3-g32", "sparsegpt-2:4-int4-g32", "sparsegpt-0.5"])
def test_a_compressed_model_comes_back(recipe, tmp_path):
    model = tiny.llama(tie_word_embeddings=True)
    llmkern.compress(model, "bf16", progress=False)
    report = llmkern.compress(model, recipe, tiny.token_ids(), progress=False)
    llmkern.save(model, tmp_path / "m", report=report)
    loaded = llmkern.load(tmp_path / "m")
    assert_same_model("llama", loaded, model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    meta = json.loads((tmp_path / "m" / "llmkern.json").read_text())
    assert llmkern.Recipe.from_dict(meta["recipe"]) == llmkern.Recipe.parse(recipe)
    assert json.loads((tmp_path / "m" / "report.json").read_text())["recipe"] == recipe
    assert (tmp_path / "m" / "report.html").is_file()


def test_kept_zeros_and_negative_zeros_come_back(tmp_path):
    model = tiny.llama()
    llmkern.patch(model, llmkern.Recipe.parse("magnitude-2:4", dtype="float32"))
    values = model.model.layers[0].mlp.down_proj.values
    values[0, :4] = 0.0
    values[1, :4] = -0.0
    llmkern.save(model, tmp_path / "m")
    assert (tmp_path / "m" / "llmkern.safetensors").is_file()
    assert_same_model("llama", llmkern.load(tmp_path / "m"), model)


def test_an_unpacked_model_is_saved_too(tmp_path):
    model = tiny.llama()
    llmkern.save(model, tmp_path / "m")
    assert_same_model("llama", llmkern.load(tmp_path / "m"), model)
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "gpt2", *tiny.MIXTURES])
def test_dense_unpacks(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny.MODELS[kind]()
    llmkern.patch(model, llmkern.Recipe.parse("rtn-int4-g32", overrides={"layers.1.mlp.experts.1.down_proj": None}
                                              if kind in tiny.MIXTURES else {}))  # fmt: skip
    llmkern.save(model, tmp_path / "m", "dense")
    ids, wanted = tiny.token_ids(2), tiny.output(kind, model, tiny.token_ids(2))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(tiny.output(kind, stock, ids), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tiny.output(kind, llmkern.load(tmp_path / "m"), ids), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", tiny.MIXTURES)
@pytest.mark.parametrize("scheme", ["magnitude-2:4", "magnitude-0.5"])
def test_stock_transformers_reads_mixtures_without_codes(kind, scheme, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny.MODELS[kind]()
    llmkern.patch(model, llmkern.Recipe.parse(scheme, dtype="float32"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llmkern.save(model, tmp_path / "m")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    ids = tiny.token_ids(2)
    torch.testing.assert_close(
        tiny.output(kind, stock, ids), tiny.output(kind, model, ids), rtol=1e-4, atol=1e-4
    )  # fmt: skip


@pytest.mark.parametrize("scheme", [
    "rtn-int2-g32", "rtn-int3-g32", "rtn-int3", "rtn-int4-g32", "rtn-int8", "magnitude-2:4-int3-g32",
    "magnitude-2:4-int4-g32", "magnitude-2:4", "w8a8",
])  # fmt: skip
def test_stock_transformers_reads_the_folder(scheme, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    recipe = llmkern.Recipe.parse(scheme, dtype="float32" if scheme == "magnitude-2:4" else None)
    model = tiny.llama()
    llmkern.patch(model, recipe)
    llmkern.save(model, tmp_path / "m")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").eval()
    ids = tiny.token_ids(2)
    got, wanted = tiny.output("llama", stock, ids), tiny.output("llama", model, ids)
    assert (got - wanted).norm() < (0.03 if scheme == "w8a8" else 1e-5) * wanted.norm()


def test_two_schemes_in_one_model_load_in_stock_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model = tiny.llama()
    llmkern.patch(model, llmkern.Recipe.parse("rtn-int4-g32", overrides={"down_proj": "rtn-int8", "o_proj": None}))
    llmkern.save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").eval()
    ids = tiny.token_ids(2)
    torch.testing.assert_close(tiny.output("llama", stock, ids), tiny.output("llama", model, ids), rtol=1e-4, atol=1e-4)
    assert_same_model("llama", llmkern.load(tmp_path / "m"), model)


def test_words_on_disk_are_those_of_the_layer(tmp_path):
    model = patched("llama", "rtn-int4-g32")
    llmkern.save(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(tensors[f"{name}.weight_packed"], model.get_submodule(name).words)
    assert tensors[f"{name}.weight_shape"].tolist() == [64, 96]
    assert f"{name}.weight_zero_point" not in tensors


def fields_of(words, bits):
    """Unsigned fields [rows, words * 32 / bits] of rows of words, least significant bit first, across words."""
    on = (words.long().unsqueeze(-1) >> torch.arange(32) & 1).flatten(1)
    return (on.view(len(on), -1, bits) << torch.arange(bits)).sum(-1)


@pytest.mark.parametrize("scheme", ["rtn-int2-g32", "rtn-int3-g32", "rtn-int4-g32", "rtn-int8", "rtn-int8-g32"])
def test_gptq_v1_says_the_same_weights(scheme, tmp_path):
    """Dequantized by the format's own definition: w = (u - z - 1) * s[g_idx], u and z least significant first."""
    model = tiny.llama()
    llmkern.patch(model, llmkern.Recipe.parse(scheme, scale_dtype="float16"))
    llmkern.save(model, tmp_path / "m", "gptq")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    bits, layer = config["bits"], model.model.layers[0].self_attn.q_proj
    own = {
        key.rpartition(".")[2]: tensor
        for key, tensor in tensors.items()
        if key.startswith("model.layers.0.self_attn.q_")
    }
    u, z = fields_of(own["qweight"].T, bits).T, fields_of(own["qzeros"], bits)
    index = own["g_idx"].long()
    dense = (u - z[index] - 1).float() * own["scales"][index].float()
    assert torch.equal(dense.T, layer.unpack())
    assert_same_model("llama", llmkern.load(tmp_path / "m"), model)


def test_gptq_refuses_what_it_cannot_hold(tmp_path):
    cases = {
        "rtn-int4-g32-asym": "only symmetric codes",
        "rtn-int4-g24": "multiples of 32",
        "magnitude-2:4": "holds dense codes of integers",
        "rtn-int4-g32": "scale_dtype float16",
    }
    for scheme, text in cases.items():
        with pytest.raises(ValueError, match=text) as error:
            llmkern.save(patched("llama", scheme), tmp_path / "m", "gptq")
        assert str(error.value).startswith("save: layer model.layers.0")
        assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_is_saved(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    llmkern.save(tiny.llama(), tmp_path / "m", tokenizer=Tokenizer())
    assert (tmp_path / "m" / "tokenizer.json").is_file()


def test_a_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="was not written by llmkern"):
        llmkern.save(tiny.llama(), tmp_path / "m")
    assert [file.name for file in (tmp_path / "m").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder"):
        llmkern.save(tiny.llama(), tmp_path / "file")
    assert {entry.name for entry in tmp_path.iterdir()} == {"m", "file"}


def test_our_folder_and_an_empty_one_are_replaced(tmp_path):
    (tmp_path / "m").mkdir()
    llmkern.save(patched("llama", "rtn-int8"), tmp_path / "m")
    model = patched("llama", "rtn-int4-g32")
    llmkern.save(model, tmp_path / "m")
    assert_same_model("llama", llmkern.load(tmp_path / "m"), model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    model = patched("llama", "rtn-int8")
    llmkern.save(model, tmp_path / "m")

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        llmkern.save(patched("llama", "rtn-int4-g32"), tmp_path / "m", tokenizer=Broken())
    assert_same_model("llama", llmkern.load(tmp_path / "m"), model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


KILLED = """
import sys; sys.path.insert(0, {tests!r})
import tiny, llmkern
models = [tiny.llama(num_hidden_layers=1), tiny.llama(num_hidden_layers=1)]
llmkern.patch(models[0], "rtn-int8"); llmkern.patch(models[1], "rtn-int4-g32")
print("ready", flush=True)
while True:
    for model in models:
        llmkern.save(model, {path!r})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_run_leaves_the_folder_complete_or_absent(tmp_path):
    """One process saves two models in turn; it is stopped at 40 moments to look, then killed."""
    path = tmp_path / "m"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    seen = set()
    try:
        process.stdout.readline()
        for at in range(40):
            time.sleep(0.003 + 0.0037 * (at % 7))
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)  # it may run on for a moment: until it has stopped
            if path.exists():
                names = {layer.format for layer in llmkern.load(path).modules() if isinstance(layer, PackedLinear)}
                assert len(names) == 1
                seen |= names
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if path.exists():
        llmkern.load(path)
    llmkern.save(tiny.llama(), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"], "what the killed process left is cleared away"
    assert seen


def damage(path, change):
    meta = json.loads((path / "llmkern.json").read_text())
    change(meta)
    (path / "llmkern.json").write_text(json.dumps({**meta, "seal": seal(meta)}))


def reseal(path):
    """As a forger would: checksums that fit what is there."""
    headers = {file.name: header_digest(file) for file in path.glob("*.safetensors")}
    damage(path, lambda meta: meta.update(headers=headers))


def damage_tensors(path, change, name="model.safetensors"):
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name)
    reseal(path)


NAME = "model.layers.1.mlp.up_proj"


def edit(change):
    return lambda path: damage(path, change)


def edit_layer(**fields):
    return lambda path: damage(path, lambda meta: meta["layers"][NAME].update(fields))


def edit_tensors(change):
    return lambda path: damage_tensors(path, change)


def cut(tensors):
    tensors[f"{NAME}.weight_packed"] = tensors[f"{NAME}.weight_packed"][:, :3].clone()


def rewrite(path, name):
    """A change that nothing else would notice."""
    data = (path / name).read_bytes()
    (path / name).write_bytes(data.replace(b'"0.1.0"', b'"0.1.1"').replace(b'"format":"pt"', b'"format":"tf"'))


def begin(path, text):
    """Put text at the beginning of llmkern.json's object."""
    data = (path / "llmkern.json").read_text()
    (path / "llmkern.json").write_text(data.replace("{", "{" + text, 1))


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


DAMAGE = {
    "nothing": (lambda path: [(path / name).unlink() for name in ("llmkern.json", "config.json")], "no llmkern.json"),
    "broken meta": (lambda path: (path / "llmkern.json").write_text("{"), "llmkern.json cannot be read"),
    "twice": (lambda path: begin(path, '"format": "dense",'), "the key 'format' is there twice"),
    "deep": (lambda path: begin(path, '"a": ' + "[" * 100_000 + "]" * 100_000 + ","), "nested too deeply"),
    "not text": (lambda path: (path / "llmkern.json").write_bytes(b"\xff{}"), "llmkern.json cannot be read"),
    "list meta": (lambda path: (path / "llmkern.json").write_text("[]"), "must hold an object"),
    "newer": (edit(lambda meta: meta.update(format_version=99)), "format_version 99"),
    "edited": (lambda path: rewrite(path, "llmkern.json"), "llmkern.json was changed since it was saved"),
    "edited header": (lambda path: rewrite(path, "model.safetensors"), "the header of model.safetensors was changed"),
    "format": (edit(lambda meta: meta.update(format="zip")), "has format 'zip'"),
    "no layers": (edit(lambda meta: meta.pop("layers")), "needs layers as a dict"),
    "class": (edit(lambda meta: meta.update(model_class="os")), "which transformers does not have"),
    "function": (edit(lambda meta: meta.update(model_class="pipeline")), "which transformers does not have"),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json cannot be read"),
    "layer kind": (edit_layer(**{"class": "Int5Weight"}), "unknown packed weight"),
    "layer shape": (edit_layer(shape=[96, 65]), "in the model"),
    "bad entry": (edit(lambda meta: meta["layers"].update({NAME: 4})), "bad entry for layer"),
    "negative": (edit_layer(shape=[-96, 64]), "bad entry for layer"),
    "group": (edit_layer(group_size=16), "scales must be"),
    "group 0": (edit_layer(group_size=0), "group_size must be"),
    "stranger": (edit(lambda meta: meta["layers"].update({"a.b": meta["layers"][NAME]})), "does not have"),
    "norm": (edit(lambda meta: meta["layers"].update({"model.norm": meta["layers"][NAME]})), "wanted a linear layer"),
    "bits": (edit_layer(num_bits=5), "bad entry for layer"),
    "fewer bits": (edit_layer(num_bits=3), "weight_packed of 3 bits: wanted int32"),
    "order": (edit_layer(act_order="group"), "bad entry for layer"),
    "method": (edit_layer(method=None), "bad entry for layer"),
    "no words": (edit_tensors(lambda tensors: tensors.pop(f"{NAME}.weight_packed")), "missing tensor 'weight_packed'"),
    "no scale": (edit_tensors(lambda tensors: tensors.pop(f"{NAME}.weight_scale")), "missing tensor 'scales'"),
    "nan": (edit_tensors(lambda tensors: tensors[f"{NAME}.weight_scale"].fill_(float("nan"))), "must be finite"),
    "short words": (edit_tensors(cut), "words must be"),
    "shape tensor": (edit_tensors(lambda tensors: tensors[f"{NAME}.weight_shape"].add_(1)), "weight_shape is"),
    "no norm": (edit_tensors(lambda tensors: tensors.pop("model.norm.weight")), "lack 1 tensors: model.norm.weight"),
    "unknown": (edit_tensors(lambda tensors: tensors.update(x=torch.ones(1))), "hold 1 unknown tensors: x"),
    "norm shape": (
        edit_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)})),
        "model.norm.weight must be",
    ),
    "truncated": (truncate, "cannot be read"),
    "no tensors": (lambda path: (path / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused(case, tmp_path):
    change, text = DAMAGE[case]
    llmkern.save(patched("llama", "rtn-int4-g32"), tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises((ValueError, FileNotFoundError), match=text) as error:
        llmkern.load(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_positions_out_of_order_are_refused(tmp_path):
    model = patched("llama", "magnitude-2:4-int4-g32")
    llmkern.save(model, tmp_path / "m")
    damage_tensors(tmp_path / "m", lambda extra: next(iter(extra.values())).fill_(0xFF), "llmkern.safetensors")
    with pytest.raises(ValueError, match="positions must be distinct and ascending"):
        llmkern.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda path: llmkern.save(tiny.llama(), path, "awq"), ValueError, "format must be one of"),
        (lambda path: llmkern.save(tiny.mlp(), path), TypeError, "no transformers config"),
        (llmkern.load, FileNotFoundError, "holds no llmkern.json"),
    ],
)
def test_bad_calls_are_refused(call, error, text, tmp_path):
    with pytest.raises(error, match=text):
        call(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_stock_transformers_refuses_what_it_would_read_as_noise(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    llmkern.save(patched("gpt2", "rtn-int8"), tmp_path / "m")
    with pytest.raises(ValueError, match="format"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("scheme", ["rtn-int8-asym", "w8a8", "magnitude-2:4"])
def test_stock_transformers_refuses_experts_with_codes(scheme, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model = tiny.mixtral()
    # Of the last scheme no layer has codes, but one expert's bf16 values stand beside its neighbours' fp32.
    left = {"experts.1.down_proj": None} if scheme == "magnitude-2:4" else {}
    llmkern.patch(model, llmkern.Recipe.parse(scheme, overrides=left))
    with pytest.warns(
        UserWarning, match="other readers cannot: .* layers, as .*experts.0.gate_up_proj: it is an expert"
    ):
        llmkern.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="format"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_experts_of_no_known_names_have_no_place_in_gptq_checkpoints(tmp_path):
    model = tiny.gpt_oss(intermediate_size=64)
    llmkern.patch(model, llmkern.Recipe.parse("rtn-int4-g32", scale_dtype="float16"))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: gptq: no reader knows"):
        llmkern.save(model, tmp_path / "m", "gptq")


def test_a_stack_of_experts_of_the_wrong_size_is_refused(tmp_path):
    model = patched("mixtral", "magnitude-2:4")
    llmkern.save(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    for bad, text in ((tensors[name][:3], "must hold 4 experts"), (tensors[name][..., :8], "experts.0.down_proj")):
        save_file({**tensors, name: bad.contiguous()}, tmp_path / "m" / "model.safetensors")
        reseal(tmp_path / "m")
        with pytest.raises(ValueError, match=text):
            llmkern.load(tmp_path / "m")


def test_readers_are_warned_about_what_only_llmkern_reads(tmp_path):
    with pytest.warns(UserWarning, match="other readers cannot: 8 layers, as .*c_attn: it is a Conv1D"):
        llmkern.save(patched("gpt2", "rtn-int8"), tmp_path / "m")
