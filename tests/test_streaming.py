"""A streamed model is the loaded one, bit for bit, with one block of dense weights in memory at a time."""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import llmkern
import llmkern_cli
from llmkern import blocks, checkpoint, experts, layer_solver, streaming, weight_files
from llmkern.nn import PackedLinear

transformers = pytest.importorskip("transformers")


# In mixtral's files every expert is on its own, in the model they are one parameter; gpt_oss has them as one in both.
MODELS = {kind: tiny.MODELS[kind] for kind in ("llama", "gemma3", "gpt2", "opt", "mixtral", "gpt_oss")}


def save(folder, kind="llama", dtype=torch.float32, shard="60kB", **changes):
    model = MODELS[kind](**changes)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def compressed(model, recipe="gptq-int4-g32", n=10, **fields):
    return llmkern.compress(model, recipe, tiny.token_ids(n), progress=False, **fields)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shard", "tied"), [("5GB", True), ("60kB", False)])
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_the_loaded_one(kind, shard, tied, dtype, tmp_path):
    save(tmp_path, kind, dtype, shard, tie_word_embeddings=tied)
    wanted, got = loaded(tmp_path), llmkern.stream(tmp_path)
    ids = tiny.token_ids(2)
    for _ in range(2):
        assert torch.equal(tiny.output(kind, got, ids), tiny.output(kind, wanted, ids))
    assert not got.training
    for (name, buffer), (other, same) in zip(wanted.named_buffers(), got.named_buffers(), strict=True):
        assert name == other
        assert buffer.dtype == same.dtype
        assert torch.equal(buffer, same)
    head, embeddings = got.get_output_embeddings(), got.get_input_embeddings()
    assert (head.weight is embeddings.weight) == tied
    assert [p.dtype for p in got.parameters()] == [p.dtype for p in wanted.parameters()]


@pytest.mark.parametrize("recipe", ["gptq-int4-g32", "rtn-int8", "sparsegpt-2:4", "w8a8"])
@pytest.mark.parametrize("kind", MODELS)
def test_compressed_and_saved_it_is_the_same_file(kind, recipe, tmp_path, recwarn):
    # fp32 weights of the loaded model are views of a mapped file, which start anywhere.
    save(tmp_path / "m", kind, torch.float32 if kind in ("llama", "gpt2") else torch.bfloat16)
    # Some layers stay dense: their weights are read once more to be saved.
    recipe = llmkern.Recipe.parse(recipe, ignore=("lm_head", "re:.*(o_proj|c_proj|fc2|gate|experts.1.down_proj)$"))
    reports = []
    for name, model in (("whole", loaded(tmp_path / "m")), ("streamed", llmkern.stream(tmp_path / "m"))):
        calibration = tiny.token_ids() if recipe.needs_calibration else None
        reports.append(llmkern.compress(model, recipe, calibration, progress=False))
        llmkern.save(model, tmp_path / name)
    whole, streamed = reports
    assert [(row.name, row.loss, row.bytes_after) for row in whole.rows] == [
        (row.name, row.loss, row.bytes_after) for row in streamed.rows
    ]
    assert whole.skipped == streamed.skipped
    assert (whole.model_bytes_before, whole.model_bytes_after) == (
        streamed.model_bytes_before, streamed.model_bytes_after
    )  # fmt: skip
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "streamed")


def dense_blocks(model):
    """Blocks with a matrix in memory that is a parameter."""
    return sum(
        any(not p.is_meta and p.ndim > 1 for p in block.parameters())
        for _, found in blocks.find_lists(model)
        for block in found
    )


def test_one_block_is_in_memory(tmp_path, monkeypatch):
    save(tmp_path)
    model, most = llmkern.stream(tmp_path), [0]
    read = streaming.Stream.read

    def counted(self, keys):
        read(self, keys)
        most[0] = max(most[0], dense_blocks(self.model))

    monkeypatch.setattr(streaming.Stream, "read", counted)
    assert dense_blocks(model) == 0
    tiny.output("llama", model, tiny.token_ids(2))
    assert (most[0], dense_blocks(model)) == (1, 1)
    compressed(model)
    assert (most[0], dense_blocks(model)) == (1, 0)
    assert all(p.is_meta is False for p in model.parameters())  # norms and embeddings; the rest is packed


