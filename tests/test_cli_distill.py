"""`llmkern distill`: from a model to a trained student that stock transformers loads."""

import json

import pytest
import torch
from test_cli import corpus, model, refused, run  # noqa: F401

from llmkern.prune import MaskSet, magnitude_

transformers = pytest.importorskip("transformers")
QUICK = ("--seqlen", 16, "--batch", 2, "--steps", 3)


@pytest.fixture
def distill(run, model, corpus, tmp_path):  # noqa: F811
    """Run the command with a student (or none) and the tiny teacher; the code, and the object or the error's text."""

    def call(*args, student=None, out="out"):
        models = ["--drop-layers", model] if student is None else [student, model]
        code, text, err = run("distill", *models, "--text", corpus, "--out", tmp_path / out, "--json", *QUICK, *args)
        return code, json.loads(text) if text else None, err

    return call


def test_every_other_block_is_trained_and_saved(distill, model, tmp_path):  # noqa: F811
    code, result, err = distill("--lr", "1e-2", "--hidden", "squarehead", "--ce-weight", "0.5", "--temperature", "2")
    assert code == 0, err
    assert (result["steps"], result["tokens"], result["blocks"]) == (3, 96, 1)
    assert [set(row) for row in result["history"]] == [{"loss", "divergence", "cross_entropy", "agreement"}] * 3
    assert result["loss"] == result["history"][-1]["loss"]
    assert "distill 3/3" in err
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert loaded.config.num_hidden_layers == 1
    assert not torch.equal(loaded.model.layers[0].mlp.up_proj.weight, teacher.model.layers[0].mlp.up_proj.weight)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))
    code, again, _ = distill(
        "--lr", "1e-2", "--hidden", "squarehead", "--ce-weight", "0.5", "--temperature", "2"
    )  # over ours
    assert code == 0
    assert again["history"] == result["history"]


def test_a_pruned_student_keeps_its_zeros_and_its_dtype(distill, model, tmp_path):  # noqa: F811
    student = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    magnitude_(student, "2:4")
    student.save_pretrained(tmp_path / "pruned")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "pruned")
    code, _, err = distill("--keep-masks", "--lr", "1e-2", "--dtype", "bfloat16", student=tmp_path / "pruned")
    assert code == 0, err
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    MaskSet.from_model(loaded).check("2:4")
    assert not torch.equal(loaded.model.layers[0].mlp.up_proj.weight, student.model.layers[0].mlp.up_proj.weight)
    code, _, err = distill("--lr", "1e-2", student=tmp_path / "pruned", out="grown")
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype="auto")
    assert code == 0
    with pytest.raises(ValueError, match="no weight of a linear layer is 0"):
        MaskSet.from_model(grown)
    code, result, _ = distill("--keep-masks", student=model, out="dense")
    assert code == 1
    assert "no weight of a linear layer is 0" in result["error"]


def test_a_cache_is_written_once_and_used_again(distill, tmp_path):
    cache = tmp_path / "cache"
    code, first, err = distill("--cache", cache, "--k", 17)
    assert code == 0, err
    times = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    code, second, _ = distill("--cache", cache, "--k", 17)
    assert code == 0
    assert second["history"] == first["history"]
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")} == times
    _, online, _ = distill()
    assert online["history"][0]["divergence"] == pytest.approx(first["history"][0]["divergence"], abs=2e-3)  # k: all
    code, result, _ = distill("--cache", cache, "--k", 5)
    assert code == 1
    assert "settings.k is 17 there and 5 here" in result["error"]
    code, result, _ = distill("--cache", tmp_path / "drawn", "--sample", "--k", 9)
    assert code == 0


def test_a_budget_of_tokens_and_fewer_windows(run, model, corpus, tmp_path):  # noqa: F811
    args = ["distill", model, "--drop-layers", "--text", corpus, "--out", tmp_path / "o", "--seqlen", 16, "--batch", 2]
    code, out, _ = run(*args, "--tokens", 65, "--samples", 2, "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["steps"], result["tokens"]) == (3, 96)
    code, text, _ = run(*args, "--steps", 1)
    assert code == 0
    assert "o: 1 blocks, trained on 32 tokens in" in text


def test_what_is_left_of_a_run_is_resumed_if_that_is_asked_for(distill, tmp_path, monkeypatch):
    from llmkern.distill import training

    _, whole, _ = distill(out="whole")
    step, keep = training._step, training.train

    def dies(wrapper, optimizer, windows, number, settings):
        if number == 2:
            raise KeyboardInterrupt
        return step(wrapper, optimizer, windows, number, settings)

    monkeypatch.setattr(training, "train", lambda *args, **options: keep(*args, **options, save_seconds=0))
    monkeypatch.setattr(training, "_step", dies)
    code, result, _ = distill()
    assert code == 1
    assert "interrupted: step 2 is kept in" in result["error"]
    monkeypatch.setattr(training, "_step", step)
    code, result, _ = distill()
    assert code == 1
    assert "add --resume to go on" in result["error"]
    code, result, err = distill("--resume")
    assert code == 0
    assert "resuming" in err
    assert result["history"] == whole["history"]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
    code, result, err = distill("--resume")
    assert "nothing to resume" in err


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--steps", "0"], "at least 1"), (["--lr", "0"], "wanted more than 0"), (["--lr", "x"], "wanted a number"),
        (["--temperature", "0"], "wanted more than 0"), (["--temperature", "-1"], "wanted more than 0"),
        (["--ce-weight", "-1"], "wanted at least 0"), (["--lr", "nan"], "wanted more than 0"),
        (["--kind", "kl"], "invalid choice"), (["--steps", "3", "--tokens", "5"], "not allowed with"),
    ],
)  # fmt: skip
def test_bad_usage(run, args, part, tmp_path):  # noqa: F811
    refused(run("distill", "a", "b", "--out", tmp_path / "o", *args), 2, part)


def test_models_that_are_not_two_or_one(run, model, tmp_path):  # noqa: F811
    out = ["--out", tmp_path / "o"]
    for args in ([model], [model, model, "--drop-layers"]):
        refused(run("distill", *args, *out), 2, "wanted STUDENT TEACHER, or one model with --drop-layers")
    for args in (["--hidden", "cosine"], ["--kind", "jsd"]):
        refused(run("distill", model, "--drop-layers", *out, "--cache", tmp_path / "c", *args), 2, "--cache: it serves")


def test_tokenizers_that_differ_and_packed_students(distill, run, model, tmp_path):  # noqa: F811
    import llmkern
    from llmkern.models import load_model

    loaded, tokenizer = load_model(str(model))
    other = tmp_path / "other"
    loaded.save_pretrained(other)
    state = json.loads((model / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["the"], vocabulary["of"] = vocabulary["of"], vocabulary["the"]
    tokenizer.save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(state))
    code, result, _ = distill(student=other)
    assert code == 1
    assert "token 1 is 'of' for the student and 'the' for the teacher" in result["error"]
    llmkern.patch(loaded, "rtn-int8")
    llmkern.save(loaded, tmp_path / "packed", tokenizer=tokenizer)
    code, result, _ = distill(student=tmp_path / "packed")
    assert code == 1
    assert "its layers are packed; first llmkern convert --format dense" in result["error"]
    assert not (tmp_path / "out").exists()
