"""A checkpoint that others wrote (compressed-tensors, GPTQ, AWQ), as transformers loads it.

What the bytes mean is `llmkern.checkpoints`' business, and so is where each layer belongs; here its layers are handed
over one by one, and what transformers does not find by itself: biases of experts that the model's class has as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import experts
from llmkern.checkpoints import stack
from llmkern.checkpoints.folder import Folder
from llmkern.checkpoints.model import Loading
from llmkern.formats.bit_words import BITS
from llmkern.hf._source import Expected, Weight
from llmkern.nn import PackedLinear, dense_weight, is_linear


class Foreign(Loading):
    """See `_source.Source`."""

    def __init__(self, folder: Path, model: Any) -> None:
        """Raises ValueError for a format that is not read, with the way out, or for files that are not in order."""
        try:
            super().__init__(Folder(folder), model, torch.device("cpu"), find_24=False)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"{error}; to leave this checkpoint to transformers: `with llmkern.hf.stock():` or `llmkern.hf.reset()`"
            ) from None
        self.format = "compressed-tensors"
        self.notes = list(self.folder.schemes.notes)
        self.missing: list[str] = []
        self.places = self._places()
        coded = {key for leaves in self.folder.layers.values() for key in leaves.values()}
        targets, unknown = self.reader.targets(model)
        self.dense = {key: target for key, target in targets.items() if key not in coded}
        self.folder.files.check(model, self.dense)
        named = self.folder.config.get("architectures")
        self.strict = isinstance(named, list) and type(model).__name__ in named
        if self.strict:
            self._refuse_unknown([key for key in unknown if key not in coded])
        self.sources: dict[str, list[str]] = {}

    def homes(self) -> set[str]:
        """The mixtures, and the parents of other layers."""
        return {place.name.rsplit(".", 2)[0] for place in self.places.values()}

    def layers(self, model: nn.Module) -> dict[str, Expected]:
        """The layers that are stored as codes."""
        self.sources = self._sources(self.places, {target.name for target in self.dense.values()})
        found = {}
        for name, layers in self.sources.items():
            module = model.get_submodule(name)
            if not is_linear(module):
                raise ValueError(
                    f"load: {self.folder.path}: {layers[0]} is a {type(module).__name__}, wanted a linear layer"
                )
            schemes = [self.folder.scheme(layer, type(module).__name__, (name,)) for layer in layers]
            if len({scheme.activations for scheme in schemes}) > 1:
                raise ValueError(f"load: {self.folder.path}: {name}: {', '.join(layers)} differ in their activations")
            method = f"{self.folder.schemes.method} {schemes[0].format}"
            shape = tuple(dense_weight(module).shape)
            found[name] = Expected(shape, {"activations": schemes[0].activations, "method": method})  # type: ignore[arg-type]
        return found

    def check(self, model: Any, layers: Mapping[str, PackedLinear]) -> None:
        """ValueError for tensors of the model that the files do not hold: transformers would make up their values."""
        for name, layer in layers.items():
            self._bias(name, layer, self.sources[name])
        if not self.strict:
            self.notes.append(f"the checkpoint holds a {self.folder.config.get('architectures')}, loaded as "
                              f"{type(model).__name__}")  # fmt: skip
            return
        found = {target.name for target in self.dense.values()} | {f"{name}.bias" for name in layers}
        missing = model.state_dict().keys() - found
        for name, source in model.all_tied_weights_keys.items():
            if not {name, source} <= missing:
                missing -= {name, source}
        if missing:
            raise ValueError(f"load: {self.folder.path}: no values for {min(missing)} ({len(missing)} tensors)")

    def read(self, name: str, layer: PackedLinear) -> Weight:
        """The weight of one layer, of one or more layers of the files."""
        layers, kind = self.sources[name], "Conv1D" if layer.conv1d else "Linear"
        shape = (layer.out_features // len(layers), layer.in_features)
        if layer.out_features % len(layers):
            raise ValueError(f"it has {layer.out_features} rows, for {len(layers)} layers of the files")
        schemes = [self.folder.scheme(stored, kind, (name,)) for stored in layers]
        read = [self._read(stored, scheme, shape) for stored, scheme in zip(layers, schemes, strict=True)]
        weight, order = stack(read) if len(read) > 1 else read[0]
        bits = {scheme.bits for scheme in schemes}
        return Weight(weight, bits.pop() if len(bits) == 1 and bits <= set(BITS) else None, order)

    def late_names(self, model: nn.Module) -> list[str]:
        """The biases of experts."""
        inside = tuple(f"{home}." for home in experts.mixtures(model))
        return [f"{name}.bias" for name in self.sources if name.startswith(inside) and self._has_bias(model, name)]

    def late(self, model: nn.Module) -> dict[str, Tensor]:
        """Those biases."""
        found = {}
        for key in self.late_names(model):
            name = key.removesuffix(".bias")
            bias = self._bias(name, model.get_submodule(name), self.sources[name])
            assert bias is not None
            found[key] = bias.detach()
        return found

    def finish(self, model: nn.Module) -> None:
        """Nothing is left to be checked."""

    def why_dense(self, name: str) -> str:
        """By the quantization_config."""
        return "it is dense in the checkpoint"

    def close(self) -> None:
        """No file is kept open."""

    @staticmethod
    def _has_bias(model: nn.Module, name: str) -> bool:
        return model.get_submodule(name).bias is not None
