"""A model's tensors and layers as a format stores them: what `save` writes, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import expert_files, expert_tensors, experts, streaming
from llmkern.expert_files import Renamed
from llmkern.formats import compressed_tensors as ct
from llmkern.formats import gptq_checkpoint
from llmkern.nn import ORDER, PackedLinear, packed_names
from llmkern.weight_writer import Later

LARGE = 1 << 20  # bytes
EXPERT = "it is an expert, of which the model's own code knows only a 3-D parameter"


@dataclass
class Encoded:
    """tensors: by their names in the files; extra: what the standard layout has no place for; layers: the entries of
    llmkern.json; schemes: (layer, scheme, activations) of those with codes; tied: names that are only other names of a
    parameter (name -> first); unread: layer -> why other readers cannot read it; renamed: what has another name in the
    files than in the model.
    """

    tensors: dict[str, Tensor | Later] = field(default_factory=dict)
    extra: dict[str, Tensor | Later] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    schemes: list[tuple[str, dict[str, Any] | None, str | None]] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    renamed: Renamed = field(default_factory=lambda: Renamed({}, {}))

    @property
    def standard(self) -> bool:
        """Whether a reader that knows only the format finds every layer where it looks for it."""
        layers = ((self.layers[name], self.unread.get(name)) for name, _, _ in self.schemes)
        return not any(layer["conv1d"] or ORDER in layer or reason == EXPERT for layer, reason in layers)


def encode_model(model: nn.Module, format: str) -> Encoded:
    """All tensors of the model, large ones made when they are written. ValueError for what the format cannot hold."""
    found = Encoded()
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            _add_layer(found, name, layer, format, model_dtype(model))
    rest, found.tied = _other_tensors(model)
    found.tensors |= rest
    _place_experts(found, model, format)
    return found


def _add_layer(found: Encoded, name: str, layer: PackedLinear, format: str, dtype: torch.dtype) -> None:
    if layer.is_share:
        raise ValueError(f"save: layer {name} holds one rank's share of its weight; load it on one rank")
    packed = layer.packed
    if format == "dense":
        shape = torch.Size(packed.shape[::-1] if layer.conv1d else packed.shape)
        found.tensors[f"{name}.weight"] = Later(dtype, shape, partial(_dense, layer, dtype))
        return
    try:
        stored = _encode(layer, format)
    except ValueError as error:
        raise ValueError(f"save: layer {name}: {error}") from None
    if stored.scheme is not None:
        found.schemes.append((name, stored.scheme, layer.activations))
        if layer.conv1d:
            found.unread[name] = "it is a Conv1D"
        elif layer.input_order is not None:
            found.unread[name] = "its columns are in an order of their own"
        elif packed.shape[1] % packed.group_size:
            found.unread[name] = f"K={packed.shape[1]} is not a multiple of group_size {packed.group_size}"
    found.tensors |= {f"{name}.{key}": _or_later(t, layer, format, key) for key, t in stored.tensors.items()}
    found.extra |= {f"{name}.{key}": tensor for key, tensor in stored.extra.items()}
    if layer.input_order is not None:
        found.extra[f"{name}.{ORDER}"] = layer.input_order
    found.layers[name] = {
        "class": layer.format,
        "shape": list(packed.shape),
        "group_size": packed.group_size,
        "activations": layer.activations,
        "conv1d": layer.conv1d,
        "method": layer.method,
        "num_bits": layer.num_bits,
        "act_order": layer.act_order,
        **({} if layer.input_order is None else {ORDER: True}),
    }


def _place_experts(found: Encoded, model: nn.Module, format: str) -> None:
    """Experts without codes become the model's 3-D parameters; those with codes get the names that readers know, where
    there are any.
    """
    mixtures = experts.mixtures(model)
    by_expert = expert_tensors.fuse(found.tensors, mixtures)
    if not by_expert:
        return
    packed = {name: scheme for name, scheme, activations in found.schemes if scheme and not activations}
    uneven = packed.keys() & found.unread.keys()
    homes = {home: mixtures[home] for home in by_expert}
    renamed = None if uneven else expert_files.rename(model, found.tensors, homes, packed, format)
    if renamed is not None:
        found.renamed = renamed
        for name, parts in renamed.parts.items():
            found.layers[name]["parts"] = parts
        return
    if format == "gptq":
        raise ValueError(f"save: {by_expert[0]}: gptq: no reader knows these experts; use compressed-tensors")
    if not found.schemes:  # a scheme of no codes: without any, nothing would tell readers to keep off
        found.schemes = [(name, None, None) for name in found.layers]
    for home in by_expert:
        found.unread |= dict.fromkeys((name for name in found.layers if name.startswith(f"{home}.")), EXPERT)


def _encode(layer: PackedLinear, format: str) -> ct.Stored:
    """A layer in the layout of a format. ValueError for what the format cannot hold."""
    if format == "gptq":
        if layer.input_order is not None:
            raise ValueError("gptq: columns in an order of their own are not written; use compressed-tensors")
        return gptq_checkpoint.encode(layer.packed, bits=layer.num_bits, act_order=layer.act_order)
    stored = ct.encode(layer.packed, activations=layer.activations, bits=layer.num_bits, act_order=layer.act_order)
    if stored.scheme is None and layer.input_order is not None:
        raise ValueError("columns in an order of their own are saved with codes only")
    if stored.scheme is None and layer.conv1d:
        return stored._replace(tensors={"weight": stored.tensors["weight"].T.contiguous()})
    return stored


def _dense(layer: PackedLinear, dtype: torch.dtype) -> Tensor:
    dense = layer.unpack(dtype)
    return dense.T.contiguous() if layer.conv1d else dense


def _or_later(tensor: Tensor, layer: PackedLinear, format: str, key: str) -> Tensor | Later:
    """The tensor; one that is large and no part of the layer is made again when it is written."""
    own = {part.untyped_storage().data_ptr() for part in layer.packed.tensors().values()}
    if tensor.nbytes < LARGE or tensor.untyped_storage().data_ptr() in own:
        return tensor
    return Later(tensor.dtype, tensor.shape, lambda: _encode(layer, format).tensors[key])


def _other_tensors(model: nn.Module) -> tuple[dict[str, Tensor | Later], dict[str, str]]:
    """Every tensor that is no packed weight, and which names are only other names of a parameter (name -> first)."""
    packed = packed_names(model)
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            tied[name] = known
    rest: dict[str, Tensor | Later] = {}
    for name, tensor in model.state_dict().items():
        if name in packed or name in tied:
            continue
        owner, _, leaf = name.rpartition(".")
        read = partial(streaming.parameter, model.get_submodule(owner), leaf)
        rest[name] = Later(tensor.dtype, tensor.shape, read) if tensor.is_meta else tensor
    return rest, tied


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first float parameter: that of the embeddings."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
