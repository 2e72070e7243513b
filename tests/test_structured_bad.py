"""What structured pruning refuses, each before any work starts."""

import copy
import dataclasses
import json

import pytest
import tiny
import torch

import llmkern
from llmkern.prune import KeptBlock, StructuredPlan, apply_structured, plan_structured, walk


@pytest.fixture
def no_work(monkeypatch):
    """A block that runs is an error of the test."""

    def fail(*args, **kwargs):
        raise AssertionError("work has started")

    monkeypatch.setattr(walk.blocks, "capture", fail)


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        ({}, ValueError, "nothing to remove"),
        ({"mlp": 0.0}, ValueError, r"share to keep, in \(0, 1\), got 0.0"),
        ({"mlp": 1.0}, ValueError, "share to keep"),
        ({"mlp": -0.5}, ValueError, "share to keep"),
        ({"mlp": float("nan")}, ValueError, "share to keep"),
        ({"mlp": 0}, ValueError, "at least 1 and fewer than all 96, got 0"),
        ({"mlp": 96}, ValueError, "fewer than all 96"),
        ({"mlp": 50}, ValueError, "multiple of 8, got 50"),
        ({"mlp": 0.99}, ValueError, "rounded up to a multiple of 8, keeps all"),
        ({"mlp": "half"}, TypeError, "a share .float. or a number .int., got 'half'"),
        ({"mlp": True}, TypeError, "got True"),
        ({"kv_groups": 2}, ValueError, "fewer than all 2"),
        ({"kv_groups": 0.6}, ValueError, "keeps all of them"),
        ({"heads": 3}, ValueError, "heads must be a multiple of 2, got 3"),
        ({"heads": 4}, ValueError, "fewer than all 4"),
        ({"blocks": 0}, ValueError, "blocks must keep at least 1"),
        ({"blocks": 3}, ValueError, "fewer than all 3"),
        ({"mlp": 0.5, "multiple_of": 0}, ValueError, "multiple_of must be"),
        ({"mlp": 0.5, "damp": 0.0}, ValueError, "damp must be > 0, got 0.0"),
        ({"mlp": 0.5, "method": "luck"}, ValueError, "one of obs, wanda, magnitude, got 'luck'"),
    ],
)
def test_sizes(kept, error, message, no_work):
    with pytest.raises(error, match=f"plan_structured: .*{message}"):
        plan_structured(tiny.llama(), tiny.token_ids(), **{"multiple_of": 8, **kept})


def test_rounding_goes_up():
    found = plan_structured(tiny.llama(), mlp=0.6, multiple_of=8, method="magnitude")
    assert len(found.blocks[0].channels) == 64  # 57.6
    assert len(plan_structured(tiny.llama(), mlp=0.5, multiple_of=16, method="magnitude").blocks[0].channels) == 48
    tenth = plan_structured(tiny.llama(intermediate_size=30), mlp=0.1, multiple_of=1, method="magnitude")
    assert len(tenth.blocks[0].channels) == 3


@pytest.mark.parametrize(
    ("build", "kept", "message"),
    [
        (tiny.mixtral, {"mlp": 0.5}, "mixture of experts"),
        (tiny.qwen3_moe, {"mlp": 0.5}, "mixture of experts"),
        (tiny.gpt2, {"heads": 2}, "no attention was recognised"),
        (tiny.bert, {"heads": 2}, "no attention was recognised"),
        (tiny.opt, {"heads": 2}, "its configuration cannot say what was removed"),
        (tiny.t5, {"mlp": 0.5}, "one list of repeated blocks, got encoder.block, decoder.block"),
        (tiny.albert, {"mlp": 0.5}, "num_hidden_layers is 3"),
        (lambda: tiny.llama(num_key_value_heads=4), {"heads": 2, "kv_groups": 2}, "give one of them"),
        (lambda: tiny.llama(num_key_value_heads=4), {"heads": 3}, "not a multiple of the number of attention heads"),
        (lambda: tiny.llama().to("meta"), {"mlp": 0.5}, "loaded whole"),
    ],
)
def test_models(build, kept, message, no_work):
    with pytest.raises(ValueError, match=f"plan_structured: .*{message}"):
        plan_structured(build(), tiny.token_ids(), multiple_of=8, **kept)


