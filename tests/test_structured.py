"""plan_structured and apply_structured on tiny models of each layout."""

import copy
import dataclasses
import functools

import pytest
import tiny
import torch

import llmkern
from llmkern.prune import StructuredPlan, StructuredReport, apply_structured, plan_structured

plan = functools.partial(plan_structured, multiple_of=8, progress=False)
shrink = functools.partial(apply_structured, progress=False)
DAMP = 0.1


def qwen3():
    """Norms of queries and keys, biases of all four projections."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=12, attention_bias=True,
    )  # fmt: skip
    return tiny._build(transformers.Qwen3ForCausalLM, config)


def phi3():
    """One layer for gate and up, one for queries, keys and values."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Phi3Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return tiny._build(transformers.Phi3ForCausalLM, config)


def mha():
    return tiny.llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)


CASES = {
    "llama-mlp": (tiny.llama, {"mlp": 0.75}),
    "llama-kv": (tiny.llama, {"kv_groups": 1}),
    "llama-heads": (tiny.llama, {"heads": 2}),
    "llama-all": (lambda: tiny.llama(num_attention_heads=8), {"mlp": 40, "kv_groups": 1, "heads": 0.5}),
    "mha-heads": (mha, {"heads": 2, "mlp": 0.5}),
    "mha-groups": (mha, {"kv_groups": 0.5}),
    "qwen3": (qwen3, {"mlp": 0.5, "kv_groups": 2, "heads": 2}),
    "phi3": (phi3, {"mlp": 0.5, "kv_groups": 1}),
    "gemma3": (tiny.gemma3, {"mlp": 0.5, "heads": 0.5}),
    "gpt2": (tiny.gpt2, {"mlp": 0.5}),
    "opt": (tiny.opt, {"mlp": 0.5}),
    "bert": (tiny.bert, {"mlp": 0.5}),
    "mixtral": (tiny.mixtral, {"kv_groups": 1}),
}


def logits(model, ids=None):
    with torch.no_grad():
        return model(tiny.token_ids(seed=5) if ids is None else ids).logits


def units_of(found, part):
    """(block, features of the reader that stay) for the reader of "channels" or "heads"."""
    reader = found.channel_reader if part == "channels" else found.head_reader
    for block in found.blocks:
        yield f"{block.name}.{reader}", getattr(block, part)


def masked(model, found, head_dim):
    """A copy of the model in which what the plan removes is 0 where it is read."""
    model = copy.deepcopy(model)

    def keep(layer, args, mask):
        return (args[0] * mask, *args[1:])

    for part, size, reader in (("channels", 1, found.channel_reader), ("heads", head_dim, found.head_reader)):
        for name, units in units_of(found, part) if reader else ():
            layer = model.get_submodule(name)
            width = layer.weight.shape[0] if hasattr(layer, "nf") else layer.weight.shape[1]
            mask = torch.zeros(width // size, size)
            mask[list(units)] = 1
            layer.register_forward_pre_hook(functools.partial(keep, mask=mask.view(-1)))
    return model


@pytest.mark.parametrize("case", CASES)
def test_equals_the_masked_model_and_loads_in_its_stock_class(case, tmp_path):
    build, kept = CASES[case]
    model = build()
    before = copy.deepcopy(model.state_dict())
    found = plan(model, tiny.token_ids(), **kept)
    small = shrink(model, found, calibration=None if case == "gpt2" else tiny.token_ids(), restore="none")
    head_dim = getattr(model.config, "head_dim", None) or 16
    torch.testing.assert_close(logits(small), logits(masked(model, found, head_dim)), rtol=1e-3, atol=1e-3)
    restored = shrink(model, found, calibration=tiny.token_ids())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    restored.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(restored))
    assert {key: getattr(loaded.config, key) for key in found.config} == found.config


