"""The servers' plug-ins against stubs of the documented interfaces: loading by part and by rank, and refusals."""

import importlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import others
import pytest
import tiny
import torch
from safetensors.torch import load_file

import llmkern

STUBS = Path(__file__).parent / "stubs"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
BLOCK = "model.layers.0."
SERVERS = ("vllm", "sglang")


@pytest.fixture(params=SERVERS)
def server(request, monkeypatch):
    """A stub: (its name, its linear layers, the plug-in's config class)."""
    monkeypatch.syspath_prepend(str(STUBS))
    name = request.param
    plugin = importlib.import_module(f"llmkern.integrations.{name}")
    plugin.register()
    root = "vllm.model_executor" if name == "vllm" else "sglang.srt"
    quantization = importlib.import_module(f"{root}.layers.quantization")
    yield name, importlib.import_module(f"{root}.layers.linear"), quantization.get_quantization_config("llmkern")
    for module in [m for m in sys.modules if m.split(".")[0] in (*SERVERS, "parallel_linear")]:
        del sys.modules[module]


def unquantized(name):
    if name == "vllm":
        return importlib.import_module("vllm.model_executor.layers.linear").UnquantizedLinearMethod
    return importlib.import_module("sglang.srt.layers.quantization.unquant").UnquantizedLinearMethod


class Block:
    """The four linear layers of a Llama block as a server has them, on one rank."""

    def __init__(self, server, config, rank=0, size=1, dtype=torch.float32):
        name, linear, _ = server
        parallel = sys.modules["parallel_linear"]
        parallel.RANK, parallel.SIZE = rank, size
        config.packed_modules_mapping = FUSED
        common = {"params_dtype": dtype, "quant_config": config, "unquantized": unquantized(name), "bias": False}
        self.layers = {
            "self_attn.qkv_proj": linear.QKVParallelLinear(
                64, 128, prefix=f"{BLOCK}self_attn.qkv_proj", sizes=[64, 32, 32], **common
            ),
            "self_attn.o_proj": linear.RowParallelLinear(64, 64, prefix=f"{BLOCK}self_attn.o_proj", **common),
            "mlp.gate_up_proj": linear.MergedColumnParallelLinear(
                64, 192, prefix=f"{BLOCK}mlp.gate_up_proj", sizes=[96, 96], **common
            ),
            "mlp.down_proj": linear.RowParallelLinear(96, 64, prefix=f"{BLOCK}mlp.down_proj", **common),
        }

    def load(self, tensors):
        """As a server's `load_weights` does: each tensor of the file by its name, fused parts with their shard id."""
        ids = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
        homes = {part: whole for whole, parts in FUSED.items() for part in parts}
        for name, tensor in tensors.items():
            layer, _, leaf = name.removeprefix(BLOCK).rpartition(".")
            home, _, last = layer.rpartition(".")
            target = self.layers.get(f"{home}.{homes.get(last, last)}")
            if not name.startswith(BLOCK) or target is None:
                continue
            parameter = dict(target.named_parameters())[leaf]
            parameter.weight_loader(parameter, tensor, *([ids[last]] if last in ids else []))
        return self

    def finish(self):
        for layer in self.layers.values():
            layer.quant_method.process_weights_after_loading(layer)
        return self

    def __call__(self, name, x):
        return self.layers[name](x)[0]


def saved(folder, recipe, format="compressed-tensors", **changes):
    """A compressed tiny Llama: (quantization_config or llmkern.json, tensors of the file, the model)."""
    model = tiny.llama(num_hidden_layers=1, **changes)
    llmkern.compress(model, recipe, tiny.token_ids(), progress=False)
    llmkern.save(model, folder, format=format)
    return read(folder)


def read(folder):
    config = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if config is None:
        config = json.loads((folder / "llmkern.json").read_text())
    return config, load_file(folder / "model.safetensors"), llmkern.load(folder)


def wanted(model, name, x):
    block = model.model.layers[0]
    home, _, last = name.rpartition(".")
    return torch.cat([block.get_submodule(f"{home}.{part}")(x) for part in FUSED.get(last, [last])], -1)


