"""A model without weights from a config.json that nobody vouches for: no memory, no endless loop, one kind of error.

transformers builds what a configuration says: a number of layers is a loop, a number of positions may be a buffer. So
numbers that count modules are bounded before a configuration is made of them, and the model is first built on the meta
device, where sizes cost nothing, and compared with what the files hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmkern._json import read_object
from llmkern.weight_files import parameters_on_meta

COUNTS = re.compile(r"layer|block|expert|depth|stage|heads?$|n_head|levels|labels")
MOST_MODULES = 1 << 12  # layers, experts or heads of a model; more only where the files hold more tensors
MOST_VALUES = 16  # of a parameter, per byte of the files: a bitmask and tied weights take less than 2 bits for one
BUFFERS = 256 << 20  # bytes of buffers that any model may have


def build(folder: Path, kind: Any, paths: list[Path], tensors: int) -> Any:
    """The model of class `kind` of config.json, its parameters on the meta device, its buffers computed.

    paths: its safetensors files, which hold that many tensors. ValueError for whatever keeps transformers from building
    it, and for a model that these files cannot be of.
    """
    data = read_object(folder / "config.json", "load")
    if not isinstance(model_type := data.get("model_type", ""), str):
        raise ValueError(f"load: config.json: model_type must be a string, got {model_type!r:.100}")
    _bounded(data, max(MOST_MODULES, tensors))
    size = sum(path.stat().st_size for path in paths)
    try:
        config = kind.config_class.from_pretrained(folder)
        for key in ("quantization_config", "compression_config"):
            if hasattr(config, key):
                delattr(config, key)
        with torch.device("meta"), _at_most(max(MOST_MODULES, 4 * tensors)):
            _fits(kind._from_config(config), size)
        with parameters_on_meta():
            model = kind._from_config(config)
        if (folder / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = _generation(folder)
    except Exception as error:  # whatever a class does with values that make no sense
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"load: config.json: no {kind.__name__} is made of it: {reason:.300}") from error
    return model


def _generation(folder: Path) -> Any:
    from transformers import GenerationConfig

    read_object(folder / "generation_config.json", "load")
    return GenerationConfig.from_pretrained(folder)


def _bounded(value: Any, most: int, key: str = "") -> None:
    """ValueError for a number that counts modules and is larger than `most`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _bounded(inner, most, name)
    elif isinstance(value, list):
        for inner in value:
            _bounded(inner, most, key)
    elif isinstance(value, int | float) and COUNTS.search(key) and value > most:
        raise ValueError(f"load: config.json: {key} is {value}, and the files hold no more than {most} such modules")


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """ValueError inside when modules get more parameters than that: a loop that a number made too long."""
    register, left = nn.Module.register_parameter, count

    def counted(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {count} parameters, which the files do not hold")
        if parameter is not None:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # as in `parameters_on_meta`
        register(self, name, parameter)

    nn.Module.register_parameter = counted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _fits(model: nn.Module, size: int) -> None:
    """ValueError for a model on the meta device that is too large for files of `size` bytes."""
    values = sum(parameter.numel() for parameter in model.parameters())
    if values > MOST_VALUES * size:
        raise ValueError(f"{values} values of parameters, which files of {size} bytes cannot hold")
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if buffers > BUFFERS + MOST_VALUES * size:
        raise ValueError(f"buffers of {buffers} bytes, for files of {size} bytes")
