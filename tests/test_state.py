"""A compression that ends early goes on where it was, and gives the same bits; what cannot go on is refused."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys

import pytest
import tiny
import torch
from scripts import said_by

import llmkern
from llmkern import _files, layer_solver, patching, pipeline
from llmkern.nn import PackedLinear, dense_weight
from llmkern.solvers import Hessian
from llmkern.state import State, parts_in


def compress(model, recipe, calibration, **fields):
    return llmkern.compress(model, recipe, calibration, progress=False, **fields)


def calibration_of(kind, n=11):
    return [tiny.inputs(kind, part) for part in tiny.token_ids(n).split(4)]


def rows(report):
    return [{**vars(row), "seconds": 0} for row in report.rows]


def assert_same(model, other):
    wanted = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert {n for n, m in model.named_modules() if isinstance(m, PackedLinear)} == {
        n for n, m in other.named_modules() if isinstance(m, PackedLinear)
    }


def interrupt(monkeypatch, folder, parts, model=None, recipe="gptq-int4-g32", calibration=None):
    """A run that Ctrl-C ends after so many durable parts."""
    with monkeypatch.context() as patch:
        write = State.write

        def counted(self, part, solved):
            if len(self.parts) == parts:
                raise KeyboardInterrupt
            write(self, part, solved)

        patch.setattr(State, "write", counted)
        compress(model or tiny.llama(), recipe, calibration, state_dir=folder)


def stop(monkeypatch, folder, model, recipe, calibration, parts):
    """Leave the state of a run that ended early."""
    with pytest.raises(KeyboardInterrupt):
        interrupt(monkeypatch, folder, parts, model, recipe, calibration)
    assert parts_in(folder) == parts


def test_a_run_killed_at_random_points_and_resumed_gives_the_same_bits(tmp_path):
    result = said_by("killed_runs.py", tmp_path)
    assert result["different"] == []
    assert set(result["parts"]) == {0, 1, 2, 3, 4}  # the points are spread over the whole run


@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5", "albert", "mixtral", "gpt_oss", "switch", "mlp", "scaled"])
def test_every_shape_of_model_goes_on_after_any_part(kind, tmp_path, monkeypatch):
    build = Scaled if kind == "scaled" else getattr(tiny, kind)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(3))
    calibration = [x] if kind in ("mlp", "scaled") else calibration_of("t5" if kind == "switch" else kind)
    recipe = llmkern.Recipe.parse("gptq-int4-g16", ignore=(), overrides={"re:.*[02]": "gptq-w8a8"})
    if kind in ("mlp", "switch", *tiny.MIXTURES):
        recipe = llmkern.Recipe.parse("gptq-int4-g16", experts="all")
    whole = build()
    report = compress(whole, recipe, calibration)
    folder = tmp_path / "state"
    stop(monkeypatch, folder, build(), recipe, calibration, 1)
    for parts in range(2, 40):
        resumed = build()
        try:
            stop(monkeypatch, folder, resumed, recipe, calibration, parts)
        except pytest.fail.Exception:
            break
    again = build()
    second = compress(again, recipe, calibration, state_dir=folder)
    for model in (resumed, again):
        assert_same(model, whole)
    assert rows(second) == rows(report)
    assert parts_in(folder) == parts > 1


class Scaled(torch.nn.Module):
    """Between the blocks something happens, so every block's input is captured from the model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(32, 32)) for _ in range(3))

    def forward(self, x):
        for at, block in enumerate(self.blocks):
            x = torch.tanh(block(x * (at + 1)))
        return x


def test_data_free_recipes_go_on_too(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "PART_BYTES", 60_000)
    whole, resumed = tiny.llama(), tiny.llama()
    report = compress(whole, "rtn-int4-g32", None)
    stop(monkeypatch, tmp_path, tiny.llama(), "rtn-int4-g32", None, 2)
    assert rows(compress(resumed, "rtn-int4-g32", None, state_dir=tmp_path)) == rows(report)
    assert_same(resumed, whole)
    assert 2 < parts_in(tmp_path) < len(report.rows)


def test_a_finished_state_solves_nothing_again(tmp_path, monkeypatch):
    whole, again = tiny.llama(), tiny.llama()
    compress(whole, "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)
    monkeypatch.setattr(layer_solver, "solve_and_keep", None)
    compress(again, "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)
    assert_same(again, whole)


def test_without_state_dir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "replace_file", None)
    monkeypatch.setattr(layer_solver, "fingerprint", None)
    monkeypatch.chdir(tmp_path)
    compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids())
    assert list(tmp_path.iterdir()) == []


