"""`llmkern plan` says beforehand what `compress` reports afterwards."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from scripts import said_by

import llmkern
import llmkern_cli
from llmkern import packed_size, planning
from llmkern.nn import PackedLinear
from llmkern.solvers._checks import Pattern
from llmkern.solvers.solution import is_24

transformers = pytest.importorskip("transformers")

RECIPES = (
    "rtn-int8", "rtn-int4-g24-asym", "w8a8", "gptq-int4", "gptq-int3-g32", "gptq-int8-g48-asym", "magnitude-0.5",
    "magnitude-0.37-int8-g32", "magnitude-2:4", "magnitude-3:4-int4-g32", "wanda-0.45", "wanda-2:4-int4-g30",
    "sparsegpt-0.55", "sparsegpt-2:4", "sparsegpt-2:4-int4-g32", "sparsegpt-2:4-int8-g32", "sparsegpt-5:8",
    "sparsegpt-4:8-int4-g32", "sparsegpt-6:8-int4-g32", "sparsegpt-0.5-int8", "bf16", "pack-2:4",
)  # fmt: skip


def compressed(model, recipe):
    needs_data = llmkern.Recipe.parse(recipe).needs_calibration
    return llmkern.compress(model, recipe, tiny.token_ids() if needs_data else None, progress=False)


def assert_agrees(plan, report):
    assert [x.name for x in sorted(plan.layers, key=lambda x: x.name)] == sorted(row.name for row in report.rows)
    rows = {row.name: row for row in report.rows}
    for layer in plan.layers:
        row = rows[layer.name]
        assert (layer.shape, layer.method, layer.bytes_before) == (row.shape, row.method, row.bytes_before)
        assert layer.bytes_after == row.bytes_after, layer
    assert plan.skipped == report.skipped
    assert plan.model_bytes_before == report.model_bytes_before
    assert plan.model_bytes_after == report.model_bytes_after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_are_those_of_the_report(recipe, dtype):
    model = tiny.llama(hidden_size=72, intermediate_size=90, num_hidden_layers=1).to(dtype)
    if recipe == "pack-2:4":
        recipe = llmkern.Recipe.parse(recipe)
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                prune(module)
    plan = planning.plan(model, recipe, rate=1e9)
    formats = {layer.name: layer.format for layer in plan.layers}
    assert_agrees(plan, compressed(model, recipe))
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            assert module.format == formats[name]


def prune(module):
    with torch.no_grad():
        module.weight[:, 0::4] = 0
        module.weight[:, 3::4] = 0


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_layers_are_those_of_the_report(kind):
    model = tiny.MODELS[kind]()
    plan = planning.plan(model, "rtn-int4-g32", rate=1e9)
    assert_agrees(plan, compressed(model, "rtn-int4-g32"))


def test_overrides_and_targets():
    overrides = {"down_proj": "rtn-int8", "q_proj": None, "v_proj": {"bits": 3}}
    recipe = llmkern.Recipe.parse("gptq-int4-g32", targets=["re:model.layers.[01]"], overrides=overrides)
    model = tiny.llama(tie_word_embeddings=True)
    plan = planning.plan(model, recipe, rate=1e9)
    assert_agrees(plan, compressed(model, recipe))


def test_a_tied_head_leaves_its_weight_to_the_embeddings():
    recipe = llmkern.Recipe.parse("rtn-int4-g32", ignore=())
    plan = planning.plan(tiny.llama(tie_word_embeddings=True), recipe, rate=1e9)
    assert "lm_head" in {layer.name for layer in plan.layers}
    assert_agrees(plan, compressed(tiny.llama(tie_word_embeddings=True), recipe))


def test_what_the_weights_decide_is_not_guessed():
    plan = planning.plan(tiny.llama(), "pack", rate=1e9)
    assert {layer.bytes_after for layer in plan.layers} == {None}
    assert plan.model_bytes_after is None
    assert "depends on its weights" in plan.notes[0]


@pytest.mark.parametrize("n_m", [(n, m) for m in range(2, 9) for n in range(1, m)])
def test_which_patterns_are_always_24(n_m):
    n, m = n_m
    pattern = Pattern.parse("test", f"{n}:{m}")
    k = 4 * m
    worst = torch.zeros(4, k, dtype=torch.bool)
    for row, column in enumerate(range(4)):  # keep the columns that crowd some quad most
        for group in range(4):
            columns = torch.arange(group * m, (group + 1) * m)
            near = (columns - (k // 2 + column - 2)).abs().argsort(stable=True)
            worst[row, columns[near[: m - n]]] = True
    if packed_size.always_24(pattern):
        assert is_24(worst)
    crowded = torch.zeros(1, k, dtype=torch.bool)
    for quad in range(m):
        crowded[:] = False
        for group in range(4):
            columns = torch.arange(group * m, (group + 1) * m)
            inside = (columns // 4 != quad).int().argsort(stable=True)
            crowded[0, columns[inside[: m - n]]] = True
        if not is_24(crowded):
            assert not packed_size.always_24(pattern)
            return
    assert packed_size.always_24(pattern)


def test_streaming_needs_less_and_more_data_needs_more():
    model = tiny.llama(num_hidden_layers=8)
    small, large = (planning.plan(model, "gptq-int4-g32", samples=s, rate=1e9) for s in (16, 160))
    assert small.peak_bytes_streamed < small.peak_bytes < large.peak_bytes
    assert large.activation_bytes == 2 * 160 * 512 * 64 * 4  # the dense model's as well
    plain = planning.plan(model, llmkern.Recipe.parse("gptq-int4-g32", input_correction=0), samples=160, rate=1e9)
    assert plain.activation_bytes == 160 * 512 * 64 * 4
    # What goes beside them is a block's weights, and what is of the size of one layer.
    block = sum(p.nbytes for p in model.model.layers[0].parameters() if p.ndim > 1)
    assert block < large.peak_bytes - plain.peak_bytes - plain.activation_bytes < 2.5 * block
    assert large.seconds > 1.2 * plain.seconds
    assert small.seconds < large.seconds
    assert planning.plan(model, "rtn-int8", rate=1e9).activation_bytes == 0
    assert planning.measured_rate() > 1e6


def test_the_peak_is_that_of_a_process(tmp_path):
    """With more blocks and sequences than what one sequence leaves behind would have room for."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux alone tells a process's peak anew")
    model = tiny.llama(
        vocab_size=1024, hidden_size=256, intermediate_size=1024, num_hidden_layers=20, max_position_embeddings=512
    )
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    wanted = planning.plan(model, "gptq-int4-g32", samples=6, rate=1e9).peak_bytes
    peak = said_by("peak.py", tmp_path, "gptq-int4-g32", 6)["peak"]
    assert 0.75 * wanted < peak < 1.05 * wanted


