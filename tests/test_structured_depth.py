"""keep_blocks: the kept blocks alone, in a model that stock transformers loads."""

import pytest
import tiny
import torch

from llmkern.prune import keep_blocks


class Skip(torch.nn.Module):
    """A block that hands its input on."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def without(model, name, dropped):
    """The model with some blocks skipped where they stand."""
    blocks = model.get_submodule(name)
    for index in dropped:
        skip = Skip()
        skip.attention_type = getattr(blocks[index], "attention_type", None)
        blocks[index] = skip
    return model


BLOCKS = {"llama": "model.layers", "gemma3": "model.layers", "bert": "bert.encoder.layer"}
BLOCKS |= {"mixtral": "model.layers", "gpt_oss": "model.layers"}


@pytest.mark.parametrize("kind", BLOCKS)
def test_equals_the_model_that_skips_blocks_and_loads_again(kind, tmp_path):
    model, ids = tiny.MODELS[kind](num_hidden_layers=4, **layer_types(kind)), tiny.token_ids()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = keep_blocks(model, [0, 3])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert small.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 4
    shared = {value.data_ptr() for value in model.parameters()} & {value.data_ptr() for value in small.parameters()}
    assert not shared
    got = tiny.output(kind, small, ids)
    assert torch.equal(got, tiny.output(kind, without(model, BLOCKS[kind], [1, 2]), ids))
    small.save_pretrained(tmp_path)
    assert torch.equal(got, tiny.output(kind, type(model).from_pretrained(tmp_path), ids))


def layer_types(kind):
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    return {"layer_types": types} if kind in ("gemma3", "gpt_oss") else {}


def test_places_are_numbered_anew():
    small = keep_blocks(tiny.gemma3(), [1, 2])
    assert [block.self_attn.layer_idx for block in small.model.layers] == [0, 1]
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    ids = tiny.token_ids()
    cached = small(ids[:, :8], use_cache=True)
    after = small(ids[:, 8:12], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(after, small(ids[:, :12]).logits[:, 8:], rtol=1e-4, atol=1e-4)


def test_windows_of_qwen2():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=2,
    )  # fmt: skip
    small = keep_blocks(transformers.Qwen2ForCausalLM(config), [1, 2, 3])
    assert small.config.max_window_layers == 1
    assert small.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


def test_modes_and_settings_stay():
    model = tiny.llama().to(torch.bfloat16).train()
    model.generation_config.max_new_tokens = 7
    model.config._attn_implementation = "eager"
    small = keep_blocks(model, [0])
    assert small.training
    assert small.dtype == torch.bfloat16
    assert small.generation_config.max_new_tokens == 7
    assert small.config._attn_implementation == "eager"
    assert all(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "at least one block"),
        ([0, 3], r"in \[0, 3\), got \[0, 3\]"),
        ([-1], "rising and in"),
        ([1, 0], "rising"),
        ([1, 1], "rising"),
    ],
)
def test_bad_indices(indices, message):
    with pytest.raises(ValueError, match=message):
        keep_blocks(tiny.llama(), indices)


@pytest.mark.parametrize("indices", [[True], [0.5], ["0"]])
def test_indices_are_ints(indices):
    with pytest.raises(TypeError, match="must be ints"):
        keep_blocks(tiny.llama(), indices)


def test_models_that_are_refused():
    with pytest.raises(TypeError, match="transformers model"):
        keep_blocks(tiny.mlp(), [0])
    with pytest.raises(ValueError, match="one list of repeated blocks"):
        keep_blocks(tiny.t5(), [0])
    with pytest.raises(ValueError, match="num_hidden_layers is 3"):
        keep_blocks(tiny.albert(), [0])
    with pytest.raises(ValueError, match="loaded whole on one device"):
        keep_blocks(tiny.llama().to("meta"), [0])


def test_a_block_that_its_place_would_change():
    model = tiny.gpt2(n_layer=3, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match=r"block 2 would be another one as block 1 of 2: attn.scaling"):
        keep_blocks(model, [0, 2])
    keep_blocks(model, [0, 1])
