"""One layer: from a scheme and its tensors to a packed weight, by the module that knows the format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llmkern.checkpoints import awq, gptq, marlin24, packed, sparse
from llmkern.checkpoints.awq import AwqSchemes
from llmkern.checkpoints.compressed_tensors import CompressedTensorsSchemes
from llmkern.checkpoints.gptq import GptqSchemes
from llmkern.checkpoints.scheme import Layer, Part, Scheme, Schemes
from llmkern.formats import Int4Weight, Int8Weight

FORMATS: dict[str, ModuleType] = {
    "pack-quantized": packed,
    "int-quantized": packed,
    "gptq": gptq,
    "gptq_v2": gptq,
    "awq": awq,
    "sparse-24-bitmask": sparse,
    "sparse-bitmask": sparse,
    "marlin-24": marlin24,
}
METHODS: dict[str, type[Any]] = {
    "compressed-tensors": CompressedTensorsSchemes, "gptq": GptqSchemes, "awq": AwqSchemes
}  # fmt: skip


def parse(quantization_config: Mapping[str, Any]) -> Schemes:
    """What a quantization_config says of each layer. ValueError for what is not known, or not read, with the reason."""
    if not isinstance(quantization_config, Mapping):
        raise ValueError(f"quantization_config must be an object, got {quantization_config!r:.80}")
    method = quantization_config.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"quantization_config: quant_method must be one of {', '.join(METHODS)}, got {method!r:.80}")
    return METHODS[method](quantization_config)


def layout(scheme: Scheme, shape: tuple[int, int]) -> dict[str, Part]:
    """The tensors that a layer [N, K] has in a checkpoint, without its bias. BadTensor for impossible shapes."""
    return FORMATS[scheme.format].layout(scheme, shape)


def read_layer(
    scheme: Scheme, tensors: Mapping[str, Tensor], shape: tuple[int, int], *, find_24: bool = False
) -> Layer:
    """One layer's tensors (by their names inside the layer, without the bias) as a packed weight [N, K].

    The dequantized values are exactly those that the format defines, with scales in the file's dtype. Tensors may be
    used as the weight's memory. find_24: leave the zeros out where symmetric codes turn out to be 2:4.

    Raises BadTensor, which names the tensor, what was wanted and what came.
    """
    weight, order = FORMATS[scheme.format].read(scheme, dict(tensors), shape)
    if find_24 and order is None and scheme.activations is None:
        weight = sparse.with_24(weight)
    return Layer(weight, order)


def stack(layers: Sequence[Layer]) -> Layer:
    """Layers of one input under one another, in one packed weight: the rows of the first, then of the next.

    ValueError where they are not of one class, group size and order of columns.
    """
    first = layers[0].weight
    for weight, order in layers[1:]:
        same = type(weight) is type(first) and weight.group_size == first.group_size
        if not same or weight.shape[1] != first.shape[1] or not _same(order, layers[0].input_order):
            raise ValueError(
                "layers that become one must have one class, K, group size and order of columns, got "
                f"{_about(layers[0])} and {_about(Layer(weight, order))}"
            )
    if not isinstance(first, Int4Weight | Int8Weight):
        raise ValueError(f"layers of {type(first).__name__} do not become one")
    found: dict[str, Any] = {}
    for field in fields(first):
        values = [getattr(layer.weight, field.name) for layer in layers]
        if field.name == "zeros" and any(value is not None for value in values):
            grids = [layer.weight.tensors()["scales"] for layer in layers]
            values = [torch.zeros_like(grid, dtype=torch.int8) if value is None else value
                      for grid, value in zip(grids, values, strict=True)]  # fmt: skip
        if isinstance(values[0], Tensor):
            found[field.name] = torch.cat(values)
    rows = sum(layer.weight.shape[0] for layer in layers)
    return Layer(replace(first, **found, shape=(rows, first.shape[1])), layers[0].input_order)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return (one is None) == (other is None) and (one is None or other is None or torch.equal(one, other))


def _about(layer: Layer) -> str:
    weight = layer.weight
    order = "" if layer.input_order is None else " in another order"
    return f"{type(weight).__name__} {list(weight.shape)} of group_size {weight.group_size}{order}"