METHODS = (
    "gptq-int4-g32", "gptq-int8", "gptq-int3-g32-asym", "gptq-w8a8", "wanda-0.5", "wanda-2:4-int4-g32", "sparsegpt-0.5",
    "sparsegpt-2:4", "sparsegpt-2:4-int4-g32", "magnitude-0.5-int8", "rtn-int4-asym",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_packed_layer_unpacks_to_is_what_ran_in_its_place(method, dtype):
    """A resumed run has only the packed weight; a run that is not resumed used the solution's own values."""
    layer = tiny.mlp()[0].to(dtype)
    hessian = Hessian(32).add(torch.randn(100, 32, generator=torch.Generator().manual_seed(0)))
    packed, _, solution = patching.solve_and_keep("test", "layer", layer, hessian, llmkern.Recipe.parse(method))
    one, other = dense_weight(layer).clone(), dense_weight(layer).clone()
    assert torch.equal(one.copy_(packed.unpack()), other.copy_(solution.weight))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"recipe": "gptq-int8-g32"}, "recipe.bits is 4 there and 8 here"),
        ({"recipe": llmkern.Recipe.parse("gptq-int4-g32", damp=0.02)}, "recipe.damp is 0.01 there and 0.02 here"),
        ({"calibration": tiny.token_ids(seed=1)}, "calibration is "),
        ({"weight": 1e-6}, "model.values is "),
        ({"model": {"rms_norm_eps": 1e-3}}, "model.config is "),
        ({"model": {"intermediate_size": 128}}, "model.tensors is "),
        ({"version": "9.9"}, 'torch is "'),
        ({"device": "cpu"}, "device is "),
    ],
)
def test_the_state_of_another_run_is_refused(change, text, tmp_path, monkeypatch):
    stop(monkeypatch, tmp_path, tiny.llama(), "gptq-int4-g32", tiny.token_ids(), 1)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    model = tiny.llama(**change.get("model", {}))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 4] += change.get("weight", 0.0)
    if "version" in change:
        monkeypatch.setattr(torch, "__version__", change["version"])
    fields = {"device": change.get("device"), "state_dir": tmp_path}
    with pytest.raises(ValueError, match="of another run: ") as caught:
        compress(model, change.get("recipe", "gptq-int4-g32"), change.get("calibration", tiny.token_ids()), **fields)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_another_number_of_threads_is_noted_and_not_refused(tmp_path, monkeypatch):
    stop(monkeypatch, tmp_path, tiny.llama(), "gptq-int4-g32", tiny.token_ids(), 1)
    torch.set_num_threads(2)
    try:
        report = compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)
    finally:
        torch.set_num_threads(1)
    assert report.notes == [
        "resumed after 1 parts of the state; the seconds of their layers are of then",
        "resumed, not bit for bit what one run gives: threads is 1 there and 2 here",
    ]


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes(data[:-1] if how == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_part_is_refused_and_can_be_given_up(how, tmp_path, monkeypatch):
    whole, model = tiny.llama(), tiny.llama()
    compress(whole, "gptq-int4-g32", tiny.token_ids())
    stop(monkeypatch, tmp_path, tiny.llama(), "gptq-int4-g32", tiny.token_ids(), 2)
    damage(tmp_path / "0001.safetensors", how)
    with pytest.raises(ValueError, match=r"0001.safetensors \(model.layers.1\) is damaged: wanted .* got .* delete"):
        compress(model, "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)
    (tmp_path / "0001.safetensors").unlink()
    stop(monkeypatch, tmp_path, tiny.llama(), "gptq-int4-g32", tiny.token_ids(), 1)  # what is given up is not named
    (tmp_path / "0000.safetensors").unlink()
    report = compress(model, "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)
    assert report.notes == ["1 parts of the state are solved again: 0000.safetensors is gone"]
    assert_same(model, whole)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 2, "parts": [{"name": "a"}]}', '{"version": 3}'])
def test_a_damaged_manifest_is_refused(text, tmp_path):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state\.json (is damaged|has version 3, wanted 2)") as caught:
        compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path, monkeypatch):
    stop(monkeypatch, tmp_path, tiny.llama(), "gptq-int4-g32", tiny.token_ids(), 1)
    manifest = json.loads((tmp_path / "state.json").read_text())
    manifest["parts"][0]["file"] = "../0000.safetensors"
    (tmp_path / "state.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is damaged"):
        compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"holds thesis\.tex"):
        compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)
    with pytest.raises(FileExistsError, match=r"state_dir .*thesis\.tex.*: File exists"):
        compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=r"state_dir .*lock: Read-only file system"):
        compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)


def test_two_processes_do_not_share_a_state(tmp_path, monkeypatch):
    stop(monkeypatch, tmp_path, tiny.llama(), "gptq-int4-g32", tiny.token_ids(), 1)
    hold = "import fcntl,sys; f=open(sys.argv[1],'a+'); fcntl.flock(f,fcntl.LOCK_EX); print('held',flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"in use by another process .process {os.getpid()} on "):
            compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)
        other.kill()
    assert (tmp_path / "lock").exists()
    compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)


def full_after(monkeypatch, parts):
    """A disk that is full once there are so many parts."""
    real = os.fsync

    def fsync(handle):
        if f"{parts:04}.safetensors" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_an_error_and_what_was_durable_stays(tmp_path, monkeypatch):
    whole, model = tiny.llama(), tiny.llama()
    compress(whole, "gptq-int4-g32", tiny.token_ids())
    with monkeypatch.context() as patch:
        full_after(patch, 2)
        with pytest.raises(
            OSError, match=r"0002.safetensors .* cannot be written: No space.*; 2 parts before"
        ) as caught:
            compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0000.safetensors", "0001.safetensors", "lock", "state.json",
    ]  # fmt: skip
    compress(model, "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)
    assert_same(model, whole)


def test_a_limit_on_files_is_an_error_too(tmp_path):
    """The system's own refusal, not a simulated one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"0000.safetensors .* cannot be written: File too large; 0 parts"):
            compress(tiny.llama(), "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not tmp_path.exists()


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt, match=r"^1 finished parts are kept in .*: the same call on .* goes on$"):
        interrupt(monkeypatch, tmp_path, 1, calibration=tiny.token_ids())
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        interrupt(monkeypatch, tmp_path / "new", 0, calibration=tiny.token_ids())
    assert not (tmp_path / "new").exists()


def test_errors_say_how_to_go_on(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"20 of 21 layers are changed .*; 2 finished parts are kept in "):
        compress(model, "gptq-int4-g32", tiny.token_ids(), state_dir=tmp_path)
    assert parts_in(tmp_path) == 2