@pytest.mark.parametrize("case", CASES)
def test_restoration_is_the_least_squares_of_each_block(case):
    """In float64, on the inputs that the restored blocks before hand on; the attention first, then the MLP."""
    build, kept = CASES[case]
    model, ids = build(), tiny.token_ids(20)
    found = plan(model, ids, **kept)
    bare = shrink(model, found, restore="none", calibration=ids)
    small = shrink(model, found, calibration=ids)
    parts = [("heads", found.head_reader), ("channels", found.channel_reader)]
    parts = [(what, reader) for what, reader in parts if reader]
    for at, block in enumerate(found.blocks):
        dense, restored = model.get_submodule(block.name), small.get_submodule(block.name)
        args, kwargs = called(small, restored, ids)
        for _, reader in parts:
            wanted = watched(dense, reader, args, kwargs)[1]
            layer, start = restored.get_submodule(reader), bare.get_submodule(f"{block.name}.{reader}")
            # Layers before this one are restored, those after it do not matter to what it reads.
            x = watched(restored, reader, args, kwargs)[0]
            weight = oriented(start)
            missing = wanted - x @ weight.T - (start.bias.double() if start.bias is not None else 0)
            means = (x.mean(0), missing.mean(0)) if start.bias is not None else (0, 0)
            xc, ec = x - means[0], missing - means[1]
            h = xc.T @ xc
            h += DAMP * h.diagonal().mean() * torch.eye(len(h))
            step = torch.linalg.solve(h, xc.T @ ec).T
            scale = step.detach().abs().max().item()
            assert scale > 0.01, at
            torch.testing.assert_close(oriented(layer) - weight, step, rtol=1e-2, atol=2e-3 * scale)
            if start.bias is not None:
                wanted_bias = start.bias.double() + means[1] - step @ means[0]
                torch.testing.assert_close(layer.bias.double(), wanted_bias, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kept", [{}, {"mlp": 0.5}, {"heads": 2, "mlp": 0.75}])
def test_the_block_before_makes_up_for_removed_ones(kept):
    model, ids = tiny.llama(num_hidden_layers=5), tiny.token_ids(20)
    found = keeping(plan(model, ids, blocks=3, **kept), [0, 2, 3])
    bare = shrink(model, found, restore="none")
    report = StructuredReport()
    small = shrink(model, found, calibration=ids, report=report)
    assert [row.blocks for row in report.rows if row.blocks] == [("model.layers.1",), ("model.layers.4",)]
    assert report.blocks_removed == ["model.layers.1", "model.layers.4"]
    assert not report.notes
    for at, chain in ((0, [0, 1]), (2, [3, 4])):
        restored, blocks = small.model.layers[at], [model.model.layers[k] for k in chain]
        args, kwargs = called(small, restored, ids)
        with torch.no_grad():
            wanted = args[0]
            for block in blocks:
                wanted = block(wanted, *args[1:], **kwargs)
            got = restored(*args, **kwargs)
        x, out = watched(restored, "mlp.down_proj", args, kwargs)
        left = bare.model.layers[at].mlp.down_proj.weight.detach().double()
        # What it lacked before its own correction.
        missing = (wanted - got).double().reshape(-1, 64) + out - x @ left.T
        h = x.T @ x
        h += DAMP * h.diagonal().mean() * torch.eye(len(h))
        step = torch.linalg.solve(h, x.T @ missing).T
        scale = step.abs().max().item()
        assert scale > 0.01
        change = restored.mlp.down_proj.weight.detach().double() - left
        torch.testing.assert_close(change, step, rtol=1e-2, atol=2e-3 * scale)
    untouched = small.model.layers[1].mlp.down_proj.weight
    assert torch.equal(untouched, model.model.layers[2].mlp.down_proj.weight) == (not kept)


def keeping(found, indices):
    """A plan with these blocks in the place of those that it keeps."""
    blocks = [dataclasses.replace(b, name=f"model.layers.{k}") for b, k in zip(found.blocks, indices, strict=True)]
    return dataclasses.replace(found, blocks=tuple(blocks))


@pytest.mark.parametrize(
    ("build", "indices", "reason"),
    [
        (lambda: tiny.llama(num_hidden_layers=4), [1, 2, 3], "model.layers.0: no block stands before"),
        (lambda: tiny.mixtral(num_hidden_layers=4), [0, 1, 2], "model.layers.3: model.layers.2: its MLP is a mixture"),
        (tiny.gemma3, [0, 2, 3], "model.layers.1: model.layers.0: what mlp.down_proj gives is not simply added"),
    ],
)
def test_removed_blocks_that_nothing_makes_up_for(build, indices, reason):
    model, ids = build(), tiny.token_ids()
    found = keeping(plan(model, ids, blocks=3), indices)
    if "layer_types" in found.config:
        types = [model.config.layer_types[k] for k in indices]
        found = dataclasses.replace(found, config={**found.config, "layer_types": types})
    report = StructuredReport()
    with pytest.warns(UserWarning, match=f"apply_structured: nothing makes up for {reason}"):
        small = shrink(model, found, calibration=ids, report=report)
    assert len(report.notes) == 1
    assert not report.rows
    assert torch.equal(logits(small), logits(shrink(model, found, restore="none")))


def called(model, block, ids):
    """What the model calls the block with."""
    seen = []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    model.config.use_cache = False
    logits(model, ids)
    hook.remove()
    ((args, kwargs),) = seen
    return args, kwargs


def oriented(layer):
    return (layer.weight.T if hasattr(layer, "nf") else layer.weight).detach().double()


def watched(block, reader, args, kwargs):
    """float64 [T, K] and [T, N]: what a layer of the block reads and gives."""
    seen = []
    hook = block.get_submodule(reader).register_forward_hook(lambda _, a, out: seen.append((a[0], out)))
    with torch.no_grad():
        block(*args, **kwargs)
    hook.remove()
    ((x, out),) = seen
    return x.double().reshape(-1, x.shape[-1]), out.double().reshape(-1, out.shape[-1])


@pytest.mark.parametrize("method", ["obs", "wanda", "magnitude"])
def test_restoration_helps(method):
    model, ids = tiny.llama(), tiny.token_ids(24)
    found = plan(model, ids, mlp=0.75, heads=2, method=method)
    report = StructuredReport()
    small = shrink(model, found, calibration=ids, report=report)
    bare = shrink(model, found, restore="none", calibration=ids)
    dense = logits(model)
    assert (logits(small) - dense).norm() < 0.8 * (logits(bare) - dense).norm()
    assert [row.layer for row in report.rows[:2]] == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    assert all(0 < row.error_after < row.error_before for row in report.rows)
    assert (report.rows[1].what, report.rows[1].kept, report.rows[1].total) == ("channels", 72, 96)
    assert report.parameters_after == sum(p.numel() for p in small.parameters()) < report.parameters_before
    assert report.to_dict()["rows"][0]["kept"] == 2


def test_obs_costs_less_than_magnitude():
    model, ids = tiny.llama(), tiny.token_ids(24)
    after = {}
    for method in ("obs", "magnitude"):
        report = StructuredReport()
        shrink(model, plan(model, ids, mlp=0.5, method=method), calibration=ids, report=report)
        after[method] = report.rows[0].error_after
    assert after["obs"] < after["magnitude"]


def test_key_value_groups_go_with_their_query_heads():
    model = tiny.llama(num_attention_heads=8, num_key_value_heads=4, hidden_size=48)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight[:, 12:24] = 0  # heads 2 and 3: group 1
            block.self_attn.o_proj.weight[:, 30:36] = 0  # head 5: of group 2
    found = plan(model, tiny.token_ids(), kv_groups=3, heads=3)
    for block in found.blocks:
        assert [head // 2 for head in block.heads] == [0, 2, 3]
        assert 4 in block.heads
    assert found.config == {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6}


def test_blocks_by_influence():
    model = tiny.llama(num_hidden_layers=4)
    with torch.no_grad():
        for layer in (model.model.layers[1].mlp.down_proj, model.model.layers[1].self_attn.o_proj):
            layer.weight.mul_(1e-3)
    ids = tiny.token_ids()
    found = plan(model, ids, blocks=3)
    assert found.indices() == (0, 2, 3)
    states = []
    hooks = [b.register_forward_pre_hook(lambda _, a: states.append(a[0].double())) for b in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, a: states.append(a[0].double())))
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    for k, influence in enumerate(found.influence):
        wanted = 1 - torch.cosine_similarity(states[k], states[k + 1], dim=-1).mean()
        assert influence == pytest.approx(float(wanted), rel=1e-4, abs=1e-7)
    report = StructuredReport()
    small = shrink(model, found, calibration=ids, report=report)
    assert report.blocks_removed == ["model.layers.1"]
    assert len(small.model.layers) == small.config.num_hidden_layers == 3
    assert plan(model, ids, blocks=0.5).indices() == plan(model, ids, blocks=2).indices()


def test_magnitude_needs_no_data():
    model = tiny.llama()
    found = plan(model, mlp=0.5, kv_groups=1, method="magnitude")
    assert found.blocks == plan(model, tiny.token_ids(), mlp=0.5, kv_groups=1, method="magnitude").blocks
    block = model.model.layers[1]
    norms = block.mlp.down_proj.weight.square().sum(0) + sum(
        layer.weight.square().sum(1) for layer in (block.mlp.gate_proj, block.mlp.up_proj)
    )
    assert list(found.blocks[1].channels) == sorted(norms.argsort(descending=True)[:48].tolist())
    attention, rows = block.self_attn, slice(0, 32)
    first = attention.o_proj.weight[:, rows].square().sum() + attention.q_proj.weight[rows].square().sum()
    second = attention.o_proj.weight[:, 32:].square().sum() + attention.q_proj.weight[32:].square().sum()
    first += sum(layer.weight[:16].square().sum() for layer in (attention.k_proj, attention.v_proj))
    second += sum(layer.weight[16:].square().sum() for layer in (attention.k_proj, attention.v_proj))
    assert found.blocks[1].heads == ((0, 1) if first > second else (2, 3))


def test_padding_does_not_count():
    model = tiny.llama()
    ids, mask = tiny.token_ids(8), torch.ones(8, tiny.LENGTH, dtype=torch.int64)
    mask[:, 15:] = 0
    results = []
    for fill in (0, 50):
        batches = [{"input_ids": torch.where(mask.bool(), ids, fill), "attention_mask": mask}]
        found = plan(model, batches, mlp=0.5, blocks=2)
        results.append((found, shrink(model, found, calibration=batches).state_dict()))
    assert results[0][0].blocks == results[1][0].blocks
    assert results[0][0].influence == pytest.approx(results[1][0].influence, rel=1e-5)
    for key, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny.llama().to(dtype).train()
    found = plan(model, tiny.token_ids(12), mlp=0.75, heads=0.5)
    small = shrink(model, found, calibration=tiny.token_ids(12))
    assert {value.dtype for value in small.parameters()} == {dtype}
    assert small.training
    assert model.training
    bare = shrink(model, found, restore="none", calibration=tiny.token_ids(12)).eval()
    dense = logits(model.eval()).float()
    assert (logits(small.eval()).float() - dense).norm() < (logits(bare).float() - dense).norm()


def test_states_on_disk_change_nothing():
    model, ids = tiny.llama(), tiny.token_ids()
    found = plan(model, ids, mlp=0.5)
    assert plan(model, ids, mlp=0.5, activation_budget=0) == found
    a, b = (shrink(model, found, calibration=ids, activation_budget=budget) for budget in (None, 0))
    assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def test_progress_is_shown(capsys):
    found = plan_structured(tiny.llama(), tiny.token_ids(), mlp=0.5, multiple_of=8)
    apply_structured(tiny.llama(), found, calibration=tiny.token_ids())
    shown = capsys.readouterr().err
    assert "plan_structured obs 3/3" in shown
    assert "apply_structured 3/3" in shown


def test_the_smaller_model_trains_and_is_compressed_further():
    model, ids = tiny.llama(tie_word_embeddings=True), tiny.token_ids()
    small = shrink(model, plan(model, ids, mlp=0.5, blocks=2), calibration=ids)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    small(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    report = llmkern.compress(small, "rtn-int8", progress=False)
    assert len(report.rows) == 14


def test_a_plan_survives_json(tmp_path):
    model = tiny.gemma3()
    found = plan(model, tiny.token_ids(), mlp=0.5, heads=2, blocks=3)
    found.to_json(tmp_path / "plan.json")
    loaded = StructuredPlan.load(tmp_path / "plan.json")
    assert loaded == found
    assert loaded.config["layer_types"] == [model.config.layer_types[k] for k in found.indices()]
    shrink(model, loaded, calibration=tiny.token_ids())
