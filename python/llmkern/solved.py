"""Solved: one finished layer, and several of them as bytes: what a state keeps and what ranks send each other.

The bytes are a safetensors file: the tensors `NUMBER.name` of each packed weight, and in its metadata, under
`llmkern`, a JSON list of the layers with their report rows. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from llmkern.nn import FORMATS, PackedLinear
from llmkern.report import Row
from llmkern.streaming import home_of

KEY = "llmkern"
RECORD = ("method", "num_bits", "act_order")  # of a packed layer: how it was made


@dataclass(frozen=True, eq=False)
class Solved:
    """A layer's packed form, its report row, and the dense values [N, K] that `packed` unpacks to (None: unpack)."""

    packed: PackedLinear
    row: Row
    dense: Tensor | None = None

    def values(self) -> Tensor:
        """The dense values fp32 [N, K]."""
        return self.packed.unpack() if self.dense is None else self.dense


def encode(solved: Mapping[str, Solved]) -> bytes:
    """The packed weights and rows of these layers; their biases stay with the model."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    layers = []
    for number, (name, layer) in enumerate(solved.items()):
        packed = layer.packed.packed
        tensors |= {f"{number}.{key}": tensor.detach().cpu() for key, tensor in packed.tensors().items()}
        about: dict[str, Any] = {"name": name, "class": layer.packed.format, "shape": list(packed.shape)}
        about |= {"group_size": packed.group_size, "activations": layer.packed.activations}
        about |= {key: getattr(layer.packed, key) for key in RECORD}
        layers.append({**about, "row": asdict(layer.row)})
    return save(tensors, metadata={KEY: json.dumps(layers)})


def decode(data: bytes, dense: Mapping[str, nn.Module]) -> dict[str, Solved]:
    """The inverse of `encode`, each weight where its dense layer is. ValueError unless these are the layers.

    Of the dense layers only the biases need to be in memory.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        layers = json.loads(_metadata(data)[KEY])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"not the solved layers of a run: {error}") from None
    names = [about["name"] for about in layers]
    if set(names) != set(dense):
        raise ValueError(f"wanted the layers {', '.join(dense)}, got {', '.join(names)}")
    return {about["name"]: _layer(str(number), about, tensors, dense) for number, about in enumerate(layers)}


def _layer(number: str, about: dict[str, Any], tensors: dict[str, Tensor], dense: Mapping[str, nn.Module]) -> Solved:
    layer = dense[about["name"]]
    device = home_of(layer)
    own = {key.partition(".")[2]: value.to(device) for key, value in tensors.items() if key.split(".")[0] == number}
    shape = tuple(about["shape"])
    weight = FORMATS[about["class"]].from_tensors(own, shape=shape, group_size=about["group_size"])
    record = {key: about[key] for key in RECORD}
    packed = PackedLinear.from_linear(layer, weight, activations=about["activations"], **record)
    row = about["row"]
    row |= {key: tuple(row[key]) for key in ("shape", "notes", "problems")}
    return Solved(packed, Row(**row))


def _metadata(data: bytes) -> dict[str, str]:
    """The `__metadata__` of a safetensors file: 8 bytes of length, then a JSON object."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})