def test_heads_that_do_not_divide(no_work):
    model = tiny.llama()
    model.config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="4 heads do not divide into 3 key-value heads"):
        plan_structured(model, tiny.token_ids(), kv_groups=1)
    model.config.num_key_value_heads = 4
    with pytest.raises(ValueError, match="k_proj has 32 rows, wanted 64 for 4 heads, 4 key-value heads of 16"):
        plan_structured(model, tiny.token_ids(), kv_groups=1)


def test_widths_that_differ(no_work):
    model = tiny.llama()
    model.model.layers[1].mlp = copy.deepcopy(tiny.llama(intermediate_size=80).model.layers[0].mlp)
    with pytest.raises(ValueError, match=r"layers\.1 is laid out in another way than model\.layers\.0"):
        plan_structured(model, tiny.token_ids(), mlp=0.5, multiple_of=8)


def test_packed_layers_and_plain_modules(no_work):
    model = tiny.llama()
    llmkern.compress(model, "rtn-int8", progress=False)
    with pytest.raises(ValueError, match="packed layers"):
        plan_structured(model, tiny.token_ids(), mlp=0.5)
    with pytest.raises(TypeError, match="transformers model"):
        plan_structured(tiny.mlp(), tiny.token_ids(), mlp=0.5)


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (None, ValueError, "needs calibration"),
        ([], ValueError, "zero calibration tokens"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "zero calibration tokens"),
        (torch.zeros(2, 3), TypeError, "must be integers"),
        (torch.full((1, 4), 96), ValueError, r"in \[0, 96\)"),
    ],
)
def test_calibration(calibration, error, message, no_work):
    with pytest.raises(error, match=f"plan_structured: .*{message}"):
        plan_structured(tiny.llama(), calibration, mlp=0.5, multiple_of=8)
    found = plan_structured(tiny.llama(), mlp=0.5, multiple_of=8, method="magnitude")
    with pytest.raises(error, match=f"apply_structured: .*{message}"):
        apply_structured(tiny.llama(), found, calibration=calibration)


def test_activations_that_are_not_finite():
    model = tiny.llama()
    found = plan_structured(model, mlp=0.5, multiple_of=8, method="magnitude")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"plan_structured: the input of model\.layers\.1\.mlp\.down_proj"):
        plan_structured(model, tiny.token_ids(), mlp=0.5, multiple_of=8, progress=False)
    with pytest.raises(ValueError, match="for another model"):
        apply_structured(model, found, calibration=tiny.token_ids())


def magnitude_plan(model):
    return plan_structured(model, mlp=0.5, kv_groups=1, multiple_of=8, method="magnitude")


@pytest.mark.parametrize(
    "other",
    [
        lambda model: tiny.llama(intermediate_size=80),
        lambda model: tiny.llama(num_hidden_layers=4),
        lambda model: model.to(torch.bfloat16),
        lambda model: tiny.gemma3(),
    ],
)
def test_a_plan_for_another_model(other, no_work):
    model = tiny.llama()
    found = magnitude_plan(model)
    with pytest.raises(ValueError, match=r"apply_structured: the plan is for another model: .* there and .* here"):
        apply_structured(other(model), found, calibration=tiny.token_ids())


def test_a_plan_for_other_values(no_work):
    model = tiny.llama()
    found = magnitude_plan(model)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="another model: values is"):
        apply_structured(model, found, calibration=tiny.token_ids())


def test_arguments_of_apply(no_work):
    model = tiny.llama()
    found = magnitude_plan(model)
    with pytest.raises(TypeError, match="must be a StructuredPlan, got dict"):
        apply_structured(model, found.to_dict(), calibration=tiny.token_ids())
    with pytest.raises(ValueError, match='restore must be "ls" or "none", got \'LS\''):
        apply_structured(model, found, calibration=tiny.token_ids(), restore="LS")
    for damp in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="damp must be > 0"):
            apply_structured(model, found, calibration=tiny.token_ids(), damp=damp)