@pytest.mark.parametrize("streamed", [False, True])
def test_dense_layers_go_when_they_are_replaced(streamed, tmp_path, monkeypatch):
    model = llmkern.stream(save(tmp_path)) if streamed else tiny.llama()
    weights, step = {}, layer_solver.Progress.step

    def look(self, name):
        at = int(name.split(".")[2])
        for layer in (m for m in model.model.layers[at].modules() if type(m) is torch.nn.Linear):
            weights.setdefault(at, []).append(weakref.ref(layer.weight))
        alive = {k for k, found in weights.items() if any(weight() is not None for weight in found)}
        assert alive == {at}
        step(self, name)

    monkeypatch.setattr(layer_solver.Progress, "step", look)
    gc.disable()
    try:
        compressed(model)
    finally:
        gc.enable()
    assert len(weights) == 3


def test_a_block_is_read_once_for_all_its_layers(tmp_path):
    save(tmp_path)
    model = llmkern.stream(tmp_path)
    before = model._llmkern_stream.bytes
    llmkern.compress(model, "rtn-int8", progress=False)
    matrices = sum(p.nbytes for p in loaded(tmp_path).model.layers.parameters())
    assert model._llmkern_stream.bytes - before == matrices


def test_what_was_written_to_is_not_read_again(tmp_path):
    save(tmp_path)
    model = llmkern.stream(tmp_path)
    layer = model.model.layers[0].self_attn.q_proj
    with streaming.held(layer), torch.no_grad():
        layer.weight.mul_(2)
    ids = tiny.token_ids(2)
    whole = loaded(tmp_path)
    with torch.no_grad():
        whole.model.layers[0].self_attn.q_proj.weight.mul_(2)
    for _ in range(2):
        assert torch.equal(tiny.output("llama", model, ids), tiny.output("llama", whole, ids))
    assert not layer.weight.is_meta
    assert model.model.layers[0].self_attn.k_proj.weight.is_meta


def test_converted_weights_that_were_written_to_are_kept(tmp_path):
    save(tmp_path, "mixtral")
    model = llmkern.stream(tmp_path)
    experts = model.model.layers[0].mlp.experts
    with streaming.held(experts), torch.no_grad():
        experts.down_proj.zero_()
    for _ in range(2):
        tiny.output("mixtral", model, tiny.token_ids(2))
    assert not experts.down_proj.any()
    assert model.model.layers[1].mlp.experts.down_proj.any()


def test_an_error_in_the_middle_leaves_a_model_that_runs(tmp_path):
    save(tmp_path / "m")
    for path in (tmp_path / "m").glob("*.safetensors"):
        tensors = load_file(path)
        if "model.layers.2.mlp.down_proj.weight" in tensors:
            tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("inf")
            save_file(tensors, path, metadata={"format": "pt"})
    model = llmkern.stream(tmp_path / "m")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj .*20 of 21 layers"):
        compressed(model)
    packed = sum(isinstance(layer, PackedLinear) for layer in model.modules())
    assert packed == 14
    assert tiny.output("llama", model, tiny.token_ids(2)).shape == (2, tiny.LENGTH, tiny.VOCABULARY)


