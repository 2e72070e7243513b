"""Tiny randomly initialised models of each shape the block finder must know, on CPU, without a network."""

from __future__ import annotations

import pytest
import torch

VOCABULARY, LENGTH = 96, 24


def token_ids(n: int = 6, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (n, length), generator=generator)


def llama(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return _build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**sizes, **changes}))


def gemma3(**changes):
    """Two kinds of layers: each has a mask and a rotary embedding of its own."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    }  # fmt: skip
    return _build(transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**{**sizes, **changes}))


def gpt2(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return _build(transformers.GPT2LMHeadModel, transformers.GPT2Config(**{**sizes, **changes}))


def opt(**changes):
    """Word embeddings narrower than the model: project_in and project_out are linear layers outside the blocks."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    }  # fmt: skip
    return _build(transformers.OPTForCausalLM, transformers.OPTConfig(**{**sizes, **changes}))


def bert(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    return _build(transformers.BertForMaskedLM, transformers.BertConfig(**{**sizes, **changes}))


def t5(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": VOCABULARY, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    # T5's attention has no 1/sqrt(d): larger weights would make it a chaotic function.
    return _build(transformers.T5ForConditionalGeneration, transformers.T5Config(**{**sizes, **changes}), gain=1)


def albert(**changes):
    """One block, run several times per forward."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "embedding_size": 32, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    return _build(transformers.AlbertForMaskedLM, transformers.AlbertConfig(**{**sizes, **changes}))


MOE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "head_dim": 16,
}  # fmt: skip


def mixtral(**changes):
    """Experts as 3-D parameters [E, N, K]."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(**{**MOE, "num_local_experts": 4, **changes})
    return _build(transformers.MixtralForCausalLM, config)


def qwen3_moe(**changes):
    """More experts than stages."""
    transformers = pytest.importorskip("transformers")
    sizes = {**MOE, "moe_intermediate_size": 32, "num_experts": 10, "decoder_sparse_step": 1}
    return _build(transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**{**sizes, **changes}))


def gpt_oss(**changes):
    """Experts [E, K, N] with biases, gate and up interleaved and clamped; two kinds of layers."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        **MOE, "num_local_experts": 4, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    return _build(transformers.GptOssForCausalLM, transformers.GptOssConfig(**{**sizes, **changes}))


def llama4(**changes):
    """Experts that are given all tokens, scaled by the router, and 0 where it chose another."""
    transformers = pytest.importorskip("transformers")
    sizes = {**MOE, "num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
    return _build(transformers.Llama4ForCausalLM, transformers.Llama4TextConfig(**{**sizes, **changes}))


def switch(**changes):
    """Experts in an nn.ModuleDict; an encoder and a decoder."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": VOCABULARY, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_heads": 4, "num_experts": 4,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    cls = transformers.SwitchTransformersForConditionalGeneration
    return _build(cls, transformers.SwitchTransformersConfig(**{**sizes, **changes}), gain=1)


MIXTURES = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}
MODELS = {"llama": llama, "gemma3": gemma3, "gpt2": gpt2, "opt": opt, "bert": bert, "t5": t5, "albert": albert}
MODELS |= MIXTURES


def inputs(kind: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model is called with."""
    return {"input_ids": ids, "decoder_input_ids": ids.flip(-1)} if kind in ("t5", "switch") else {"input_ids": ids}


def output(kind: str, model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(kind, ids)).logits


def mlp(n: int = 32, k: int = 32) -> torch.nn.Module:
    """A model with no blocks and no config."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(k, n), torch.nn.ReLU(), torch.nn.Linear(n, n, bias=False))


def _build(cls, config, gain=4):
    torch.manual_seed(0)
    with torch.no_grad():
        model = cls(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
            elif parameter.ndim in (2, 3):
                parameter.mul_(gain)  # far enough from linear that a wrong block input shows
    return model