def edited(found, change):
    data = json.loads(found.to_json())
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format="1"), "format must be"),
        (lambda data: data.pop("format"), "format must be"),
        (lambda data: data.update(more=1), "unknown key more"),
        (lambda data: data.pop("blocks"), "KeyError"),
        (lambda data: data.update(blocks=[]), "no block stays"),
        (lambda data: data.update(blocks=3), "not a plan"),
        (lambda data: data.update(model="x"), "model must be an object"),
        (lambda data: data["blocks"][1].update(channels=[1, 2]), "as many channels"),
        (lambda data: data["blocks"][1].update(channels=None), "for all blocks"),
        (lambda data: data["blocks"][1].update(heads=[1.5, 2]), "whole numbers"),
        (lambda data: data["blocks"][1].update(heads=[1, 0]), "rising"),
        (lambda data: data["blocks"][1].update(heads=[-1, 0]), "rising"),
        (lambda data: data["blocks"][1].update(name="model.layers"), "end in its number"),
        (lambda data: data.update(head_reader=None), "for all blocks"),
    ],
)
def test_json_that_is_no_plan(change, message):
    data = edited(magnitude_plan(tiny.llama()), change)
    with pytest.raises(ValueError, match=f"StructuredPlan: .*{message}"):
        StructuredPlan.from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: [block.update(heads=[2, 4]) for block in data["blocks"]], "keeps number 4 of the 4 heads"),
        (lambda data: [block.update(heads=[0, 1, 2]) for block in data["blocks"]], "as many query heads of each"),
        (lambda data: data["blocks"][0].update(heads=[1, 2]), "as many query heads of each"),
        (lambda data: data.update(channel_reader="mlp.fc2"), "the model has mlp.down_proj"),
        (lambda data: data["blocks"].reverse(), "rising and in"),
        (lambda data: data["blocks"][2].update(name="model.layers.3"), r"in \[0, 3\)"),
        (lambda data: data["blocks"][2].update(name="encoder.2"), "blocks are in model.layers"),
        (lambda data: data["config"].update(hidden_size=1), "changes the configuration by"),
    ],
)
def test_plans_that_do_not_fit(change, message, no_work):
    model = tiny.llama()
    found = StructuredPlan.from_dict(edited(magnitude_plan(model), change))
    with pytest.raises(ValueError, match=f"apply_structured: .*{message}"):
        apply_structured(model, found, calibration=tiny.token_ids())


def test_a_block_that_its_place_would_change(no_work):
    model = tiny.gpt2(n_layer=3, scale_attn_by_inverse_layer_idx=True)
    found = plan_structured(model, mlp=0.5, method="magnitude")
    blocks = tuple(found.blocks[k] for k in (0, 2))
    found = dataclasses.replace(found, blocks=blocks, config={"num_hidden_layers": 2, "n_inner": 128})
    with pytest.raises(ValueError, match="apply_structured: block 2 would be another one as block 1 of 2: attn"):
        apply_structured(model, found, calibration=tiny.token_ids())


def test_a_plan_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"StructuredPlan: plan\.json cannot be read: it is not there"):
        StructuredPlan.load(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="no block stays"):
        StructuredPlan("obs", {}, {}, ())
    with pytest.raises(ValueError, match="for all blocks, with their reader"):
        StructuredPlan("obs", {}, {}, (KeptBlock("model.layers.0", (0,)),))


@pytest.mark.parametrize("restore", ["ls", "none"])
def test_layers_that_are_not_connected_as_their_names_say(restore, monkeypatch):
    model = tiny.llama()
    found = magnitude_plan(model)
    kind = type(model.model.layers[0].mlp)

    def crossed(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).flip(-1))

    monkeypatch.setattr(kind, "forward", crossed)
    with pytest.raises(ValueError, match="not connected as their names say"):
        apply_structured(model, found, calibration=tiny.token_ids(), restore=restore, progress=False)