def planned(model, **fields):
    return planning.plan(model, llmkern.Recipe.parse("gptq-int4-g32", **fields), samples=1, rate=1e9)


def test_the_gradients_logits_are_in_memory_twice():
    """Those of one sequence. The layers' own errors need none."""

    def work(vocabulary, **fields):
        plan = planned(tiny.llama(vocab_size=vocabulary), **fields)
        return plan.peak_bytes - plan.model_bytes_before

    more = work(40000) - work(20000)
    assert 2 * 4 * 512 * 20000 <= more < 1.5 * 2 * 4 * 512 * 20000
    assert work(40000, objective="layer") == work(20000, objective="layer")


def test_a_token_goes_through_some_experts():
    """More of them have more outputs that the model feels, and no more inputs at a time."""
    few, many = (planned(tiny.mixtral(num_local_experts=count)) for count in (4, 64))

    def rest(plan):
        felt = sum(4 * layer.shape[0] ** 2 + 4 * 512 for layer in plan.layers)
        return plan.peak_bytes - plan.model_bytes_before - felt

    assert rest(many) == pytest.approx(rest(few), abs=1e5)


def test_too_little_memory_is_said(monkeypatch):
    monkeypatch.setattr(planning._memory, "available", lambda: 1000)
    assert "are available here: nor does a streamed run" in planning.plan(tiny.llama(), "rtn-int8", rate=1e9).notes[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.llama().to(torch.bfloat16).save_pretrained(path, max_shard_size="40kB")
    return path


def command(capsys, *args):
    code = llmkern_cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_reads_no_weights(folder, capsys, monkeypatch):
    monkeypatch.setattr("llmkern.weight_files.Lazy.__getitem__", None)
    code, out, _ = command(capsys, "plan", folder, "--recipe", "sparsegpt-2:4", "--json")
    assert code == 0
    plan = json.loads(out)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    report = compressed(loaded, "sparsegpt-2:4")
    after = {row.name: row.bytes_after for row in report.rows}
    assert {layer["name"]: layer["bytes_after"] for layer in plan["layers"]} == after
    assert plan["model_bytes_after"] == report.model_bytes_after
    code, out, _ = command(capsys, "compress", folder, "--recipe", "sparsegpt-2:4", "--dry-run", "--json")
    assert json.loads(out)["layers"] == plan["layers"]
    code, out, _ = command(capsys, "plan", folder, "--recipe", "gptq-int4-g32")
    assert "1 x ignored by 'lm_head'" in out
    assert "Int4Weight" in out


def test_a_recipe_that_does_not_fit_is_bad_usage(folder, capsys):
    code, out, err = command(capsys, "plan", folder, "--recipe", "gptq-int4-g96")
    assert (code, out) == (2, "")
    assert "group_size must be in [1, K=64], got 96" in err


def test_a_compressed_folder_is_refused(tmp_path, capsys):
    model = tiny.llama()
    compressed(model, "rtn-int8")
    llmkern.save(model, tmp_path / "m")
    code, _, err = command(capsys, "plan", tmp_path / "m", "--recipe", "rtn-int8")
    assert code == 1
    assert "compressed already" in err


def test_a_broken_folder_is_refused(folder, tmp_path, capsys):
    import shutil

    broken = shutil.copytree(folder, tmp_path / "broken")
    part = sorted(broken.glob("*.safetensors"))[1]
    part.write_bytes(part.read_bytes()[:100])
    code, _, err = command(capsys, "plan", broken, "--recipe", "rtn-int8")
    assert code == 1
    assert part.name in err
