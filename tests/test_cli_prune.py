"""`llmkern prune`: dense folders with zeros, or smaller models, that stock transformers loads; and the example."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_cli import corpus, model, refused, run  # noqa: F401

import llmkern
from llmkern import data
from llmkern.models import load_model
from llmkern.prune import MaskSet, apply_structured, magnitude_, plan_structured

transformers = pytest.importorskip("transformers")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "iterative_pruning.py"
FEW = ("--samples", 6, "--seqlen", 32)


def stock(folder):
    """As somebody without llmkern has it."""
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def windows(folder, text):
    tokenizer = load_model(str(folder)).tokenizer
    return data.calibration_windows(data.token_ids(tokenizer, data.read_text(str(text))), *FEW[1::2])


def of_kind(kind, model, to, dtype=torch.float32):  # noqa: F811
    """Another tiny model with the tokenizer of `model`."""
    getattr(tiny, kind)().to(dtype).save_pretrained(to)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, to)
    return to


@pytest.mark.parametrize("sparsity", ["0.4", "2:4"])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_zeros_in_a_dense_folder(run, model, corpus, tmp_path, method, sparsity):  # noqa: F811
    out = tmp_path / "out"
    command = ["prune", model, "--sparsity", sparsity, "--calibration", corpus, *FEW, "--out", out, "--json"]
    code, text, err = run(*command, *([] if method == "sparsegpt" else ["--method", method]))
    assert code == 0, err
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    report = json.loads(text)
    pruned = {f"{name}.weight" for name in report["sparsities"]}
    assert len(pruned) == 14
    for name, weight in before.items():
        if name not in pruned:
            assert torch.equal(after[name], weight), name
            continue
        zeros = after[name] == 0
        wanted = round(0.4 * weight.numel()) if sparsity == "0.4" else weight.numel() // 2
        if sparsity == "0.4" and method == "wanda":
            wanted = round(0.4 * weight.shape[1]) * len(weight)
        assert int(zeros.sum()) == wanted
        assert report["sparsities"][name.removesuffix(".weight")] == wanted / weight.numel()
        if method != "sparsegpt":  # which moves what it keeps
            assert torch.equal(after[name], weight.masked_fill(zeros, 0))
    assert report["out"] == str(out)
    assert report["method"] == method
    assert report["sparsity"] == pytest.approx(0.4 if sparsity == "0.4" else 0.5, abs=0.01)
    assert report["model_bytes_after"] == report["model_bytes_before"]
    assert {row["kernel"] for row in report["rows"]} == {"torch"}
    assert all(row["bytes_before"] == row["bytes_after"] for row in report["rows"])
    assert "written as dense weights, zeros in place" in report["notes"]
    for name in ("config.json", "tokenizer.json", "llmkern.json", "report.json", "report.html"):
        assert (out / name).is_file(), name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = MaskSet.from_model(stock(out))
    assert found.pattern == ("2:4" if sparsity == "2:4" else None)


def test_sparsegpt_is_that_of_compress(run, model, corpus, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    assert run("prune", model, "--sparsity", "2:4", "--calibration", corpus, *FEW, "--out", out)[0] == 0
    packed = load_model(str(model)).model
    recipe = llmkern.Recipe.parse("sparsegpt-2:4", dtype="float32")
    llmkern.compress(packed, recipe, windows(model, corpus), progress=False)
    for name, weight in load_file(out / "model.safetensors").items():
        if ".layers." in name and "norm" not in name:
            assert torch.equal(packed.get_submodule(name.removesuffix(".weight")).unpack(), weight)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float32), ("mixtral", torch.float16)]
)
def test_one_threshold_for_all_layers(run, model, tmp_path, kind, dtype):  # noqa: F811
    source, out = of_kind(kind, model, tmp_path / kind, dtype), tmp_path / "out"
    command = ("prune", source, "--method", "magnitude", "--scope", "global", "--sparsity", "0.3", "--out", out)
    code, text, err = run(*command, "--json")
    assert code == 0, err
    wanted = load_model(str(source)).model
    masks = magnitude_(wanted, 0.3, scope="global")
    found = stock(out)
    assert found.dtype == dtype
    for (name, parameter), got in zip(wanted.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(got, parameter), name
    report = json.loads(text)
    assert report["sparsity"] == pytest.approx(masks.sparsity(), abs=1e-9)
    assert len(set(report["sparsities"].values())) > 2
    assert "magnitude 0.3 of all layers together, by one threshold" in report["notes"]


@pytest.mark.parametrize(("kind", "method"), [("gpt2", "sparsegpt"), ("mixtral", "wanda"), ("gpt_oss", "magnitude")])
def test_other_kinds_of_layers(run, model, corpus, tmp_path, kind, method):  # noqa: F811
    source, out = of_kind(kind, model, tmp_path / kind), tmp_path / "out"
    command = ("prune", source, "--method", method, "--sparsity", "2:4", "--calibration", corpus, "--out", out)
    code, _, err = run(*command, "--samples", 64, "--seqlen", 16)
    assert code == 0, err
    assert MaskSet.from_model(stock(out)).check("2:4").sparsity() == 0.5


def test_a_pruned_folder_is_measured_pruned_further_and_packed(run, model, corpus, tmp_path):  # noqa: F811
    first, second, packed = (tmp_path / name for name in ("first", "second", "packed"))
    command = ("--method", "magnitude", "--out")
    assert run("prune", model, "--sparsity", "2:4", *command, first)[0] == 0
    assert run("prune", first, "--sparsity", "0.75", *command, second)[0] == 0
    masks = [MaskSet.from_model(stock(folder)) for folder in (first, second)]
    for name in masks[0].bits:
        assert not (masks[1].mask(name) & ~masks[0].mask(name)).any()
    code, _, err = run("compress", second, "--recipe", "pack-2:4", "--out", packed)
    assert code == 0, err
    assert run("eval", packed, "--text", corpus, "--seqlen", 32, "--windows", 4)[0] == 0
    refused(run("prune", packed, "--sparsity", "0.5", *command, tmp_path / "no"), 1, "packed already")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("args", [("--mlp", "64", "--multiple-of", "16"), ("--blocks", "0.5"), ("--kv-groups", "1")])
def test_parts_are_removed(run, model, corpus, tmp_path, args):  # noqa: F811
    out = tmp_path / "out"
    code, text, err = run("prune", model, *args, "--calibration", corpus, *FEW, "--out", out, "--json")
    assert code == 0, err
    dense, calibration = load_model(str(model)).model, windows(model, corpus)
    options = {"--mlp": {"mlp": 64, "multiple_of": 16}, "--blocks": {"blocks": 0.5}, "--kv-groups": {"kv_groups": 1}}
    plan = plan_structured(dense, calibration, **options[args[0]], progress=False)
    wanted = apply_structured(dense, plan, calibration=calibration, progress=False)
    small = stock(out)
    assert {name: tensor.shape for name, tensor in small.state_dict().items()} == {
        name: tensor.shape for name, tensor in wanted.state_dict().items()
    }
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), wanted.parameters(), strict=True))
    found = json.loads(text)
    assert found["method"] == found["plan"]["method"] == "obs"
    assert found["parameters_after"] == sum(p.numel() for p in small.parameters()) < found["parameters_before"]
    assert found["model_bytes_after"] < found["model_bytes_before"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    code, text, _ = run("prune", model, *args, "--calibration", corpus, *FEW, "--out", out, "--method", "magnitude")
    assert code == 0
    assert f"{found['parameters_after']:,} of {found['parameters_before']:,} parameters" in text


def test_what_it_says(run, model, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    code, text, _ = run("prune", model, "--method", "magnitude", "--sparsity", "2:4", "--out", out)
    assert code == 0
    assert f"{out}: magnitude: 50.0% of the weights of 14 linear layers are 0" in text


BOTH = "give either --sparsity or some of --mlp, --kv-groups, --heads, --blocks"


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ((), BOTH),
        (("--sparsity", "0.5", "--mlp", "0.5"), BOTH),
        (("--sparsity", "1.0"), "--sparsity 1.0: recipe: sparsity must be in (0, 1)"),
        (("--sparsity", "0"), "--sparsity 0: recipe: sparsity must be in (0, 1)"),
        (("--sparsity", "-0.5"), "sparsity must be in (0, 1)"),
        (("--sparsity", "nan"), "sparsity must be in (0, 1)"),
        (("--sparsity", "half"), "wanted a share such as 0.5, or n:m, got 'half'"),
        (("--sparsity", "4:2"), "--sparsity 4:2: recipe: sparsity"),
        (("--sparsity", "2:4:8"), "sparsity"),
        (("--sparsity", "0.5", "--method", "obs"), "--method obs: with --sparsity it is one of sparsegpt, wanda"),
        (("--mlp", "0.5", "--method", "sparsegpt"), "it is one of obs, wanda, magnitude"),
        (("--sparsity", "0.5", "--scope", "global"), "--scope global goes with --method magnitude"),
        (("--sparsity", "2:4", "--scope", "global", "--method", "magnitude"), "--scope global goes with"),
        (("--mlp", "0.5", "--scope", "global", "--method", "magnitude"), "--scope global goes with"),
        (("--mlp", "1.5"), "argument --mlp: wanted a share in (0, 1) or a number of at least 1, got '1.5'"),
        (("--blocks", "0"), "argument --blocks: wanted a share"),
        (("--kv-groups", "two"), "argument --kv-groups: wanted a share such as 0.75, or a whole number, got 'two'"),
        (("--sparsity", "0.5", "--method", "lasso"), "invalid choice"),
    ],
)
def test_bad_usage(run, tmp_path, args, part):  # noqa: F811
    refused(run("prune", "smollm2", "--out", tmp_path / "out", *args), 2, part)
    assert list(tmp_path.iterdir()) == []


def test_before_any_work(run, model, tmp_path):  # noqa: F811
    refused(run("prune", model, "--sparsity", "0.5"), 2, "--out")
    refused(run("prune", model, "--sparsity", "0.5", "--out", model), 2, "it is the folder that is read")
    foreign = tmp_path / "precious"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    refused(run("prune", model, "--sparsity", "0.5", "--out", foreign), 1, "not from llmkern")
    out = tmp_path / "out"
    missing = ("--calibration", tmp_path / "no.txt", "--out", out)
    refused(run("prune", model, "--sparsity", "0.5", *missing), 1, "no such file")
    assert run("prune", model, "--sparsity", "0.5", "--method", "magnitude", *missing)[0] == 0  # needs no text
    refused(run("prune", model, "--mlp", "80", *FEW, "--out", tmp_path / "no"), 1, "multiple of 64")
    assert not (tmp_path / "no").exists()


def test_a_run_that_was_interrupted_goes_on(run, model, corpus, tmp_path, monkeypatch):  # noqa: F811
    from llmkern.state import State

    command = ["prune", model, "--sparsity", "0.5", "--calibration", corpus, "--samples", 3, "--seqlen", 16]
    assert run(*command, "--out", tmp_path / "whole")[0] == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        write = State.write

        def second(self, part, solved):
            if self.parts:
                raise KeyboardInterrupt
            write(self, part, solved)

        patch.setattr(State, "write", second)
        refused(run(*command, "--out", out), 1, "interrupted: 1 finished parts are kept in", "--resume")
    refused(run(*command, "--out", out), 1, "has 1 finished parts in", "--resume")
    code, _, err = run(*command, "--out", out, "--resume")
    assert code == 0
    assert "resuming after 1 finished parts" in err
    for name in ("model.safetensors", "llmkern.json", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(("after", "there"), [(0, 0), (1, 1), (2, 2), (3, 3)])
def test_a_removal_that_was_interrupted_goes_on(run, model, corpus, tmp_path, monkeypatch, after, there):  # noqa: F811
    """Two blocks are planned, then two are restored."""
    from llmkern.state import State

    command = ["prune", model, "--mlp", "64", "--calibration", corpus, "--samples", 3, "--seqlen", 16]
    assert run(*command, "--out", tmp_path / "whole")[0] == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        write, written = State.write_tensors, []

        def some(self, part, tensors):
            if len(written) == after:
                raise KeyboardInterrupt
            write(self, part, tensors)
            written.append(part)

        patch.setattr(State, "write_tensors", some)
        kept = {0: "", 1: "1 finished parts are kept in", 2: "", 3: "1 finished parts are kept in"}[after]
        refused(run(*command, "--out", out), 1, "interrupted", kept)
    if there:
        refused(run(*command, "--out", out), 1, f"has {there} finished parts in", "--resume")
        refused(run(*command, "--method", "wanda", "--out", out, "--resume"), 1, "plan_structured: state_dir", "obs")
        zeros = ("--sparsity", "0.5", "--calibration", corpus, "--samples", 3, "--seqlen", 16, "--out", out)
        refused(run("prune", model, *zeros), 1, "so it is no state")
    code, _, err = run(*command, "--out", out, "--resume")
    assert code == 0
    assert (f"resuming after {there} finished parts" if there else "nothing to resume") in err
    for name in ("model.safetensors", "llmkern.json", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_the_iterative_example(model, tmp_path, capsys):  # noqa: F811
    example = runpy.run_path(str(EXAMPLE))
    example["main"](str(model), str(tmp_path / "out"), 20)
    assert "50% of the weights of the linear layers are 0" in capsys.readouterr().out
    found, dense = MaskSet.from_model(stock(tmp_path / "out")), stock(model)
    for name, bits in found.bits.items():
        assert bits.zeros() == bits.size // 2
        assert not torch.equal(
            found.model.get_parameter(name)[found.mask(name)], dense.get_parameter(name)[found.mask(name)]
        )
