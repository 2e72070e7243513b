"""inspect, verify and convert: on folders of ours and of others, and on what is broken on purpose."""

import json
import shutil
import struct

import others
import pytest
import tiny
import tiny_gguf
import torch
from safetensors.torch import load_file, save_file
from test_cli import corpus, model, refused, run  # noqa: F401

import llmkern
from llmkern import checkpoint_folder, converting
from llmkern._files import digest
from llmkern.nn import PackedLinear
from llmkern.recipe import Recipe
from llmkern.verifying import verify

transformers = pytest.importorskip("transformers")
ORDERS = {64: torch.randperm(64, generator=torch.Generator().manual_seed(1)),
          96: torch.randperm(96, generator=torch.Generator().manual_seed(2))}  # fmt: skip
INT4 = Recipe(method="rtn", bits=4, group_size=16, scale_dtype="float16")


def saved(folder, recipe, format="compressed-tensors"):
    made = tiny.llama(num_hidden_layers=2)
    llmkern.compress(made, recipe, tiny.token_ids(), progress=False)
    llmkern.save(made, folder, format=format)
    return folder


def stripped(folder, to):
    """As somebody else's: without what only llmkern reads."""
    shutil.copytree(folder, to)
    for name in ("llmkern.json", "llmkern.safetensors"):
        (to / name).unlink(missing_ok=True)
    return to


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of each kind, made when it is asked for."""
    root, made = tmp_path_factory.mktemp("folders"), {}

    def make(kind):
        at = root / kind.replace(":", "of").replace(" ", "-")
        if kind == "dense":
            tiny.llama(num_hidden_layers=2).save_pretrained(at)
        elif kind == "gguf":
            tiny_gguf.write(root / "m.gguf")
            return root / "m.gguf"
        elif kind in ("awq", "gptq act-order"):
            others.write(at, llmkern.load(get("ours int4")), kind.split()[0], ORDERS if "act" in kind else None)
        elif kind == "gptq":
            stripped(
                saved(root / "gptq-ours", Recipe(method="rtn", bits=4, group_size=32, scale_dtype="float16"), "gptq"),
                at,
            )
        elif kind == "ct":
            stripped(get("ours asymmetric"), at)
        else:
            recipe = {
                "ours int4": INT4, "ours int8": "rtn-int8", "ours w8a8": "w8a8", "ours 2:4": "magnitude-2:4",
                "ours 2:4 int4": "sparsegpt-2:4-int4-g16", "ours bitmask": "magnitude-0.5",
                "ours asymmetric": Recipe(method="rtn", bits=4, group_size=16, symmetric=False),
            }[kind]  # fmt: skip
            saved(at, recipe)
        return at

    def get(kind):
        if kind not in made:
            made[kind] = make(kind)
        return made[kind]

    return get


# kind: method, format, bits, group_size, symmetric, act_order, sparsity, op
INSPECTED = {
    "ours int4": ("compressed-tensors", "Int4Weight", 4, 16, True, None, None, "int4_linear"),
    "ours int8": ("compressed-tensors", "Int8Weight", 8, None, True, None, None, "int8_linear"),
    "ours w8a8": ("compressed-tensors", "Int8Weight", 8, None, True, None, None, "int8_dynamic_linear"),
    "ours asymmetric": ("compressed-tensors", "Int4Weight", 4, 16, False, None, None, "int4_linear"),
    "ours 2:4": (None, "Sparse24Weight", 16, None, None, None, "2:4", "sparse24_linear"),
    "ours 2:4 int4": ("compressed-tensors", "Sparse24Int4Weight", 4, 16, True, None, "2:4", "sparse24_int4_linear"),
    "ours bitmask": (None, "BitmaskWeight", 16, None, None, None, "unstructured", "bitmask_linear"),
    "ct": ("compressed-tensors", "pack-quantized", 4, 16, False, False, None, "int4_linear"),
    "gptq": ("gptq", "gptq", 4, 32, True, False, None, "int4_linear"),
    "gptq act-order": ("gptq", "gptq", 4, 16, True, True, None, "int4_linear"),
    "awq": ("awq", "awq", 4, 16, False, False, None, "int4_linear"),
    "dense": (None, "dense", 32, None, None, None, None, None),
}


@pytest.mark.parametrize("kind", INSPECTED)
def test_inspect_says_what_is_there(run, folders, kind):  # noqa: F811
    code, out, err = run("inspect", folders(kind), "--json")
    assert code == 0, err
    found = json.loads(out)
    method, *wanted = INSPECTED[kind]
    assert found["quant_method"] == method
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert len(layers) == 16
    for name, layer in layers.items():
        keys = ("format", "bits", "group_size", "symmetric", "act_order", "sparsity", "op")
        if ".layers." in name:
            assert [layer[key] for key in keys] == wanted, name
            assert (layer["kernel"] is None) == (layer["op"] is None)
        else:
            assert (layer["format"], layer["op"]) == ("dense", None)
    assert layers["model.layers.1.mlp.down_proj"]["shape"] == [64, 96]
    assert found["bytes"] == found["layer_bytes"] + found["other_bytes"]
    text = run("inspect", folders(kind))[1]
    for mark, is_there in [("asymmetric", wanted[3] is False), ("act-order", wanted[4]), ("2:4", wanted[5] == "2:4")]:
        assert (f" {mark}" in text) == bool(is_there)


def test_inspect_a_gguf_file(run, folders):  # noqa: F811
    found = json.loads(run("inspect", folders("gguf"), "--json")[1])
    assert (found["model_type"], found["quant_method"]) == ("llama", "gguf")
    assert {(layer["format"], layer["bits"]) for layer in found["layers"]} == {
        ("F32", 32),
        ("Q8_0", 8.5),
        ("Q4_0", 4.5),
    }
    assert {layer["name"]: layer["shape"] for layer in found["layers"]}["blk.1.ffn_down"] == [64, 96]
    assert "4.5" in run("inspect", folders("gguf"))[1]


def test_inspect_what_is_not_read(run, folders, tmp_path):  # noqa: F811
    shutil.copytree(folders("gptq"), tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    found = json.loads(run("inspect", tmp_path / "fp8", "--json")[1])
    assert found["quant_method"] == "fp8"
    assert all(layer["op"] is None for layer in found["layers"])
    assert "does not read it" in found["notes"][0]
    assert "fp8" in found["notes"][0]


@pytest.mark.parametrize("kind", [*INSPECTED, "gguf"])
def test_verify_finds_nothing_wrong(run, folders, kind):  # noqa: F811
    code, out, err = run("verify", folders(kind), "--forward", "--json")
    found = json.loads(out)
    assert code == 0, (err, found)
    assert found["problems"] == []
    assert found["kind"] == ("gguf" if kind == "gguf" else kind.split()[0].replace("ours", "llmkern") if "ours" in kind
                             else "dense" if kind == "dense" else "foreign")  # fmt: skip
    packed = 0 if kind in ("dense", "gguf") else 14
    assert found["checks"].get("layers", 0) == packed
    assert found["checks"]["model"] == 1
    assert found["checks"]["tensors"] >= 21
    assert found["forward"]["layers"] == packed
    assert 0 <= found["forward"]["difference"] <= found["forward"]["limit"]
    assert found["forward"]["greatest"] > 0
    text = run("verify", folders(kind))[1]
    assert text.strip().endswith("\nvalid")


def damaged(folder, to, **changes):
    """A copy with tensors replaced (None: left out), its checksums renewed: only values can tell."""
    shutil.copytree(folder, to)
    path = to / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor(tensors[name].clone()) if callable(tensor) else tensor
    save_file(tensors, path, metadata={"format": "pt"})
    if (to / "llmkern.json").is_file():
        meta = json.loads((to / "llmkern.json").read_text())
        meta["sha256"][path.name], meta["headers"][path.name] = digest(path), checkpoint_folder.header_digest(path)
        meta["seal"] = checkpoint_folder.seal(meta)
        (to / "llmkern.json").write_text(json.dumps(meta))
    return to


def set_at(*at, value):
    def change(tensor):
        tensor[at] = value
        return tensor

    return change


DOWN = "model.layers.1.mlp.down_proj"
NAN, INF = float("nan"), float("inf")
DAMAGE = [
    ("ours int4", {f"{DOWN}.weight_scale": set_at(3, 2, value=NAN)}, ["weight_scale' holds 1 values that are not fin"]),
    ("ours int4", {f"{DOWN}.weight_scale": set_at(3, 2, value=INF)}, ["at row 3, group 2"]),
    ("ours int4", {f"{DOWN}.weight_scale": set_at(3, 2, value=0.0)}, [f"layer {DOWN}: ", "got 0.0 at row 3, group 2"]),
    ("ours int4", {f"{DOWN}.weight_packed": lambda t: t[:, 1:].contiguous()}, [f"layer {DOWN}: ", "words must be"]),
    ("ours int4", {f"{DOWN}.weight_packed": None}, [f"layer {DOWN}", "missing tensor 'weight_packed'"]),
    ("ours int4", {"model.norm.weight": set_at(5, value=INF)}, ["'model.norm.weight' holds 1 values", "at [5]"]),
    ("ours int4", {"model.norm.weight": None}, ["lack", "model.norm.weight"]),
    ("ours int4", {"model.stray": torch.zeros(3)}, ["unknown tensors", "model.stray"]),
    ("ours 2:4", {f"{DOWN}.weight": set_at(4, slice(8, 12), value=1.0)}, ["not 2:4: row 4", "columns 8..11"]),
    ("ours 2:4 int4", {f"{DOWN}.weight_packed": set_at(0, 0, value=0)}, ["keep every value that is not 0"]),
    ("ours 2:4 int4", {f"{DOWN}.weight_packed": set_at(0, slice(None), value=0)}, ["keep every value that is not 0"]),
    ("gptq act-order", {f"{DOWN}.g_idx": set_at(7, value=6)}, [f"{DOWN}.g_idx' must be in [0, 5], got 6"]),
    ("gptq", {f"{DOWN}.scales": set_at(1, 1, value=-1.0)}, [f"{DOWN}.scales' must be finite and above 0, got -1.0"]),
    ("gptq", {f"{DOWN}.qweight": None}, [f"{DOWN}.qweight"]),
    ("awq", {f"{DOWN}.qzeros": None}, [f"{DOWN}.qzeros' is missing"]),
    ("ct", {f"{DOWN}.weight_zero_point": lambda t: t[:, 1:].contiguous()}, [f"{DOWN}.weight_zero_point' must be"]),
    ("dense", {"lm_head.weight": set_at(0, 0, value=NAN)}, ["'lm_head.weight' holds 1 values"]),
    ("dense", {f"{DOWN}.weight": None}, [f"no values for {DOWN}.weight"]),
    ("dense", {f"{DOWN}.weight": lambda t: t.T.contiguous()}, [f"{DOWN}.weight' must be [64, 96]", "got [96, 64]"]),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(DAMAGE)))
def test_verify_names_what_is_wrong(run, folders, tmp_path, case):  # noqa: F811
    kind, changes, parts = DAMAGE[case]
    folder = damaged(folders(kind), tmp_path / "bad", **changes)
    code, out, err = run("verify", folder, "--json")
    found = json.loads(out)
    assert code == 1
    for part in parts:
        assert any(part in problem for problem in found["problems"]), (part, found["problems"])
    assert found["error"].startswith(found["problems"][0])
    assert [line for line in err.splitlines() if "error:" in line] == [f"llmkern verify: error: {found['error']}"]
    code, out, _ = run("verify", folder)
    assert code == 1
    assert out.strip().endswith("not valid")


def test_verify_a_mixture_expert_by_expert(run, tmp_path):  # noqa: F811
    mixture = tiny.mixtral()
    llmkern.compress(mixture, "rtn-int4-g16", progress=False)
    llmkern.save(mixture, tmp_path / "good")
    found = json.loads(run("verify", tmp_path / "good", "--forward", "--json")[1])
    assert found["problems"] == []
    assert found["checks"]["layers"] == found["forward"]["layers"] == 2 * (4 + 4 * 2)
    scales = [
        name for name in load_file(tmp_path / "good" / "model.safetensors") if "experts.3" in name and "scale" in name
    ]
    folder = damaged(tmp_path / "good", tmp_path / "bad", **{scales[0]: set_at(0, 0, value=0.0)})
    found = json.loads(run("verify", folder, "--json")[1])
    assert any("experts.3" in problem and "got 0.0 at row" in problem for problem in found["problems"])


def test_verify_lists_every_problem(run, folders, tmp_path):  # noqa: F811
    bad = [f"model.layers.{at}.mlp.up_proj.weight_scale" for at in (0, 1)]
    folder = damaged(folders("ours int4"), tmp_path / "bad", **{name: set_at(0, 0, value=0.0) for name in bad})
    found = json.loads(run("verify", folder, "--json")[1])
    for at in (0, 1):
        assert any(f"verify: {folder}: layer model.layers.{at}.mlp.up_proj" in problem for problem in found["problems"])
    assert found["checks"]["layers"] == 14


def test_verify_lists_every_problem_of_others(run, folders, tmp_path):  # noqa: F811
    bad = [f"model.layers.{at}.mlp.up_proj.scales" for at in (0, 1)]
    folder = damaged(folders("gptq"), tmp_path / "bad", **{name: set_at(0, 0, value=0.0) for name in bad})
    problems = json.loads(run("verify", folder, "--json")[1])["problems"]
    assert [any(f"{name}' must be finite and above 0" in problem for problem in problems) for name in bad] == [True] * 2


def test_verify_checks_the_checksums(run, folders, tmp_path):  # noqa: F811
    meta = json.loads((folders("ours int4") / "llmkern.json").read_text())
    assert json.loads(run("verify", folders("ours int4"), "--json")[1])["checks"]["checksums"] == len(meta["sha256"])
    shutil.copytree(folders("ours int4"), tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8 + struct.unpack("<Q", data[:8])[0] + 40] ^= 1  # one bit of a tensor: a legal value, but another
    path.write_bytes(data)
    code, out, _ = run("verify", tmp_path / "bad", "--json")
    assert code == 1
    assert "model.safetensors was changed since it was saved" in json.loads(out)["error"]


def test_verify_compares_kernels_with_references(run, folders, monkeypatch):  # noqa: F811
    import dataclasses

    from llmkern._registry import OPS

    op = OPS["int4_linear"]
    wrong = dataclasses.replace(op.kernels[0], run=lambda *args: op.kernels[-1].run(*args) * 1.5, blocked="",
                                device="any", lacking=None, rejects=None, yields=None)  # fmt: skip
    monkeypatch.setattr(op, "kernels", [wrong, *op.kernels[1:]])
    monkeypatch.setattr(op, "_unconditional", None)
    code, out, _ = run("verify", folders("ours int4"), "--forward", "--json")
    assert code == 1
    assert "kernels and references differ by" in json.loads(out)["error"]


def test_verify_a_config_that_transformers_trips_over(run, folders, tmp_path):  # noqa: F811
    shutil.copytree(folders("dense"), tmp_path / "bad")
    path = tmp_path / "bad" / "config.json"
    path.write_text(path.read_text().replace('"float32"', '"floit32"'))
    code, out, _ = run("verify", tmp_path / "bad", "--json")
    assert code == 1
    assert "the model cannot be built: AttributeError: " in json.loads(out)["error"]


def changed(data, random, start):
    """A few bytes of a file other than they were."""
    data = bytearray(data)
    for at in torch.randint(start, len(data), (3,), generator=random).tolist():
        data[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=random))
    return data


@pytest.mark.parametrize("kind", ["ours 2:4 int4", "gptq act-order", "dense", "gguf"])
def test_verify_ends_in_a_verdict_whatever_is_in_the_files(folders, tmp_path, kind):
    """Bytes of headers, JSON files and tensors changed at random: valid, problems, or a plain error."""
    random = torch.Generator().manual_seed(0)
    source = folders(kind)
    folder = tmp_path / "m"
    if source.is_dir():
        shutil.copytree(source, folder)
    else:
        folder.mkdir()
        shutil.copy(source, folder / "m.gguf")
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".gguf"))
    verdicts = []
    for turn in range(40):
        path = files[turn % len(files)]
        before = path.read_bytes()
        header = 8 + struct.unpack("<Q", before[:8])[0] if path.suffix == ".safetensors" else len(before)
        path.write_bytes(changed(before[:header], random, 0) + before[header:])
        try:
            verdicts.append(len(verify(folder)["problems"]))
        except (ValueError, TypeError, OSError) as error:
            verdicts.append(str(error))
        path.write_bytes(before)
    assert any(verdicts)
    assert verify(folder)["problems"] == []


def test_verify_nothing(run, tmp_path):  # noqa: F811
    refused(run("verify", tmp_path / "no"), 1, "no such folder")
    refused(run("verify", tmp_path), 1, "no config.json")
    tiny_gguf.write(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:-64])
    code, out, _ = run("verify", tmp_path / "m.gguf", "--json")
    assert code == 1
    assert "the file is cut off" in json.loads(out)["error"]


def values(made):
    return {name: layer.unpack() for name, layer in made.named_modules() if isinstance(layer, PackedLinear)}


# (from, to, further arguments)
CONVERTED = [
    ("gptq", "compressed-tensors", ()), ("gptq", "gptq", ()), ("awq", "compressed-tensors", ()),
    ("ours int4", "gptq", ()), ("ours 2:4 int4", "compressed-tensors", ()), ("ct", "compressed-tensors", ()),
    ("ct", "dense", ()), ("gptq act-order", "dense", ()), ("ours bitmask", "dense", ("--dtype", "float32")),
    ("gguf", "dense", ()), ("dense", "dense", ()),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "format", "more"), CONVERTED, ids=[f"{a}-{b}" for a, b, _ in CONVERTED])
def test_convert_keeps_every_value(run, folders, tmp_path, kind, format, more):  # noqa: F811
    out = tmp_path / "out"
    code, text, err = run("convert", folders(kind), "--format", format, "--out", out, *more, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert (found["out"], found["format"], found["recipe"]) == (str(out), format, None)
    assert found["layers"] == (0 if kind in ("gguf", "dense") else 14)
    source, written = converting.open_source(folders(kind)), llmkern.load(out)
    for name, weight in values(source).items():
        module = written.get_submodule(name)
        got = module.unpack() if isinstance(module, PackedLinear) else module.weight.float()
        assert torch.equal(got, weight), name
    ids = tiny.token_ids(2)
    with torch.no_grad():
        torch.testing.assert_close(written(ids).logits, source(ids).logits, rtol=1e-3, atol=1e-3)
    config = json.loads((out / "config.json").read_text()).get("quantization_config", {})
    assert config.get("quant_method") == (None if format == "dense" else format)
    assert run("verify", out, "--json")[0] == 0


REFUSED = [
    ("gptq act-order", "compressed-tensors", (), 1, "its columns are in the order of their activations"),
    ("awq", "gptq", (), 1, None),
    ("ours asymmetric", "gptq", (), 1, "only symmetric codes"),
    ("ours int8", "dense", ("--dtype", "bfloat16"), 1, "are no values of bfloat16; --dtype float32 holds them"),
    ("ours 2:4", "gptq", (), 1, "Sparse24Weight"),
    ("dense", "compressed-tensors", (), 1, "no layer of it is packed"),
    ("dense", "gptq", ("--recipe", "gptq-int4-g32"), 2, "it needs calibration data; use llmkern compress"),
    ("dense", "gptq", ("--recipe", "nonsense"), 2, "recipe"),
    ("dense", "marlin", (), 2, "invalid choice: 'marlin'"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_convert_refuses_what_does_not_fit(run, folders, tmp_path, case):  # noqa: F811
    kind, format, more, wanted, part = REFUSED[case]
    result = run("convert", folders(kind), "--format", format, "--out", tmp_path / "out", *more)
    if part is None:  # AWQ with zero points that are all the middle is symmetric in fact
        assert result[0] == 0
        return
    refused(result, wanted, part)
    assert list(tmp_path.iterdir()) == []


def test_convert_by_a_recipe(run, folders, tmp_path):  # noqa: F811
    for kind in ("dense", "ours int8"):
        out = tmp_path / kind.replace(" ", "-")
        code, text, err = run(
            "convert",
            folders(kind),
            "--format",
            "compressed-tensors",
            "--recipe",
            "rtn-int4-g32",
            "--out",
            out,
            "--json",
        )
        assert code == 0, err
        assert json.loads(text)["recipe"] == "rtn-int4-g32"
        assert {layer.format for layer in llmkern.load(out).modules() if isinstance(layer, PackedLinear)} == {
            "Int4Weight"
        }
        assert json.loads((out / "llmkern.json").read_text())["recipe"]


def test_convert_reads_again_what_it_wrote(run, folders, tmp_path, monkeypatch):  # noqa: F811
    save = llmkern.save

    def careless(made, path, **more):
        layer = next(module for module in made.modules() if isinstance(module, PackedLinear))
        before = layer.scales[0, 0].clone()
        layer.scales[0, 0] *= 2
        folder = save(made, path, **more)
        layer.scales[0, 0] = before
        return folder

    monkeypatch.setattr(llmkern, "save", careless)
    command = ("convert", folders("ours int4"), "--format", "gptq", "--out", tmp_path / "out")
    refused(run(*command), 1, "model.layers.0.self_attn.q_proj was not written as it was")
    assert list(tmp_path.iterdir()) == []


def test_convert_touches_nothing_else(run, folders, tmp_path):  # noqa: F811
    source = tmp_path / "source"
    shutil.copytree(folders("ours int4"), source)
    refused(run("convert", source, "--format", "gptq", "--out", source), 2, "it is the folder that is read")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    refused(run("convert", source, "--format", "gptq", "--out", tmp_path / "mine"), 1, "not from llmkern")
    refused(run("convert", tmp_path / "no", "--format", "gptq", "--out", tmp_path / "o"), 1, "no config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "source"]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_eval_runs_others_folders_packed(run, model, corpus, tmp_path, method):  # noqa: F811
    ours = tmp_path / "ours"
    assert run("convert", model, "--format", "compressed-tensors", "--recipe", "rtn-int4-g16", "--out", ours)[0] == 0
    packed = llmkern.load(ours)
    for layer in packed.modules():
        if isinstance(layer, PackedLinear):
            layer.scales = layer.scales.half().float()  # as these formats store them
    llmkern.save(packed, ours, tokenizer=transformers.AutoTokenizer.from_pretrained(model))
    theirs = others.write(tmp_path / "theirs", packed, method)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, theirs)
    found = [json.loads(run("eval", folder, "--text", corpus, "--seqlen", 16, "--windows", 2, "--json")[1])
             for folder in (ours, theirs)]  # fmt: skip
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=1e-5)
    # Scales of 2 bytes there, of 4 here; dense weights would be 4 bytes each.
    assert found[1]["bytes"] < found[0]["bytes"]