def test_a_mixture_is_compared_with_the_module_it_replaces(tmp_path, monkeypatch):
    save(tmp_path, "mixtral")
    monkeypatch.setattr(experts.Experts, "difference", lambda self: "the outputs differ by 3")
    with pytest.raises(ValueError, match="MixtralExperts: the outputs differ by 3; load the whole model instead"):
        compressed(llmkern.stream(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_streamed_run_goes_on_where_another_was_stopped(kind, tmp_path, monkeypatch):
    """The state is that of the model, streamed or not."""
    save(tmp_path / "m", kind)
    whole = loaded(tmp_path / "m")
    compressed(whole)
    step = layer_solver.Progress.step

    def stop(self, name):
        step(self, name)
        if "layers.1.self_attn.o_proj" in name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer_solver.Progress, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            compressed(loaded(tmp_path / "m"), state_dir=tmp_path / "state")
    model = llmkern.stream(tmp_path / "m")
    report = compressed(model, state_dir=tmp_path / "state")
    assert "resumed" in " ".join(report.notes)
    for name, tensor in whole.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        got = streaming.parameter(module, leaf) if leaf in module._parameters else module._buffers[leaf]
        assert torch.equal(got, tensor), name


def test_a_cast_is_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(ValueError, match="bf16 changes the whole model, so it cannot be streamed"):
        llmkern.compress(llmkern.stream(tmp_path), "bf16", progress=False)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def edit(folder, change):
    """Apply `change` to the tensors of the shard that holds layer 1's q_proj."""
    for path in shards(folder):
        tensors = load_file(path)
        if "model.layers.1.self_attn.q_proj.weight" in tensors:
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})


KEY = "model.layers.1.self_attn.q_proj.weight"


def edit_index(folder, change):
    path = folder / weight_files.INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("breakage", "error", "text"),
    [
        (lambda f: edit(f, lambda t: t.pop(KEY)), ValueError, f"no values for {KEY}"),
        (lambda f: edit(f, lambda t: t.update({KEY: t[KEY][:8]})), ValueError, r"must be \[64, 64\].*got \[8, 64\]"),
        (lambda f: edit(f, lambda t: t.update({KEY: t[KEY].to(torch.int8)})), ValueError, "F32, BF16, F16, got I8"),
        (lambda f: edit(f, lambda t: t.update({KEY: t[KEY].double()})), ValueError, "F32, BF16, F16, got F64"),
        (lambda f: shards(f)[2].unlink(), FileNotFoundError, "names model-00003-of-.*, which is not there"),
        (lambda f: shards(f)[2].write_bytes(shards(f)[2].read_bytes()[:999]), ValueError, "cannot be read"),
        (lambda f: shards(f)[2].write_bytes(b""), ValueError, "cannot be read"),
        (lambda f: shutil.copy(shards(f)[1], shards(f)[2]), ValueError, "is in model-00002-of.* as well"),
        (lambda f: (f / weight_files.INDEX).write_text("[]"), ValueError, "must hold an object"),
        (lambda f: edit_index(f, lambda i: i["weight_map"].update(a="../x.safetensors")), ValueError, "a folder in it"),
        (lambda f: edit_index(f, lambda i: i["weight_map"].update(a=3)), ValueError, "weight_map of file names"),
        (lambda f: (f / weight_files.INDEX).unlink(), FileNotFoundError, "neither model.safetensors nor"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json"),
        (lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), ValueError, "gptq"),
        (lambda f: edit_config(f, num_hidden_layers=4), ValueError, r"no values for model\.layers\.3\."),
    ],
)
def test_a_broken_folder_is_refused(breakage, error, text, tmp_path):
    save(tmp_path)
    breakage(tmp_path)
    with pytest.raises(error, match=text) as caught:
        llmkern.stream(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_off_later_is_an_error(tmp_path):
    save(tmp_path)
    model = llmkern.stream(tmp_path)
    for path in shards(tmp_path):
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="the file ends inside tensor"):
        tiny.output("llama", model, tiny.token_ids(2))


def test_tensors_without_a_place_are_named(tmp_path):
    save(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.1.extra": torch.zeros(3)}))
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(3)}))
    with pytest.warns(UserWarning, match=r"no place for 1 tensors of .*, as model\.layers\.1\.extra"):
        llmkern.stream(tmp_path)


def command(*args):
    return llmkern_cli.main([str(arg) for arg in args])


@pytest.fixture
def folder(tmp_path):
    """A model folder with a tokenizer, and a text for it."""
    import tokenizers

    words = [f"w{i}" for i in range(tiny.VOCABULARY - 1)]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    save(tmp_path / "m")
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(tmp_path / "m")
    (tmp_path / "text").write_text(" ".join(words[i * i % len(words)] for i in range(3000)))
    return tmp_path


