"""A tiny Llama as a GGUF file, and its weights dequantized here, by the definition of the block types."""

from __future__ import annotations

import numpy as np
import pytest
import torch

KINDS = ("F32", "Q8_0", "Q4_0")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def byte_tokens() -> list[str]:
    """The 256 letters of byte-level vocabularies (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def dequantized(kind: str, raw: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """ggml-common.h: a block of 32 is an fp16 scale d, then int8 codes (Q8_0) or 16 bytes of two nibbles (Q4_0)."""
    if kind == "F32":
        return torch.from_numpy(raw.view(np.float32).reshape(shape).copy())
    blocks = raw.reshape(-1, 34 if kind == "Q8_0" else 18)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        codes = blocks[:, 2:].view(np.int8).astype(np.float32)
    else:
        codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.float32) - 8
    return torch.from_numpy((codes * scale).reshape(shape))


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head's two halves become pairs, as llama.cpp turns q and k for its rotary embedding."""
    n, k = weight.shape
    return weight.view(heads, 2, n // heads // 2, k).transpose(1, 2).reshape(n, k).contiguous()


def unpaired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    n, k = weight.shape
    return weight.view(heads, n // heads // 2, 2, k).transpose(1, 2).reshape(n, k).contiguous()


def write(path, *, architecture="llama", leave_out=(), extra=None, seed=0):
    """Write the file; returns a transformers Llama that holds what its blocks mean."""
    gguf = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    tokens = [*byte_tokens(), "th", "the", "an"]
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **SIZES, vocab_size=len(tokens), tie_word_embeddings=False, rms_norm_eps=1e-5, rope_theta=10000.0,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["t h", "th e", "a n"])
    state = model.state_dict()
    for at, (name, weight) in enumerate(state.items()):
        layer, _, leaf = name.removeprefix("model.layers.").rpartition(".")
        number, _, inner = layer.partition(".")
        theirs = TOP[name.removesuffix(".weight")] if layer in TOP else f"blk.{number}.{NAMES[inner]}"
        if theirs in leave_out:
            continue
        heads = {"attn_q": 4, "attn_k": 2}.get(theirs.rpartition(".")[2])
        kind = KINDS[at % len(KINDS)] if weight.ndim == 2 else "F32"
        values = paired(weight, heads) if heads else weight
        raw = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(f"{theirs}.{leaf}", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        meant = dequantized(kind, raw, tuple(weight.shape))
        state[name].copy_(unpaired(meant, heads) if heads else meant)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
