"""What a model is worth: perplexity on given windows, prefill and decode speed, and bytes."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern.calibration import device_of


class Perplexity(NamedTuple):
    """`value` = exp(mean negative log-likelihood) over `tokens` predicted tokens."""

    value: float
    tokens: int


@torch.inference_mode()
def perplexity(model: Any, windows: Tensor, *, batch: int = 4) -> Perplexity:
    """Perplexity of a causal LM over positions 1 to L-1 of every window; windows int64 [n, L], L >= 2.

    One batch of logits [batch, L, V] is the most that is held; the sum is in fp64. Raises ValueError when the logits
    hold a NaN, because a perplexity of such a model means nothing.
    """
    device = device_of(model)
    total, tokens = 0.0, 0
    for rows in windows.split(batch):
        ids = rows.to(device)
        logits = model(input_ids=ids, use_cache=False).logits
        for window, row in zip(ids, logits, strict=True):
            loss = torch.nn.functional.cross_entropy(row[:-1].float(), window[1:], reduction="sum").item()
            if loss != loss:
                raise ValueError("perplexity: the model's logits hold a NaN")
            total += loss
            tokens += window.numel() - 1
    return Perplexity(float(torch.tensor(total / tokens, dtype=torch.float64).exp()), tokens)


@torch.inference_mode()
def prefill_speed(model: Any, window: Tensor, *, repeats: int = 3) -> float:
    """Tokens per second of one forward over window [L], batch 1, with a fresh cache: the median of `repeats` runs."""
    ids = window.to(device_of(model)).unsqueeze(0)
    model(input_ids=ids, use_cache=True)
    return ids.numel() / statistics.median(_seconds(model, ids) for _ in range(repeats))


@torch.inference_mode()
def decode_speed(model: Any, prompt: Tensor, *, tokens: int = 32) -> float:
    """Tokens per second of greedy decoding, batch 1, after prompt [P], whose own forward is not counted.

    A plain loop of model forwards with the KV cache, one token each, from the median time of a token: neither
    `generate`'s own overhead nor an early end-of-text blurs the model's speed.
    """
    output = model(input_ids=prompt.to(device_of(model)).unsqueeze(0), use_cache=True)
    times = []
    for _ in range(tokens):
        token = output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        _wait(token)
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times)


def model_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, packed weights included; a tensor used twice counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}.values())


def evaluate(model: Any, windows: Tensor, *, speed: bool = True) -> dict[str, Any]:
    """The object of `llmkern eval`: perplexity, tokens, prefill_tokens_per_s, decode_tokens_per_s, bytes.

    windows int64 [n, L]. Speeds (None without `speed`): prefill of the first window; 32 tokens after its first half.
    """
    quality = perplexity(model, windows)
    return {
        "perplexity": quality.value,
        "tokens": quality.tokens,
        "prefill_tokens_per_s": prefill_speed(model, windows[0]) if speed else None,
        "decode_tokens_per_s": decode_speed(model, windows[0, : windows.shape[1] // 2]) if speed else None,
        "bytes": model_bytes(model),
    }


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompt: str, *, tokens: int = 24) -> str:
    """`prompt` and its greedy continuation of at most `tokens` tokens, by the model's own `generate`."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(device_of(model))
    attended = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=attended, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def _seconds(model: Any, ids: Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True)
    _wait(ids)
    return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