def test_the_command_streams_when_it_pays(folder, monkeypatch, capsys):
    options = ("--calibration", folder / "text", "--samples", 4, "--seqlen", 16, "--recipe", "gptq-int4-g32")
    used = []
    monkeypatch.setattr("llmkern.models.open_streamed", lambda name: used.append(name) or opened(name))
    size = sum(path.stat().st_size for path in shards(folder / "m"))
    for name, free, wanted in (("off", 0, 0), ("on", 10 * size, 1), ("auto", 10 * size, 1), ("auto", size, 2)):
        monkeypatch.setattr("llmkern._memory.available", lambda *device, free=free: free or size)
        assert command("compress", folder / "m", "--out", folder / f"{name}{free}", "--stream", name, *options) == 0
        assert len(used) == wanted
    assert f"streaming {folder / 'm'}, since it has" in capsys.readouterr().err
    # Another rank of this machine, which loads it as well.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for free, wanted in ((10 * size, 2), (3 * size, 3)):
        monkeypatch.setattr("llmkern._memory.available", lambda *device, free=free: free)
        assert command("compress", folder / "m", "--out", folder / "beside", *options) == 0
        assert len(used) == wanted
    assert "GB on each of 2 ranks and" in capsys.readouterr().err
    for out in (f"on{10 * size}", f"auto{size}"):
        one, two = files_of(folder / "off0"), files_of(folder / out)
        times = ("report.json", "report.html")
        assert {k: v for k, v in one.items() if k not in times} == {k: v for k, v in two.items() if k not in times}


def opened(name):
    from llmkern.models import Loaded, load_tokenizer

    return Loaded(llmkern.stream(name), load_tokenizer(name))


@pytest.mark.parametrize(
    ("model", "recipe", "text"),
    [("smollm2", "rtn-int8", "only a local folder of safetensors"), (None, "bf16", "bf16 changes the whole model")],
)
def test_streaming_what_cannot_be_streamed_is_bad_usage(model, recipe, text, folder, capsys):
    out = ("--out", folder / "o", "--stream", "on")
    assert command("compress", model or folder / "m", "--recipe", recipe, *out) == 2
    assert text in capsys.readouterr().err


LIMITED = """
import resource, sys, torch
import llmkern, transformers
from llmkern import _memory
torch.set_num_threads(1)
folder, mode, spare = sys.argv[1], sys.argv[2], int(sys.argv[3])
transformers.AutoModelForCausalLM  # imported before the limit is set
tiny = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4))
ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
llmkern.compress(tiny, "gptq-int4-g32", ids, progress=False)  # libraries' own buffers and threads
used = _memory._field(_memory.PROC / "self/status", "VmData:")
resource.setrlimit(resource.RLIMIT_DATA, (used + spare, used + spare))
if mode == "stream":
    model = llmkern.stream(folder)
else:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
# The output's sensitivity would be N * 512 numbers of every layer at once.
recipe = llmkern.Recipe.parse("gptq-int4-g32", objective="layer")
llmkern.compress(model, recipe, ids, progress=False)
llmkern.save(model, folder + "-out")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous mappings on Linux alone")
def test_a_model_larger_than_memory(tmp_path):
    """Dense weights of 252 MB, and a process that may take 3/4 of that beyond what its libraries have.

    RLIMIT_DATA counts what a process allocates (and what it maps to write to), resident or not; RLIMIT_AS would also
    count the address space that torch's libraries and threads reserve and never touch.
    """
    folder = save(
        tmp_path / "m", shard="8MB", hidden_size=512, intermediate_size=1024, num_hidden_layers=24,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    dense = sum(path.stat().st_size for path in shards(folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # What is freed goes back to the system at once: the limit is on what is in use, not on an allocator's gaps.
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = {}
    for mode in ("stream", "whole"):
        done[mode] = subprocess.run(
            [sys.executable, "-c", LIMITED, str(folder), mode, str(dense * 3 // 4)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done["stream"].returncode == 0, done["stream"].stderr[-2000:]
    assert (Path(f"{folder}-out") / checkpoint.META).is_file()
    assert done["whole"].returncode != 0
    assert "memory" in done["whole"].stderr.lower()
