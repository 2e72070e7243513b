"""drop_layers: the student computes what its teacher does without the dropped blocks, and stock models load it."""

import copy

import pytest
import tiny
import torch

from llmkern.distill import drop_layers
from llmkern.distill.depth import evenly

transformers = pytest.importorskip("transformers")

from distill_models import HEADS  # noqa: E402

FOUR = {"gpt2": {"n_layer": 4}, "distilbert": {"n_layers": 4}}
BLOCKS = {
    "gpt2": "transformer.h", "bert": "bert.encoder.layer", "distilbert": "distilbert.transformer.layer",
    "opt": "model.decoder.layers",
}  # fmt: skip


def of_four(kind):
    return HEADS[kind](**FOUR.get(kind, {"num_hidden_layers": 4}))


def skipping(model, blocks, kept):
    """The model with the other blocks handing on what they are given."""
    model = copy.deepcopy(model)
    for number, block in enumerate(model.get_submodule(blocks)):
        if number not in kept:
            block.forward = handing_on(block.forward)
    return model


def handing_on(forward):
    def through(x, *args, **kwargs):
        output = forward(x, *args, **kwargs)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return through


@pytest.mark.parametrize("kept", [[0, 2], [1, 2, 3], [3], [0, 1, 2, 3], None])
@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "bert", "distilbert", "opt", "phi"])
def test_it_computes_what_the_teacher_does_without_the_dropped(kind, kept):
    teacher = of_four(kind)
    before = copy.deepcopy(teacher.state_dict())
    student = drop_layers(teacher, kept)
    assert type(student) is type(teacher)
    wanted = skipping(teacher, BLOCKS.get(kind, "model.layers"), [0, 3] if kept is None else kept)
    found = student(tiny.token_ids()).logits
    torch.testing.assert_close(found, wanted(tiny.token_ids()).logits, rtol=1e-5, atol=1e-5)
    assert student.config.num_hidden_layers == len(kept or (0, 3))
    assert teacher.config.num_hidden_layers == 4
    mine = {parameter.data_ptr() for parameter in student.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in teacher.parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "bert", "distilbert", "opt", "gemma3"])
def test_stock_transformers_loads_it(kind, tmp_path):
    student = drop_layers(of_four(kind), "every_other")
    student.save_pretrained(tmp_path)
    masked = kind in ("bert", "distilbert")
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path)
    assert torch.equal(loaded(tiny.token_ids()).logits, student(tiny.token_ids()).logits)
    if not masked:
        prompt = tiny.token_ids(2, 5)
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        with_cache, without = (loaded.generate(prompt, use_cache=cache, **options) for cache in (True, False))
        assert torch.equal(with_cache, without)


def test_shared_weights_stay_shared():
    student = drop_layers(of_four("tied"))
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_each_block_keeps_its_kind_of_attention():
    student = drop_layers(of_four("gemma3"), [1, 2])
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]


def test_every_other_is_evenly_from_the_first_to_the_last():
    assert evenly(12) == [0, 2, 4, 7, 9, 11]  # DistilBERT's
    for blocks in range(1, 70):
        kept = evenly(blocks)
        assert len(kept) == (blocks + 1) // 2
        assert kept[0] == 0
        assert kept == sorted(set(kept))
        assert kept[-1] == (blocks - 1 if blocks > 2 else 0)


@pytest.mark.parametrize(
    ("model", "keep", "part"),
    [
        (tiny.t5, None, "one list of repeated blocks, got encoder.block, decoder.block"),
        (tiny.albert, None, "drop_layers: config.num_hidden_layers is 3, but"),
        (tiny.llama, [], "drop_layers: indices are empty"),
        (tiny.llama, [0, 3], r"drop_layers: indices must be rising and in \[0, 3\)"),
        (tiny.llama, [1, 0], "must be rising"),
        (tiny.llama, "odd", 'keep must be "every_other" or numbers of blocks'),
    ],
)
def test_what_cannot_be_made_is_refused(model, keep, part):
    with pytest.raises(ValueError, match=part):
        drop_layers(model(), keep)


def test_other_things_than_transformers_models_are_refused():
    with pytest.raises((TypeError, ValueError), match="drop_layers: "):
        drop_layers(tiny.mlp(), [0])
