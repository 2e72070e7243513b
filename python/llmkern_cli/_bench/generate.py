"""Whole models: prefill and decode tokens per second through transformers' `generate`, dense against each recipe."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

REPEATS = 3
RANDOM = "llama-1b"
# The sizes of Llama-3.2-1B; the weights are random, which changes no kernel's speed.
LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "tie_word_embeddings": True,
}  # fmt: skip


def measure(name: str, recipes: Sequence[str], dtypes: Sequence[str], prompt: int, tokens: int) -> dict[str, Any]:
    """Rows per dtype and recipe ("dense" first): prefill_tokens_per_s, decode_tokens_per_s, bytes, or why not."""
    from llmkern_cli._common import progress

    rows = []
    for dtype in dtypes:
        dense = _load(name, getattr(torch, dtype))
        ids = torch.randint(0, dense.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
        for recipe in ("dense", *recipes):
            row: dict[str, Any] = {
                "dtype": dtype, "recipe": recipe, "prefill_tokens_per_s": None, "decode_tokens_per_s": None,
                "bytes": None, "skipped": None,
            }  # fmt: skip
            try:
                row.update(_speeds(_compressed(dense, recipe), ids, tokens))
            except (ValueError, TypeError, NotImplementedError) as error:
                row["skipped"] = " ".join(str(error).split())
            rows.append(row)
            progress(f"{name} {dtype} {recipe}")
    return {"model": name, "prompt": prompt, "tokens": tokens, "rows": rows}


def _load(name: str, dtype: torch.dtype) -> Any:
    if name != RANDOM:
        from llmkern.models import load_model

        return load_model(name).model.to(dtype)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(LlamaConfig(**LLAMA_1B)).eval()
    finally:
        torch.set_default_dtype(before)


def _compressed(dense: Any, recipe: str) -> Any:
    """`dense` itself, or a packed copy. A recipe that needs data gets random tokens: only speed is measured."""
    import llmkern

    if recipe == "dense":
        return dense
    model = copy.deepcopy(dense)
    parsed = llmkern.Recipe.parse(recipe)
    windows = None
    if parsed.needs_calibration:
        windows = torch.randint(0, dense.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    llmkern.compress(model, parsed, windows, progress=False)
    return model


@torch.inference_mode()
def _speeds(model: Any, ids: Tensor, tokens: int) -> dict[str, Any]:
    """Medians: the prompt with one new token, and the further time that `tokens` new ones take."""
    from llmkern.evaluate import model_bytes

    _generate(model, ids, 2)
    first, more = [], []
    for _ in range(REPEATS):
        first.append(_generate(model, ids, 1))
        more.append(_generate(model, ids, 1 + tokens))
    prefill = statistics.median(first)
    decode = statistics.median(more) - prefill
    return {
        "prefill_tokens_per_s": round(ids.numel() / prefill, 2),
        "decode_tokens_per_s": round(tokens / decode, 2),
        "bytes": model_bytes(model),
    }


def _generate(model: Any, ids: Tensor, tokens: int) -> float:
    """Seconds of greedy decoding of exactly `tokens` tokens."""
    start = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
        pad_token_id=0,
    )  # fmt: skip
    return time.perf_counter() - start
