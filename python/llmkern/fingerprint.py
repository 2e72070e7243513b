"""Fingerprint: what two runs must have in common so that one can finish what the other began."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._version import __version__
from llmkern.blocks import Call
from llmkern.recipe import Recipe
from llmkern.streaming import is_streamed, values_of

READERS = 4  # threads that read a model; each may hold one tensor's copy from another device


def fingerprint(
    model: nn.Module, recipe: Recipe, calls: Iterable[Call], device: torch.device | None, *, values: bool = True
) -> dict[str, Any]:
    """A JSON object: versions, recipe, device, and digests of the model and the calibration.

    values: whether the model's numbers are read too, all of them, at about 1 GB/s per thread; else only names, shapes
    and dtypes.
    """
    return {
        "llmkern": __version__,
        "torch": torch.__version__,
        "model": about_model(model, values=values),
        "recipe": recipe.to_dict(),
        "calibration": about_calls(calls),
        "device": "where the blocks are" if device is None else device.type,
    }


def about_calls(calls: Iterable[Call]) -> str:
    """The digest of what a model is called with: the calibration's part of a fingerprint."""
    return digest_of([list(call.args), call.kwargs] for call in calls)


def about_model(model: nn.Module, *, values: bool = True) -> dict[str, Any]:
    """Class, and digests of configuration, tensors and, with `values`, numbers: the model's part of a fingerprint."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    about = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": digest_of(_config(model)),
        "tensors": digest_of([name, list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors),
    }
    if values:
        if is_streamed(model):
            about["values"] = digest_of(map(digest_of, values_of(model)))
        else:
            with ThreadPoolExecutor(READERS) as pool:  # hashing lets go of the interpreter
                about["values"] = digest_of(pool.map(digest_of, (tensor for _, tensor in tensors)))
    return about


def digest_of(value: Any) -> str:
    """32 hexadecimal digits that tell tensors, numbers, texts, and lists and dicts of them from any others."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:32]


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """The parts that differ, as "recipe.bits is 4 there and 8 here"."""
    if isinstance(there, dict) and isinstance(here, dict):
        found: list[str] = []
        for key in dict.fromkeys((*there, *here)):
            found += differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if there == here else [f"{name} is {json.dumps(there)} there and {json.dumps(here)} here"]


def _config(model: nn.Module) -> dict[str, Any]:
    """The model's configuration, but for where it came from and who wrote it."""
    config: Any = getattr(model, "config", None)
    found = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else {}
    return {key: value for key, value in found.items() if key not in ("_name_or_path", "transformers_version")}


def _feed(digest: Any, value: Any) -> None:
    """Everything that tells a value from another, each part with its kind and length."""
    if isinstance(value, Tensor):
        if value.is_meta:
            raise ValueError("compress: state_dir needs the model's values, but a tensor of it is on the meta device")
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        if value.numel():
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        _feed(digest, [[key, part] for key, part in sorted(value.items(), key=lambda item: str(item[0]))])
    elif isinstance(value, str | int | float | bool | None):
        digest.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, Iterable):
        count = 0
        for count, part in enumerate(value, 1):  # noqa: B007
            _feed(digest, part)
        digest.update(f"{count} parts;".encode())
    else:
        digest.update(f"{type(value).__qualname__};".encode())
