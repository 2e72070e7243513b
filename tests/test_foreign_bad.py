"""Checkpoints that are broken or hostile: each ends in an error that names the file, the tensor, what was wanted and
what came; none in values that nobody wrote.
"""

import json
import re
import shutil

import pytest
import tiny
import torch
from foreign import (
    DYNAMIC,
    awq,
    awq_config,
    ct_config,
    gptq,
    gptq_config,
    int_quantized,
    make,
    marlin_24,
    mask_24,
    pack_quantized,
    sparse_24_bitmask,
    sparse_bitmask,
    write,
)
from safetensors.torch import load_file, save_file

import llmkern
from llmkern.checkpoints import describe, parse

pytest.importorskip("transformers")
NAME = "model.layers.0.mlp.up_proj"  # [128, 64]
SPARSE = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["lm_head"]}


def encoders(generator):
    def of(change, symmetric=True, group=16, bits=4):
        def encode(name, n, k):
            made = make(n, k, bits, symmetric=symmetric, group=group)
            return change(made), made.dense()

        return encode

    def sparse(change, share=None):
        def encode(name, n, k):
            mask = mask_24(n, k, generator) if share is None else torch.rand(n, k, generator=generator) < share
            values = torch.randn(n, k, generator=generator) * mask
            return change(values, mask), values

        return encode

    def marlin(name, n, k):
        made = make(n, k, 4, symmetric=True)
        made.u = torch.where(mask_24(n, k, generator), made.u, 8)
        return marlin_24(made.u - 8, made.s, 4, None), made.dense()

    method = {"quant_method": "compressed-tensors"}
    return {
        "gptq": (of(gptq, symmetric=False), gptq_config(4, 16, sym=False)),
        "gptq_sym": (of(gptq), gptq_config(4, 16)),
        "awq": (of(awq, symmetric=False), awq_config(16)),
        "pack": (
            of(lambda made: pack_quantized(made, symmetric=False, index=True), symmetric=False),
            ct_config("pack-quantized", 4, 16, symmetric=False),
        ),
        "int": (of(int_quantized, group=None, bits=8), ct_config("int-quantized", 8, None, activations=DYNAMIC)),
        "sparse24": (sparse(sparse_24_bitmask), {**method, "sparsity_config": SPARSE}),
        "bitmask": (
            sparse(sparse_bitmask, 0.3), {**method, "sparsity_config": {**SPARSE, "format": "sparse-bitmask"}}
        ),
        "marlin": (marlin, ct_config("marlin-24", 4, None)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One good folder of each format, which loads."""
    generator, root = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("foreign")
    model = tiny.llama(num_hidden_layers=1, num_key_value_heads=4, intermediate_size=128)
    for kind, (encode, quantization) in encoders(generator).items():
        (root / kind).mkdir()
        chosen = lambda name: name.endswith("_proj")  # noqa: E731
        write(root / kind, model, encode, quantization, chosen)
        llmkern.load(root / kind / "packed")
        describe(root / kind / "packed")
    return root


def put(leaf, change):
    """Change one tensor of one layer; a tensor to put there, None to leave it out, or a function of the old one."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        key = f"{NAME}.{leaf}"
        new = change(tensors[key].clone()) if callable(change) else change
        tensors[key] = new
        save_file({k: t.contiguous() for k, t in tensors.items() if t is not None}, folder / "model.safetensors")

    return damage


def at(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


def quantization(**changes):
    return config(lambda own: own["quantization_config"].update(changes))


def config(change):
    def damage(folder):
        own = json.loads((folder / "config.json").read_text())
        change(own)
        (folder / "config.json").write_text(json.dumps(own))

    return damage


def weights(**changes):
    return config(lambda own: own["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes))


def group_0(**changes):
    return config(lambda own: own["quantization_config"]["config_groups"]["group_0"].update(changes))


def sharded(change):
    """Two files and an index, which `change` damages: (weight_map, folder)."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, index = sorted(tensors), {}
        for number in (1, 2):
            own = names[number - 1 :: 2]
            save_file({name: tensors[name] for name in own}, folder / f"model-{number}.safetensors")
            index |= dict.fromkeys(own, f"model-{number}.safetensors")
        change(index, folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    return damage


def raw(change):
    def damage(folder):
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return damage


def header(change):
    """Change the JSON header of the file, and leave the rest."""

    def edit(data):
        length = int.from_bytes(data[:8], "little")
        found = json.loads(data[8 : 8 + length])
        change(found)
        text = json.dumps(found).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return raw(edit)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


FILE = "model.safetensors"
# Name -> (folder, damage, what the error must say).
TENSORS = {
    "gptq: no qweight": ("gptq", put("qweight", None), (FILE, f"'{NAME}.qweight' is missing", "qzeros, scales")),
    "gptq: no scales": ("gptq", put("scales", None), (FILE, f"'{NAME}.scales' is missing")),
    "gptq: no qzeros": ("gptq", put("qzeros", None), (FILE, f"'{NAME}.qzeros' is missing")),
    "gptq: narrow": ("gptq", put("qweight", lambda t: t[:, :64]), (f"{NAME}.qweight' must be [8, 128], got [8, 64]",)),
    "gptq: flat": ("gptq", put("qweight", lambda t: t.flatten()), ("must be [8, 128], got [1024]",)),
    "gptq: dtype": ("gptq", put("qweight", lambda t: t.long()), (f"{NAME}.qweight' must be int32, got int64",)),
    "gptq: float zeros": ("gptq", put("qzeros", lambda t: t.float()), (f"{NAME}.qzeros' must be int32, got float32",)),
    "gptq: groups": ("gptq", put("scales", lambda t: t[:3]), (f"{NAME}.scales' must be [4, 128], got [3, 128]",)),
    "gptq: nan": ("gptq", put("scales", at((1, 5), float("nan"))), (f"{NAME}.scales'", "finite", "got nan at [1, 5]")),
    "gptq: inf": ("gptq", put("scales", at((3, 0), float("inf"))), (f"{NAME}.scales'", "got inf at [3, 0]")),
    "gptq: zero": ("gptq", put("scales", at((0, 0), 0)), (f"{NAME}.scales'", "above 0, got 0.0 at [0, 0]")),
    "gptq: negative": ("gptq", put("scales", at((2, 2), -1)), (f"{NAME}.scales'", "above 0, got -1.0 at [2, 2]")),
    "gptq: index high": ("gptq", put("g_idx", at(7, 4)), (FILE, f"{NAME}.g_idx' must be in [0, 3], got 4 at [7]")),
    "gptq: index low": ("gptq", put("g_idx", at(0, -1)), (f"{NAME}.g_idx' must be in [0, 3], got -1 at [0]",)),
    "gptq: index huge": ("gptq", put("g_idx", at(63, 2**31 - 1)), ("got 2147483647 at [63]",)),
    "gptq: index short": ("gptq", put("g_idx", lambda t: t[:63]), (f"{NAME}.g_idx' must be [64], got [63]",)),
    "gptq: index float": ("gptq", put("g_idx", lambda t: t.float()), (f"{NAME}.g_idx' must be int32 or int64",)),
    "gptq: uneven": ("gptq", put("g_idx", at(0, 1)), (f"{NAME}.g_idx' must give group 0 16 columns, got 15",)),
    "gptq: not symmetric": ("gptq_sym", put("qzeros", at((0, 0), 0)), (f"{NAME}.qzeros' must all be 8", "sym is true")),
    "gptq: v2 as v1": (
        "gptq_sym",
        put("qzeros", lambda t: torch.full_like(t, -2004318072)),
        (f"{NAME}.qzeros'", "got 9", "as gptq_v2 stores them: checkpoint_format is wrong"),
    ),
    "gptq: v1 as v2": (
        "gptq_sym", quantization(checkpoint_format="gptq_v2"), (".qzeros' must all be 8", "got 7", "as gptq stores")
    ),
    "gptq: bias": ("gptq", put("bias", torch.eye(128)[5]), (f"{NAME} has a bias only in the files",)),
    "gptq: extra": ("gptq", put("weight_scale", torch.ones(128, 1)), (f"{NAME}.weight_scale' is not a tensor",)),
    "gptq: also dense": ("gptq", put("weight", torch.ones(128, 64)), (f"{NAME}.weight' is not a tensor of this",)),
    "awq: no qzeros": ("awq", put("qzeros", None), (FILE, f"'{NAME}.qzeros' is missing")),
    "awq: shape": ("awq", put("qweight", lambda t: t[:, :8]), (f"{NAME}.qweight' must be [64, 16], got [64, 8]",)),
    "awq: g_idx": ("awq", put("g_idx", torch.arange(64)), (f"{NAME}.g_idx' is not a tensor of this layout",)),
    "awq: symmetric": ("awq", quantization(zero_point=False), (".qzeros' must all be 8, since zero_point is false",)),
    "awq: nan": ("awq", put("scales", at((0, 3), float("nan"))), (f"{NAME}.scales'", "got nan at [0, 3]")),
    "pack: no scale": ("pack", put("weight_scale", None), (f"'{NAME}.weight_scale' is missing",)),
    "pack: no shape": ("pack", put("weight_shape", None), (f"'{NAME}.weight_shape' is missing",)),
    "pack: shape": ("pack", put("weight_shape", torch.tensor([128, 65])), ("must be [128, 64]", "got [128, 65]")),
    "pack: shape swapped": ("pack", put("weight_shape", torch.tensor([64, 128])), ("got [64, 128]",)),
    "pack: words": ("pack", put("weight_packed", lambda t: t[:, :7]), ("must be [128, 8], got [128, 7]",)),
    "pack: rows": ("pack", put("weight_packed", lambda t: t[:64]), ("must be [128, 8], got [64, 8]",)),
    "pack: no zeros": ("pack", put("weight_zero_point", None), (f"'{NAME}.weight_zero_point' is missing",)),
    "pack: zeros": ("pack", put("weight_zero_point", lambda t: t[:15]), ("must be [16, 4] or [128, 4]",)),
    "pack: index": ("pack", put("weight_g_idx", at(5, 99)), ("weight_g_idx' must be in [0, 3], got 99 at [5]",)),
    "pack: symmetric": ("pack", weights(symmetric=True), ("weight_zero_point' must be 0 everywhere",)),
    "pack: bits": ("pack", weights(num_bits=8), (f"{FILE}: tensor", ".weight_packed' must be", "got")),
    "pack: groups": ("pack", weights(group_size=32), (".weight_scale' must be", "got")),
    "int: range": ("int", weights(num_bits=4), (".weight' must be in [-8, 7], got",)),
    "int: zero": ("int", put("weight_scale", lambda t: t * 0), (f"{NAME}.weight_scale'", "got 0.0 at [0, 0]")),
    "int: float codes": ("int", put("weight", lambda t: t.float()), (f"{NAME}.weight' must be int8, got float32",)),
    "sparse24: three": ("sparse24", put("bitmask", at((3, 1), 0b01110011)), ("columns 12..15 of row 3, keeps 3",)),
    "sparse24: one": ("sparse24", put("bitmask", at((3, 1), 0b00010011)), ("columns 12..15 of row 3, keeps 1",)),
    "sparse24: values": ("sparse24", put("compressed", lambda t: t[:, :16]), ("must be [128, 32], got [128, 16]",)),
    "sparse24: nan": ("sparse24", put("compressed", at((2, 3), float("nan"))), ("must be finite, got nan at [2, 3]",)),
    "sparse24: shape": ("sparse24", put("shape", torch.tensor([64, 128])), ("must be [128, 64] as in the model",)),
    "bitmask: bits": ("bitmask", put("bitmask", at((0, 0), 255)), ("row_offsets' must be",)),
    "bitmask: offsets": ("bitmask", put("row_offsets", at(1, 10**6)), ("in row 1", "got 1000000")),
    "bitmask: values": ("bitmask", put("compressed", lambda t: t[:-1]), ("compressed' must hold", "as many bits")),
    "marlin: meta": ("marlin", put("meta", at((0, 0), 0)), ("meta' must keep two columns of each four, ascending",)),
    "marlin: scales": ("marlin", put("scale_packed", lambda t: t[:, :64]), ("must be [1, 128], got [1, 64]",)),
    "marlin: dtype": ("marlin", put("meta", lambda t: t.int()), ("meta' must be int16, got int32",)),
    "no norm": (
        "gptq",
        lambda folder: drop(folder, "model.norm.weight"),
        ("no values for model.norm.weight",),
    ),
    "no layer": (
        "gptq",
        lambda folder: [drop(folder, f"{NAME}.{leaf}") for leaf in ("qweight", "qzeros", "scales", "g_idx")],
        (f"no values for {NAME}.weight",),
    ),
    "stranger": ("gptq", lambda folder: add(folder, "model.extra"), (FILE, "no place for tensor 'model.extra'")),
    "strange layer": (
        "gptq",
        lambda folder: add(folder, "model.layers.9.mlp.up_proj.qweight"),
        (FILE, "'model.layers.9.mlp.up_proj.qweight' belongs to no layer of LlamaForCausalLM"),
    ),
    "codes of a norm": ("gptq", lambda folder: add(folder, "model.norm.qweight"), ("model.norm is a LlamaRMSNorm",)),
    "norm shape": ("gptq", lambda folder: add(folder, "model.norm.weight"), ("'model.norm.weight' must be [64]",)),
    "ignored": ("pack", quantization(ignore=[NAME]), (FILE, f"{NAME} is stored as codes", "leaves it dense")),
}  # fmt: skip
FILES = {
    "pickle": ("gptq", pickled, ("pytorch_model.bin", "runs code", "safetensors")),
    "nothing": ("gptq", lambda folder: (folder / FILE).unlink(), ("neither model.safetensors nor",)),
    "no config": ("gptq", lambda folder: (folder / "config.json").unlink(), ("no config.json",)),
    "config": ("gptq", lambda folder: (folder / "config.json").write_text("{"), ("config.json cannot be read",)),
    "config list": ("gptq", lambda folder: (folder / "config.json").write_text("[]"), ("must hold an object",)),
    "deep config": ("gptq", lambda f: (f / "config.json").write_text("[" * 10**5), ("config.json cannot be read",)),
    "index up": (
        "gptq",
        sharded(lambda index, folder: index.update({"x": "../packed/model-1.safetensors"})),
        ("model.safetensors.index.json", "'../packed/model-1.safetensors'"),
    ),
    "index root": ("gptq", sharded(lambda i, f: i.update({"x": "/etc/passwd"})), ("index.json", "'/etc/passwd'")),
    "index number": ("gptq", sharded(lambda i, f: i.update({"x": 3})), ("index.json",)),
    "index missing": ("gptq", sharded(lambda i, f: i.update({"x": "model-3.safetensors"})), ("model-3.safetensors",)),
    "index tensor": (
        "gptq",
        sharded(lambda i, f: i.update({"model.ghost": "model-1.safetensors"})),
        ("tensor 'model.ghost' is not in model-1.safetensors",),
    ),
    "in two": (
        "gptq",
        sharded(lambda i, f: shutil.copy(f / "model-1.safetensors", f / "model-2.safetensors")),
        ("model-2.safetensors", "is in model-1.safetensors as well"),
    ),
    "cut": ("gptq", raw(lambda data: data[:-7]), (FILE, "cannot be read")),
    "empty": ("gptq", raw(lambda data: b""), (FILE, "cannot be read")),
    "long header": ("gptq", raw(lambda data: (2**60).to_bytes(8, "little") + data[8:]), (FILE, "cannot be read")),
    "no JSON": ("gptq", raw(lambda data: data[:8] + b"x" + data[9:]), (FILE, "cannot be read")),
    "product": (
        "gptq",
        header(lambda found: found[f"{NAME}.qweight"].update(shape=[2**40, 2**40])),
        (FILE, "cannot be read"),
    ),
    "overlap": (
        "gptq",
        header(lambda found: found[f"{NAME}.qweight"].update(data_offsets=[0, 4096])),
        (FILE, "cannot be read"),
    ),
    "dtype": ("gptq", header(lambda found: found[f"{NAME}.qweight"].update(dtype="U32")), ("U32",)),
}  # fmt: skip
CONFIGS = {
    "method": ("gptq", quantization(quant_method="bitsandbytes"), ("quant_method must be one of", "'bitsandbytes'")),
    "no method": ("gptq", config(lambda own: own.update(quantization_config=None)), ("no quantization_config",)),
    "text": ("gptq", config(lambda own: own.update(quantization_config="x")), ("must be an object, got 'x'",)),
    "class": ("gptq", config(lambda own: own.update(architectures=["os"])), ("config.json", "'os'", "no model class")),
    "no class": ("gptq", config(lambda own: own.pop("architectures")), ("architectures name None",)),
    "gptq bits": ("gptq", quantization(bits=5), ("bits must be one of 2, 3, 4, 8, got 5",)),
    "gptq bits text": ("gptq", quantization(bits="4"), ("bits must be an int, got '4'",)),
    "gptq bits bool": ("gptq", quantization(bits=True), ("bits must be an int, got True",)),
    "gptq other bits": ("gptq", quantization(bits=8), (".qweight' must be [32, 64], got [16, 64]",)),
    "gptq group": ("gptq", quantization(group_size=0), ("group_size must be -1 or at least 1, got 0",)),
    "gptq group float": ("gptq", quantization(group_size=16.0), ("group_size must be an int, got 16.0",)),
    "gptq other group": ("gptq", quantization(group_size=32), (".qzeros' must be [4, 8], got [8, 8]",)),
    "gptq huge group": ("gptq", quantization(group_size=10**30), (".qzeros' must be [1, 8], got [8, 8]",)),
    "gptq format": ("gptq", quantization(checkpoint_format="marlin"), ("'gptq', 'gptq_v2', got 'marlin'",)),
    "gptq planar": ("gptq", quantization(checkpoint_format="gptq_p"), ("got 'gptq_p'",)),
    "gptq words": ("gptq", quantization(pack_dtype="int64"), ("pack_dtype must be one of", "got 'int64'")),
    "gptq marlin": ("gptq", quantization(is_marlin_format=True), ("is_marlin_format",)),
    "gptq adapter": ("gptq", quantization(adapter={"path": "x"}), ("adapter",)),
    "gptq dynamic": ("gptq", quantization(dynamic={"(a+)+$": {}}), ("exponential time",)),
    "gptq dynamic bits": ("gptq", quantization(dynamic={".*": {"bits": 7}}), ("got 7",)),
    "gptq dynamic off": ("gptq", quantization(dynamic={"-:.*up_proj": {}}), (NAME, "leaves it dense")),
    "awq bits": ("awq", quantization(bits=8), ("bits must be 4, got 8",)),
    "awq gemv": ("awq", quantization(version="GEMV"), ("'GEMV' is the layout of another kernel; only gemm is read",)),
    "awq version": ("awq", quantization(version="x"), ("must be 'gemm', got 'x'",)),
    "awq dense": ("awq", quantization(modules_to_not_convert=["up_proj"]), (NAME, "leaves it dense")),
    "awq list": ("awq", quantization(modules_to_not_convert="up_proj"), ("must be a list of names",)),
    "ct format": ("pack", group_0(format="zip"), ("group_0: format must be", "'zip'")),
    "ct float": ("pack", group_0(format="float-quantized"), ("'float-quantized' is not read: its weights are 8-bit",)),
    "ct type": ("pack", weights(type="float"), ("type 'float'",)),
    "ct bits": ("pack", weights(num_bits=9), ("num_bits must be in [2, 8], got 9",)),
    "ct strategy": ("pack", weights(strategy="block"), ("strategy must be one of", "'block'")),
    "ct order": ("pack", weights(actorder="x"), ("actorder must be one of", "'x'")),
    "ct group": ("pack", weights(group_size=None), ("group_size must be an int, got None",)),
    "ct dynamic": ("pack", weights(dynamic=True), ("dynamic must be one of",)),
    "ct status": ("pack", quantization(quantization_status="frozen"), ("quantization_status must be", "'frozen'")),
    "ct targets": ("pack", group_0(targets=["re:" + "(x|x*)*" * 9]), ("exponential time",)),
    "ct pattern": ("pack", group_0(targets=["re:("]), ("'(' is no pattern",)),
    "ct nowhere": ("pack", group_0(targets=["re:.*nothing"]), ("is stored as codes", "leaves it dense")),
    "ct no groups": ("pack", quantization(config_groups={}), ("needs config_groups",)),
    "ct group list": ("pack", quantization(config_groups=[1]), ("config_groups must be an object",)),
    "ct group text": ("pack", quantization(config_groups={"W4A16": ["Linear"]}), ("W4A16 must be an object",)),
    "ct transform": ("pack", quantization(transform_config={"a": 1}), ("transform_config",)),
    "ct marlin": ("marlin", weights(symmetric=False), ("marlin-24 holds symmetric codes",)),
    "ct sparse": ("sparse24", quantization(sparsity_config={"format": "zip"}), ("format must be one of", "'zip'")),
    "ct sparse pack": (
        "pack",
        quantization(sparsity_config=SPARSE),
        ("sparse-24-bitmask goes with symmetric 8-bit codes", "not with pack-quantized of 4 bits"),
    ),
    "two configs": (
        "gptq",
        lambda folder: (folder / "quantize_config.json").write_text('{"bits": 8}'),
        ("quantize_config.json says bits 8, config.json says 4",),
    ),
}  # fmt: skip


def drop(folder, key):
    tensors = load_file(folder / FILE)
    del tensors[key]
    save_file(tensors, folder / FILE)


def add(folder, key):
    save_file(load_file(folder / FILE) | {key: torch.ones(4, 4)}, folder / FILE)


@pytest.mark.parametrize("case", [*TENSORS, *FILES, *CONFIGS])
def test_a_bad_folder_is_refused(case, folders, tmp_path):
    kind, damage, parts = {**TENSORS, **FILES, **CONFIGS}[case]
    folder = tmp_path / "packed"
    shutil.copytree(folders / kind / "packed", folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        llmkern.load(folder)
    for part in parts:
        assert part in str(error.value)
    assert str(error.value).startswith("load: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["gptq: narrow", "gptq: no qzeros", "pack: words", "bitmask: values"])
def test_describe_refuses_what_headers_show(case, folders, tmp_path):
    kind, damage, _ = TENSORS[case]
    folder = tmp_path / "packed"
    shutil.copytree(folders / kind / "packed", folder)
    damage(folder)
    if case == "bitmask: values":  # how many there must be, only the mask says
        describe(folder)
        return
    with pytest.raises(ValueError, match=re.escape(FILE)):
        describe(folder)


def test_a_bias_of_zeros_that_the_model_lacks_is_left_out(folders, tmp_path):
    shutil.copytree(folders / "gptq" / "packed", tmp_path / "packed")
    put("bias", torch.zeros(128))(tmp_path / "packed")
    assert llmkern.load(tmp_path / "packed").get_submodule(NAME).bias is None


def test_an_expert_that_is_missing_is_named(tmp_path):
    def encode(name, n, k):
        made = make(n, k, 4, symmetric=True, group=16)
        return gptq(made), made.dense()

    write(tmp_path, tiny.mixtral(), encode, gptq_config(4, 16), lambda name: ".experts." in name)
    folder = tmp_path / "packed"
    tensors = load_file(folder / FILE)
    own = "model.layers.1.block_sparse_moe.experts.2"
    for leaf in ("w3", "w2"):
        left = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{own}.{leaf}.")}
        save_file(left, folder / FILE)
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.2\."):
            llmkern.load(folder)
    other = make(48, 64, 4, symmetric=True, group=16, order=True)
    tensors |= {f"{own}.w3.{leaf}": part for leaf, part in gptq(other).items()}
    save_file(tensors, folder / FILE)
    with pytest.raises(ValueError, match=r"experts\.2\.gate_up_proj: layers that become one must have one class"):
        llmkern.load(folder)


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|aa)+$", ".*.*.*.*.*.*x", "(.)\\1", "x" * 500, "(?(1)a|b)", "[", 7])
def test_patterns_that_could_run_for_ever_are_not_run(pattern):
    groups = {"group_0": {"targets": [f"re:{pattern}" if isinstance(pattern, str) else pattern], "weights": None}}
    with pytest.raises(ValueError, match=r"target must be text|exponential time|is no pattern|at most 400 characters"):
        parse({"quant_method": "compressed-tensors", "config_groups": groups})


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r"re:.*(q|k|v)_proj$", "model.layers.0.self_attn.q_proj"),
        (r"re:model\.layers\.\d+\.mlp\.(gate|up)_proj", "model.layers.12.mlp.up_proj"),
        (r"re:.*layers\.[0-9]+\..*", "model.layers.0.mlp.x"),
        (r"re:^(?!.*lm_head).*$", "model.x"),
        ("Linear", "anything"),
        ("model.x", "model.x"),
    ],
)
def test_patterns_that_are_used_are_run(pattern, name):
    quantization = ct_config("pack-quantized", 4, 16, targets=[pattern])
    assert parse(quantization).of(name) is not None
    assert parse({**quantization, "ignore": [name]}).of(name) is None
    assert (parse(quantization).of("other", "Embedding") is None) == (pattern != r"re:^(?!.*lm_head).*$")
