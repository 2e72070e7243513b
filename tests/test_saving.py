"""What `save` writes, for others and for itself: every writer, shards, checksums, crashes, a full disk."""

import errno
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import said_by
from test_checkpoint import assert_same_model

import llmkern
from llmkern import checkpoint, checkpoint_folder, weight_writer
from llmkern.nn import PackedLinear
from llmkern.packed_size import packed_size

QUIET = pytest.mark.filterwarnings("ignore:save. llmkern.load reads this folder", "ignore:save. .* have zero points")
pytestmark = QUIET
KINDS = ["llama", "gpt2", "mixtral", "bert"]
WIDE = {"mixtral": {"intermediate_size": 64}}  # GPTQ's readers need multiples of 32


def build(kind):
    return tiny.MODELS[kind](**WIDE.get(kind, {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_codes_of_every_width_come_back(kind, bits, format, tmp_path):
    model = build(kind)
    llmkern.patch(model, llmkern.Recipe.parse(f"rtn-int{bits}-g32", scale_dtype="float16"))
    llmkern.save(model, tmp_path / "m", format)
    loaded = llmkern.load(tmp_path / "m")
    assert_same_model(kind, loaded, model)
    assert {layer.num_bits for layer in loaded.modules() if isinstance(layer, PackedLinear)} == {bits}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["rtn-int2-g16-asym", "rtn-int4-g24-asym", "w8a8", "rtn-int8-a8", "magnitude-2:4"])
def test_other_schemes_come_back(kind, scheme, tmp_path):
    model = build(kind)
    llmkern.patch(model, scheme)
    llmkern.save(model, tmp_path / "m")
    assert_same_model(kind, llmkern.load(tmp_path / "m"), model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_is_written_dense(kind, tmp_path):
    model = build(kind).bfloat16()
    llmkern.patch(model, "magnitude-2:4")
    llmkern.save(model, tmp_path / "m", "dense")
    loaded = llmkern.load(tmp_path / "m")
    assert not any(isinstance(module, PackedLinear) for module in loaded.modules())
    llmkern.patch(loaded, "pack-2:4")
    pairs = [
        (one.values, two.values) for one, two in zip(loaded.modules(), model.modules(), strict=True)
        if isinstance(one, PackedLinear)
    ]  # fmt: skip
    assert pairs
    assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("format", ["compressed-tensors", "dense"])
@pytest.mark.parametrize("scheme", ["magnitude-2:4", "magnitude-2:4-int4-g32", "magnitude-0.5", "rtn-int4-g32"])
def test_the_pattern_is_told_where_no_loader_trips(scheme, format, tmp_path):
    model = tiny.llama()
    llmkern.patch(model, scheme)
    llmkern.save(model, tmp_path / "m", format)
    wanted = "2:4" if "2:4" in scheme else None
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"} | ({"llmkern.sparsity": wanted} if wanted else {})
    assert json.loads((tmp_path / "m" / "llmkern.json").read_text())["sparsity"] == wanted
    assert "sparsity_config" not in (tmp_path / "m" / "config.json").read_text()


def stock(path, kind="llama", **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    cls = {"bert": transformers.AutoModelForMaskedLM}.get(kind, transformers.AutoModelForCausalLM)
    with llmkern.hf.stock():
        return cls.from_pretrained(path, dtype="auto", **options).eval()


def assert_close(kind, got, wanted, tolerance=1e-5):
    ids = tiny.token_ids(2)
    got, wanted = tiny.output(kind, got, ids).float(), tiny.output(kind, wanted, ids).float()
    assert (got - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["rtn-int8", "rtn-int4-g16", "rtn-int3-g16", "magnitude-2:4-int4-g16"])
def test_stock_transformers_reads_packed_experts(kind, scheme, dequantize, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    model = tiny.MODELS[kind]()
    llmkern.patch(model, scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llmkern.save(model, tmp_path / "m")
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    assert_close(kind, stock(tmp_path / "m", **options), model)
    assert_same_model(kind, llmkern.load(tmp_path / "m"), model)
    names = load_file(tmp_path / "m" / "model.safetensors").keys()
    if kind == "mixtral":
        assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_packed" in names
        assert "model.layers.0.block_sparse_moe.gate.weight" in names
    else:
        assert "model.layers.0.mlp.experts.3.up_proj.weight_packed" in names


def test_stock_transformers_reads_experts_of_a_scheme_of_their_own(tmp_path):
    model = tiny.mixtral()
    recipe = llmkern.Recipe.parse("rtn-int8", overrides={"re:.*experts.*": "rtn-int4-g16"})
    llmkern.patch(model, recipe)
    llmkern.save(model, tmp_path / "m")
    assert_close("mixtral", stock(tmp_path / "m"), model)
    assert_same_model("mixtral", llmkern.load(tmp_path / "m"), model)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["rtn-int3-g32", "rtn-int4-g32", "rtn-int8"])
def test_stock_transformers_gives_the_same_logits(kind, scheme, dtype, tmp_path):
    model = tiny.MODELS[kind]().to(dtype)
    llmkern.patch(model, scheme)
    llmkern.save(model, tmp_path / "m")
    assert_close(kind, stock(tmp_path / "m", kind), model, 1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("scheme", ["rtn-int4-g32-asym", "rtn-int8-asym", "rtn-int3-g32-asym"])
def test_zero_points_are_said_and_load_dequantized(scheme, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    model = tiny.llama()
    llmkern.patch(model, scheme)
    with pytest.warns(UserWarning, match=r"21 layers have zero points, .*CompressedTensorsConfig\(dequantize=True\)"):
        llmkern.save(model, tmp_path / "m")
    loaded = stock(tmp_path / "m", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert_close("llama", loaded, model)


def test_the_order_of_columns_is_told_and_loads(tmp_path):
    model = tiny.llama()
    llmkern.compress(model, "gptq-int4-g32", tiny.token_ids(), progress=False)
    llmkern.save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["actorder"] == "static"
    assert_close("llama", stock(tmp_path / "m"), model)
    assert_same_model("llama", llmkern.load(tmp_path / "m"), model)
    for recipe, wanted in ((llmkern.Recipe("gptq", bits=4, group_size=32, act_order=None), None), ("rtn-int4", None)):
        model = tiny.llama()
        llmkern.compress(model, recipe, tiny.token_ids(), progress=False)
        assert {m.act_order for m in model.modules() if isinstance(m, PackedLinear)} == {wanted}


@pytest.mark.parametrize("again", [False, True])
def test_a_resumed_run_knows_the_bits(again, tmp_path):
    for _ in range(1 + again):
        model = tiny.llama(num_hidden_layers=1)
        llmkern.compress(model, "gptq-int3-g32", tiny.token_ids(), state_dir=tmp_path / "state", progress=False)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert {(layer.num_bits, layer.act_order, layer.method) for layer in layers} == {(3, "static", "gptq-int3-g32")}


# Checksums


def test_every_file_has_its_checksum(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "templates").mkdir()
            (Path(folder) / "templates" / "chat.jinja").write_text("{}")

    path = tmp_path / "m"
    model = tiny.llama()
    report = llmkern.patch(model, "magnitude-2:4")
    llmkern.save(model, path, tokenizer=Tokenizer(), report=report, max_shard_size="60KB")
    listed = json.loads((path / "llmkern.json").read_text())["sha256"]
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert there - listed.keys() == {"llmkern.json", "report.json", "report.html"}
    assert checkpoint.check_files(path) == len(listed) > 5
    for name in listed:
        data = (path / name).read_bytes()
        for changed in (data[:-1], data + b" ", data[:-1] + bytes([data[-1] ^ 1])):
            (path / name).write_bytes(changed)
            with pytest.raises(ValueError, match=f"{name} was changed since it was saved"):
                checkpoint.check_files(path)
        (path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name}, which is not there"):
            checkpoint.check_files(path)
        (path / name).write_bytes(data)
    (path / "extra.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"extra.safetensors is not listed"):
        checkpoint.check_files(path)


@pytest.mark.parametrize(
    ("sums", "text"),
    [(None, "no checksums"), ({}, "no checksums"), ({"a": 1}, "no checksums"), ({"../m2": "0"}, "outside the folder")],
)
def test_checksums_that_are_none_are_refused(sums, text, tmp_path):
    llmkern.save(tiny.llama(), tmp_path / "m")
    meta = json.loads((tmp_path / "m" / "llmkern.json").read_text())
    (tmp_path / "m" / "llmkern.json").write_text(json.dumps({**meta, "sha256": sums}))
    with pytest.raises(ValueError, match=text):
        checkpoint.check_files(tmp_path / "m")


def test_a_folder_without_a_manifest_has_no_checksums(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder that"):
        checkpoint.check_files(tmp_path)


# Crashes and full disks


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model = tiny.llama()
    left = 0

    def full(put, data, _write=weight_writer._write):
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        _write(put, data)

    monkeypatch.setattr(weight_writer, "_write", full)
    for old in (False, True):
        for room in (0, 1000, 100_000):
            left = room
            with pytest.raises(OSError, match="No space left"):
                llmkern.save(model, tmp_path / "m", max_shard_size="50KB")
            assert [entry.name for entry in tmp_path.iterdir()] == (["m"] if old else [])
        if not old:
            left = 1 << 30
            llmkern.save(model, tmp_path / "m")
    left = 1 << 30
    assert_same_model("llama", llmkern.load(tmp_path / "m"), model)


LIMITED = """
import resource, signal, sys; sys.path.insert(0, {tests!r})
import tiny, llmkern
model = tiny.llama()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    llmkern.save(model, {path!r})
except OSError as error:
    print("refused", error.errno)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on files here")
@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_file_that_the_system_cuts_off_leaves_nothing(limit, tmp_path):
    code = LIMITED.format(tests=str(Path(__file__).parent), path=str(tmp_path / "m"), limit=limit)
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "refused" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("exchange", ["exchange", "rename"])
def test_saves_killed_at_every_moment(exchange, tmp_path):
    found = said_by("killed_saves.py", tmp_path, exchange)
    assert found["wrong"] == []
    assert found["moments"] > 30
    assert found["old"] > 10
    assert found["new"] >= 1
    # Without the exchange the folder is away after the first rename, and before the second.
    assert found["absent"] == (0 if exchange == "exchange" else 2)


def test_what_was_killed_between_two_renames_is_put_back(tmp_path):
    llmkern.save(tiny.llama(), tmp_path / "m[1]")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "m[1]").rename(tmp_path / f".m[1].llmkern-{dead.pid}-x-old")
    (tmp_path / f".m[1].llmkern-{dead.pid}-y").mkdir()
    checkpoint_folder._remove_leftovers(tmp_path / "m[1]")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m[1]"]
    llmkern.load(tmp_path / "m[1]")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "m").symlink_to(tmp_path / "there")
    for _ in range(2):
        llmkern.save(tiny.llama(), tmp_path / "m")
    assert (tmp_path / "m").is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m", "there"]
    llmkern.load(tmp_path / "there")


@pytest.mark.parametrize(
    "scheme",
    ["rtn-int2-g16", "rtn-int3-g24-asym", "rtn-int3", "rtn-int4-g32-asym", "rtn-int8-asym", "magnitude-2:4-int3-g32"],
)
def test_plans_know_the_bytes_of_a_file(scheme, tmp_path):
    model = tiny.llama()
    recipe = llmkern.Recipe.parse(scheme)
    planned = sum(
        packed_size(tuple(layer.weight.shape), recipe, torch.float32).file_bytes
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    )
    llmkern.patch(model, recipe)
    llmkern.save(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert planned == sum(tensor.nbytes for name, tensor in tensors.items() if ".weight_" in name)