def check(server, config, tensors, model, sizes=(1, 2), tolerance=1e-5):
    for size in sizes:
        blocks = [
            Block(server, server[2].from_config(config), rank, size).load(tensors).finish() for rank in range(size)
        ]
        for name in blocks[0].layers:
            x = torch.randn(3, 96 if "down" in name else 64, generator=torch.Generator().manual_seed(1))
            reference = wanted(model, name, x)
            if name.endswith(("o_proj", "down_proj")):
                parts = x.chunk(size, -1)
                got = sum(block(name, part) for block, part in zip(blocks, parts, strict=True))
            else:
                parts = [block(name, x) for block in blocks]
                rows = [r // size for r in blocks[0].layers[name].output_sizes]
                got = torch.cat([piece for pieces in zip(*(p.split(rows, -1) for p in parts), strict=True)
                                 for piece in pieces], -1)  # fmt: skip
            torch.testing.assert_close(got, reference, rtol=tolerance, atol=tolerance * float(reference.abs().max()))
    return blocks


RECIPES = {
    "int4": ("rtn-int4-g16", "Int4Weight"),
    "int4 per row": ("gptq-int4", "Int4Weight"),
    "int8": ("rtn-int8", "Int8Weight"),
    "w8a8": ("w8a8", "Int8Weight"),
    "2:4 int4": ("sparsegpt-2:4-int4-g16", "Sparse24Int4Weight"),
    "2:4": ("magnitude-2:4", "Sparse24Weight"),
    "half zeros": ("magnitude-0.5", "BitmaskWeight"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_our_folders_by_part_and_by_rank(server, tmp_path, case):
    recipe, kind = RECIPES[case]
    config, tensors, model = saved(tmp_path / "out", recipe)
    # Activations are quantized per token over the columns of a rank, so a row-parallel sum differs by their rounding.
    blocks = check(server, config, tensors, model, tolerance=2e-2 if case == "w8a8" else 1e-5)
    for layer in blocks[0].layers.values():
        assert layer.llmkern.format == kind
        assert [name for name, _ in layer.named_parameters()] == []  # what was loaded is not held twice


def test_asymmetric_codes(server, tmp_path):
    recipe = llmkern.Recipe(method="rtn", bits=4, group_size=16, symmetric=False)
    config, tensors, model = saved(tmp_path / "out", recipe)
    assert f"{BLOCK}mlp.up_proj.weight_zero_point" in tensors
    check(server, config, tensors, model)


def another(tmp_path, method, orders=None):
    """Our int4 layers as another's: (quantization_config, tensors, the model)."""
    recipe = llmkern.Recipe(method="rtn", bits=4, group_size=others.GROUP, scale_dtype="float16")
    _, _, model = saved(tmp_path / "out", recipe)
    return {"quant_method": method, **others.CONFIGS[method]}, others.tensors_of(model, method, orders), model


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_others_checkpoints(server, tmp_path, method):
    check(server, *another(tmp_path, method))


def test_gptq_in_the_order_of_activations(server, tmp_path):
    order = {64: torch.randperm(64), 96: torch.randperm(96)}
    config, tensors, model = another(tmp_path, "gptq", order)
    config = {**config, "desc_act": True}
    block = Block(server, server[2].from_config(config)).load(tensors).finish()
    for name in block.layers:
        x = torch.randn(3, 96 if "down" in name else 64, generator=torch.Generator().manual_seed(1))
        reference = wanted(model, name, x)
        torch.testing.assert_close(block(name, x[:, order[x.shape[1]]]), reference, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"o_proj: groups in the order of activations cannot be split"):
        Block(server, server[2].from_config(config), 0, 2)
    tensors[f"{BLOCK}self_attn.k_proj.g_idx"] = tensors[f"{BLOCK}self_attn.q_proj.g_idx"].flip(0)
    with pytest.raises(ValueError, match=r"qkv_proj: g_idx differs between the parts"):
        Block(server, server[2].from_config(config)).load(tensors)
    tensors[f"{BLOCK}mlp.down_proj.g_idx"] = torch.full((96,), 6, dtype=torch.int32)
    del tensors[f"{BLOCK}self_attn.k_proj.g_idx"]
    block = Block(server, server[2].from_config(config)).load(tensors)
    layer = block.layers["mlp.down_proj"]
    with pytest.raises(ValueError, match=r"mlp.down_proj: g_idx must be in \[0, 5\], got 6"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_dense_layer_stays_the_servers(server, tmp_path):
    recipe = llmkern.Recipe(method="rtn", bits=4, group_size=16, ignore=("re:.*o_proj", "lm_head"))
    config, tensors, model = saved(tmp_path / "out", recipe)
    block = Block(server, server[2].from_config(config)).load(tensors).finish()
    assert type(block.layers["self_attn.o_proj"].quant_method).__name__ == "UnquantizedLinearMethod"
    x = torch.randn(2, 64)
    torch.testing.assert_close(block("self_attn.o_proj", x), wanted(model, "self_attn.o_proj", x))


def test_fused_parts_must_be_stored_alike(server, tmp_path):
    recipe = llmkern.Recipe(method="rtn", bits=4, group_size=16, ignore=("re:.*k_proj", "lm_head"))
    config, _, _ = saved(tmp_path / "out", recipe)
    with pytest.raises(ValueError, match=r"qkv_proj: its parts are stored differently .*q_proj and .*k_proj"):
        Block(server, server[2].from_config(config))


def test_scales_keep_their_values(server, tmp_path):
    """fp32 scales of a model that is served in bf16: nothing is rounded on the way."""
    config, tensors, model = saved(tmp_path / "out", "rtn-int4-g16")
    block = Block(server, server[2].from_config(config), dtype=torch.bfloat16).load(tensors).finish()
    packed = block.layers["mlp.down_proj"].llmkern.packed
    assert torch.equal(packed.scales, model.model.layers[0].mlp.down_proj.packed.scales)
    tensors = {n: t.bfloat16() if n.endswith("scale") else t for n, t in tensors.items()}
    block = Block(server, server[2].from_config(config), dtype=torch.bfloat16).load(tensors).finish()
    assert block.layers["mlp.down_proj"].llmkern.scales.dtype == torch.bfloat16
    assert block("mlp.down_proj", torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("leaf", ["mlp.up_proj.weight_packed", "self_attn.o_proj.weight_scale"])
def test_a_missing_tensor_is_an_error_and_not_zeros(server, tmp_path, leaf):
    config, tensors, _ = saved(tmp_path / "out", "rtn-int4-g16")
    del tensors[BLOCK + leaf]
    block = Block(server, server[2].from_config(config)).load(tensors)
    with pytest.raises(ValueError, match=rf"the files lack {leaf.rpartition('.')[2]} \([01] of [12] parts\)"):
        block.finish()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_bad_scales_are_refused(server, tmp_path, value):
    config, tensors, _ = saved(tmp_path / "out", "rtn-int4-g16")
    tensors[f"{BLOCK}mlp.down_proj.weight_scale"][3, 2] = value
    block = Block(server, server[2].from_config(config)).load(tensors)
    with pytest.raises(ValueError, match=r"mlp.down_proj: weight_scale must be finite and above 0, got .* at \[3, 2\]"):
        block.finish()


def test_a_share_must_not_begin_inside_a_group(server, tmp_path):
    config, _, _ = saved(tmp_path / "out", "rtn-int4-g32")
    with pytest.raises(ValueError, match=r"down_proj: 48 columns per rank are no whole groups of 32"):
        Block(server, server[2].from_config(config), 0, 2)


def kinds_of_layer(*names):
    kind = torch.nn.Module
    for name in names:
        kind = type(name, (kind,), {})
    return kind()


def test_what_is_not_linear(server, tmp_path):
    config = server[2].from_config(saved(tmp_path / "out", "rtn-int4-g16")[0])
    assert config.get_quant_method(kinds_of_layer("Attention"), "model.layers.0.self_attn.attn") is None
    assert config.get_quant_method(kinds_of_layer("VocabParallelEmbedding"), "model.embed_tokens") is None
    head = kinds_of_layer("VocabParallelEmbedding", "ParallelLMHead")
    assert config.get_quant_method(head, "lm_head") is None
    for kind in ("FusedMoE", "RoutedExperts"):
        with pytest.raises(NotImplementedError, match=f"a {kind} with packed weights is not served"):
            config.get_quant_method(kinds_of_layer(kind), "model.layers.0.mlp.experts")
    whole = server[2].from_config(saved(tmp_path / "o2", llmkern.Recipe(method="rtn", bits=8, ignore=()))[0])
    with pytest.raises(NotImplementedError, match="a ParallelLMHead with packed weights"):
        whole.get_quant_method(head, "lm_head")
    gptq = server[2].from_config({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True})
    assert gptq.get_quant_method(head, "lm_head") is None


def test_what_is_not_served(server):
    for config, why in [
        ({"quant_method": "fp8"}, "fp8"),
        ({"format_version": 1, "layers": {"a": {"class": "Int4Weight"}}}, "layer a is a 'Int4Weight'"),
    ]:
        with pytest.raises(ValueError, match=why):
            server[2].from_config(config)


def test_other_checkpoints_are_taken_over_only_by_name(server):
    override = server[2].override_quantization_method
    for method in ("gptq", "awq", "compressed-tensors", "compressed_tensors"):
        assert override({"quant_method": method}, "llmkern") == "llmkern"
        assert override({"quant_method": method}, None) is None
        assert override({"quant_method": method}, method) is None
    assert override({"quant_method": "fp8"}, "llmkern") is None
    assert server[2].get_config_filenames() == ["llmkern.json"]
    config = server[2].from_config({"quant_method": "awq", "bits": 4, "group_size": 64})
    assert config.get_name() == "llmkern"
    assert config.get_min_capability() == 80
    assert torch.bfloat16 in config.get_supported_act_dtypes()


def test_headers_tell_which_layers_of_gptq_are_dense(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(STUBS))
    from llmkern.integrations import serving

    model = tiny.llama(num_hidden_layers=1)
    recipe = llmkern.Recipe(
        method="rtn", bits=4, group_size=32, scale_dtype="float16", ignore=("re:.*mlp.*", "lm_head")
    )
    llmkern.compress(model, recipe, progress=False)
    llmkern.save(model, tmp_path / "out", format="gptq")
    formats = serving.Formats(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    assert formats.of(f"{BLOCK}mlp.down_proj", FUSED) is not None
    formats.look_at(tmp_path / "out")
    assert formats.of(f"{BLOCK}mlp.down_proj", FUSED) is None
    assert formats.of(f"{BLOCK}self_attn.qkv_proj", FUSED).bits == 4


def test_registering_twice_is_once(server):
    name = server[0]
    plugin = importlib.import_module(f"llmkern.integrations.{name}")
    plugin.register()
    if name == "vllm":
        methods = importlib.import_module("vllm.model_executor.layers.quantization").QUANTIZATION_METHODS
    else:
        methods = importlib.import_module("sglang.srt.server_args").QUANTIZATION_CHOICES
    assert list(methods).count("llmkern") == 1


@pytest.mark.parametrize("name", SERVERS)
def test_harmless_where_the_server_is_missing(name):
    code = (
        f"import sys; from llmkern.integrations.{name} import register; register(); assert '{name}' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_entry_points_name_what_is_there():
    points = Path(__file__).parents[1] / "pyproject.toml"
    tomllib = pytest.importorskip("tomllib")
    groups = tomllib.loads(points.read_text(encoding="utf-8"))["project"]["entry-points"]
    assert groups.keys() == {"vllm.general_plugins", "sglang.srt.plugins"}
    for group, entries in groups.items():
        for name, value in entries.items():
            assert callable(metadata.EntryPoint(name, value, group).load())
