"""A smaller model of the same stock class: another configuration, and tensors that were cut out of the larger one's."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.blocks import find_lists
from llmkern.nn import PackedLinear

# Of a module's plain attributes these differ where a block has another place or another width.
NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number"})


def refuse_unless_dense(model: nn.Module, caller: str) -> None:
    """Raise unless `model` is a transformers model whose weights are here, dense, and on one device."""
    if not (hasattr(model, "config") and hasattr(model, "_from_config")):
        raise TypeError(f"{caller}: model must be a transformers model with a config, got {type(model).__name__}")
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError(f"{caller}: the model holds packed layers; remove parts of it before it is compressed")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{caller}: wanted a model that is loaded whole on one device, got one on {found}")


def only_blocks(model: nn.Module, caller: str) -> tuple[str, nn.ModuleList]:
    """The name and the list of the model's repeated blocks; ValueError unless there is one, as long as config says."""
    lists = find_lists(model)
    if len(lists) != 1:
        names = ", ".join(name for name, _ in lists) or "none"
        raise ValueError(f"{caller}: wanted a model with one list of repeated blocks, got {names}")
    name, blocks = lists[0]
    config: Any = model.config
    count = getattr(config, "num_hidden_layers", None)
    if count != len(blocks):
        raise ValueError(f"{caller}: config.num_hidden_layers is {count}, but {name} has {len(blocks)} blocks")
    return name, blocks


def smaller_config(model: nn.Module, changes: Mapping[str, Any]) -> Any:
    """A copy of the model's configuration with these values. ValueError where its class would not load it again."""
    config: Any = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:  # a class checks what it likes, in its own kind of error
        raise ValueError(f"{type(config).__name__}: {' '.join(str(error).split())}") from error
    return config


def skeleton(model: nn.Module, config: Any) -> Any:
    """A model of the same class for `config`, its parameters on the meta device, its buffers computed."""
    from llmkern.weight_files import parameters_on_meta

    kind: Any = type(model)
    with parameters_on_meta():
        return kind._from_config(config, dtype=next(model.parameters()).dtype)


def fill(small: Any, model: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """`small`, a `skeleton`, with these tensors (its own from now on) and what else is `model`'s: modes, generation."""
    small.load_state_dict(dict(tensors), assign=True)
    small.tie_weights()
    small.to(next(model.parameters()).device)
    for name, parameter in small.named_parameters():
        if parameter.is_meta:
            raise RuntimeError(f"{name} got no value")
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(model.generation_config)
    return small.train(model.training)


def difference(old: nn.Module, new: nn.Module, widths: Container[tuple[Any, Any]] = ()) -> str:
    """How block `new` computes another thing than `old`, in a few words; "" if it does not.

    Compared: the classes of their modules and every plain attribute, but for those that number blocks, and those that
    go from one to the other of a pair in `widths`. What transformers sets from the place of a block (a window, a scale)
    shows in these.
    """
    parts = dict(new.named_modules())
    if parts.keys() != dict(old.named_modules()).keys():
        return "it is made of other modules"
    for name, module in old.named_modules():
        other = parts[name]
        if type(module) is not type(other):
            return f"{name or 'it'} is a {type(other).__name__} and not a {type(module).__name__}"
        for key, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str | None) and not key.startswith("_")
            if not plain or key == "training" or key in NUMBERS:
                continue
            if vars(other).get(key) != value and (value, vars(other).get(key)) not in widths:
                return f"{f'{name}.' if name else ''}{key} is {vars(other).get(key)!r} and not {value!r}"
    return ""
