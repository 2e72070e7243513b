"""Calibration data in any accepted form as calls of the model, and which of their tokens count."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.blocks import Call

# Sequences per forward: enough rows for a GEMM at full speed, few enough for one block's activations to stay small.
BATCH = 8
# Tokens per forward on a CPU, where what a block's layers hand each other should stay in the caches.
TOKENS = 1024

Calibration = Tensor | Iterable[Any] | Callable[[nn.Module], Any]


def calls_of(model: nn.Module, calibration: Any, caller: str = "compress") -> list[Call]:
    """Calibration in any accepted form as calls of the model. ValueError if it has no tokens.

    caller: the function that errors name.
    """
    if calibration is None:
        raise ValueError(f"{caller}: this needs calibration: token ids [n, L], batches, or a callable")
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2:
            raise ValueError(f"{caller}: calibration token ids must be [n, L], got {list(calibration.shape)}")
        if calibration.is_floating_point() or calibration.dtype == torch.bool:
            got = f"got {calibration.dtype} (other inputs: a list of batches, or a callable that runs the model)"
            raise TypeError(f"{caller}: calibration token ids must be integers, {got}")
        size = per_call(calibration.shape[1], device_of(model))
        calls = [Call((ids,), {}) for ids in calibration.split(size)] if calibration.numel() else []
    elif callable(calibration):
        calls = _record(model, calibration, caller)
    else:
        calls = [_as_call(batch, caller) for batch in calibration]
    calls = [call for call in calls if count_tokens(call)]
    if not calls:
        raise ValueError(f"{caller}: zero calibration tokens")
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embeddings, "num_embeddings", None)
    for call in calls:
        ids = call.kwargs.get("input_ids", call.args[0] if call.args else None)
        if rows and isinstance(ids, Tensor) and not ids.is_floating_point() and not 0 <= ids.min() <= ids.max() < rows:
            raise ValueError(f"{caller}: calibration token ids must be in [0, {rows}), got {ids.min()} to {ids.max()}")
    home = device_of(model)
    return [move_call(call, home) for call in calls]


def per_call(length: int, device: torch.device) -> int:
    """Sequences of `length` tokens per forward."""
    return BATCH if device.type != "cpu" else min(BATCH, max(1, TOKENS // max(length, 1)))


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are; the CPU for one without."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _as_call(batch: Any, caller: str) -> Call:
    if isinstance(batch, Tensor):
        return Call((batch,), {})
    if isinstance(batch, Mapping):
        # Labels only cost a loss; a cache would grow from call to call.
        dropped = ("labels", "use_cache", "past_key_values")
        return Call((), {key: value for key, value in batch.items() if key not in dropped})
    raise TypeError(f"{caller}: a calibration batch must be a tensor or a mapping, got {type(batch).__name__}")


def _record(model: nn.Module, run: Callable[[nn.Module], Any], caller: str) -> list[Call]:
    """The calls of the model that `run(model)` makes."""
    calls: list[Call] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and hasattr(cache, "get_seq_length") and cache.get_seq_length():
            raise ValueError(f"{caller}: the calibration callable runs the model with a cache; pass use_cache=False")
        calls.append(Call(args, dict(_as_call(kwargs, caller).kwargs)))

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run(model)
    finally:
        handle.remove()
    return calls


def count_tokens(call: Call) -> int:
    """Tokens of a batch: its mask's, else the elements of its token ids, else the rows of its first tensor."""
    mask = call.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.count_nonzero())
    tensors = [
        value
        for value in (call.kwargs.get("input_ids"), *call.args, *call.kwargs.values())
        if isinstance(value, Tensor)
    ]
    if not tensors:
        return 0
    return tensors[0].numel() // (tensors[0].shape[-1] if tensors[0].is_floating_point() and tensors[0].ndim else 1)


def rows_that_count(model: nn.Module, call: Call) -> Tensor | None:
    """bool [batch, length], False for padding; None when every token counts."""
    mask = call.kwargs.get("attention_mask")
    # Of an encoder and a decoder only one reads this mask, and lengths do not tell which.
    if not isinstance(mask, Tensor) or mask.ndim != 2 or getattr(_config(model), "is_encoder_decoder", False):
        return None
    rows = mask.bool()
    return None if rows.all() else rows


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no cache; every module's own mode and the configuration as they were afterwards."""
    # Weak: a dense layer that is replaced meanwhile should not stay in memory.
    modes = [(weakref.ref(module), module.training) for module in model.modules()]
    # An encoder-decoder's stacks have configurations of their own.
    configs = {
        id(config): config for module in model.modules() if getattr(config := _config(module), "use_cache", None)
    }
    model.eval()
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
        for reference, mode in modes:
            if (alive := reference()) is not None:
                alive.training = mode


def move_call(call: Call, device: torch.device) -> Call:
    """The call with every tensor on `device`."""
    return Call(tuple(move(value, device) for value in call.args), {k: move(v, device) for k, v in call.kwargs.items()})


def move(value: Any, device: torch.device) -> Any:
    """A tensor, or a nest of tuples, lists and dicts that hold some, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(move(part, device) for part in value)
    return {key: move(part, device) for key, part in value.items()} if type(value) is dict else value
