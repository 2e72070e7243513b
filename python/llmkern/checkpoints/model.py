"""A model whose linear layers are those of a folder that others wrote, packed.

Layer after layer is read, packed and put in its place, so that of the files no more than one layer is in memory beside
the model. What is not in codes goes through transformers' own rules for names and dtypes. A mixture whose experts are
stored one by one becomes `Experts`, the matrices that the model's class has as one (gate and up) one packed weight.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkern import experts
from llmkern._pages import give_back
from llmkern.checkpoints.folder import CACHE, Folder
from llmkern.checkpoints.layers import read_layer, stack
from llmkern.checkpoints.scheme import BadTensor, Layer, Scheme
from llmkern.formats.bit_words import BITS
from llmkern.nn import PackedLinear, dense_weight, is_conv1d, is_linear
from llmkern.skeleton import build
from llmkern.weight_files import Reader, without_place


class Place(NamedTuple):
    """Where a layer of the files belongs: a linear layer of the model, of whose rows it is one of `parts`."""

    name: str
    at: int = 0
    parts: int = 1


def read_model(path: str | Path, device: torch.device | str | None = "cpu", *, find_24: bool = False) -> Any:
    """The model of a folder of compressed-tensors, GPTQ or AWQ weights, in eval mode, its layers packed.

    The class is the first of config.json's `architectures`, one of transformers' own; no code of the folder runs and
    nothing is unpickled. find_24: leave the zeros out of symmetric codes that are 2:4. Warns of what runs otherwise
    than the config says.

    Raises FileNotFoundError without config.json or safetensors, ImportError without transformers, ValueError for
    whatever is missing, unknown, not read, or not as it must be.
    """
    folder = Folder(path)
    device = torch.device("cpu" if device is None else device)
    model = skeleton(folder)
    Loading(folder, model, device, find_24).run()
    for note in folder.schemes.notes:
        warnings.warn(f"load: {folder.path}: {note}", stacklevel=3)
    give_back()
    return model.to(device).eval()


def skeleton(folder: Folder) -> Any:
    """The model of config.json without weights, by the class that its `architectures` name."""
    try:
        import transformers
    except ImportError:
        raise ImportError("load: transformers is not installed; pip install 'llmkern[hf]'") from None

    path, names = folder.path / "config.json", folder.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"load: {path}: architectures name {name!r:.100}, no model class of transformers")
    tensors = folder.files.tensors
    return build(folder.path, kind, sorted({stored.path for stored in tensors.values()}), len(tensors))


class Loading:
    """One folder into one model."""

    def __init__(self, folder: Folder, model: Any, device: torch.device, find_24: bool) -> None:
        self.folder, self.model, self.device, self.find_24 = folder, model, device, find_24
        self.reader = Reader(model, folder.files)

    def run(self) -> None:
        """Put every tensor in its place. ValueError for one too many or too few."""
        places = self._places()
        coded = {key for leaves in self.folder.layers.values() for key in leaves.values()}
        targets, unknown = self.reader.targets(self.model)
        dense = {key: target for key, target in targets.items() if key not in coded}
        self.folder.files.check(self.model, dense)
        self._refuse_unknown([key for key in unknown if key not in coded])
        mixtures = {place.name.rsplit(".", 2)[0] for place in places.values()}
        with experts.unfused(self.model, only=mixtures.__contains__):
            sources = self._sources(places, {target.name for target in dense.values()})
            new = {name: self._packed(name, layers) for name, layers in sources.items()}
            experts.replace(self.model, {self.model.get_submodule(name): layer for name, layer in new.items()})
        packed = {f"{name}.weight" for name in sources}
        tied = self.model.all_tied_weights_keys
        self.model.all_tied_weights_keys = {
            name: source for name, source in tied.items() if name not in packed and source not in packed
        }
        with torch.no_grad():
            self.reader.load(self.model, list(dense))
        self._tie({target.name for target in dense.values()})

    def _places(self) -> dict[str, Place]:
        """Where each layer of codes belongs."""
        wanted = self.model.state_dict()
        found = {}
        for layer in self.folder.layers:
            name, pattern = self.reader.rename(self.model, f"{layer}.weight", wanted)
            if name not in wanted:
                first = next(iter(self.folder.layers[layer].values()))
                raise ValueError(
                    f"load: {self.folder.files.tensors[first].path}: tensor {first!r} belongs to no layer of "
                    f"{type(self.model).__name__}"
                )
            found[layer] = (
                Place(name.removesuffix(".weight")) if pattern is None else self._expert(layer, name, pattern)
            )
        return found

    def _expert(self, layer: str, name: str, pattern: str) -> Place:
        """The place of one expert's matrix, which the model's class has inside a 3-D parameter."""
        rule = next(rule for rule in self.reader.converters if pattern in rule.source_patterns)
        steps = [type(step).__name__ for step in rule.operations]
        number = re.search(r"\.experts\.(\d+)\.", layer)
        parts = len(rule.source_patterns)
        known = ["MergeModulelist"] if parts == 1 else ["MergeModulelist", "Concatenate"]
        if number is None or steps != known or (parts > 1 and getattr(rule.operations[1], "dim", None) != 1):
            raise ValueError(
                f"load: {self.folder.path}: {layer} becomes {name} by {', '.join(steps)}, which is not done to codes"
            )
        home, _, projection = name.rpartition(".")
        return Place(f"{home}.{int(number[1])}.{projection}", rule.source_patterns.index(pattern), parts)

    def _sources(self, places: dict[str, Place], dense: set[str]) -> dict[str, list[str]]:
        """Layer of the model -> the layers of the files that it is made of, in order."""
        found: dict[str, dict[int, str]] = {}
        for layer, place in places.items():
            own = found.setdefault(place.name, {})
            if place.at in own or f"{place.name}.weight" in dense:
                raise ValueError(f"load: {self.folder.path}: {place.name} is stored twice, once as {layer}")
            own[place.at] = layer
        sizes = {place.name: place.parts for place in places.values()}
        for name, own in found.items():
            if len(own) != sizes[name]:
                raise ValueError(f"load: {self.folder.path}: of {name} only {', '.join(own.values())} is stored")
        for home, mixture in experts.mixtures(self.model).items():
            if list(mixture.gating.state_dict()):
                raise ValueError(f"load: {self.folder.path}: {home} has weights beside its experts, which are not read")
            for at in range(mixture.num_experts):
                for projection in mixture.projections(at):
                    if f"{home}.{at}.{projection}" not in found:
                        raise ValueError(f"load: {self.folder.path}: no codes for {home}.{at}.{projection}")
        return {name: [own[at] for at in sorted(own)] for name, own in found.items()}

    def _packed(self, name: str, layers: list[str]) -> PackedLinear:
        """The layer `name`, packed, of one or more layers of the files."""
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"load: {self.folder.path}: {layers[0]} becomes {name}, which the model lacks") from None
        if not is_linear(module):
            raise ValueError(
                f"load: {self.folder.path}: {layers[0]} is a {type(module).__name__}, wanted a linear layer"
            )
        n, k = dense_weight(module).shape
        if n % len(layers):
            raise ValueError(f"load: {self.folder.path}: {name} has {n} rows, for {len(layers)} layers of the files")
        kind, read = type(module).__name__, []
        for layer in layers:
            scheme = self.folder.scheme(layer, kind, (name,))
            read.append((scheme, self._read(layer, scheme, (n // len(layers), k))))
        if len({scheme.activations for scheme, _ in read}) > 1:
            raise ValueError(f"load: {self.folder.path}: {name}: {', '.join(layers)} differ in their activations")
        try:
            weight, order = stack([layer for _, layer in read]) if len(read) > 1 else read[0][1]
        except ValueError as error:
            raise ValueError(f"load: {self.folder.path}: {name}: {error}") from None
        bias = self._bias(name, module, layers)
        method = f"{self.folder.schemes.method} {read[0][0].format}"
        bits = max(scheme.bits for scheme, _ in read)
        packed = PackedLinear(
            weight.to(self.device), bias, activations=read[0][0].activations, conv1d=is_conv1d(module), method=method,
            num_bits=bits if bits in BITS else None, input_order=None if order is None else order.to(self.device),
        )  # fmt: skip
        return packed.train(module.training)

    def _read(self, layer: str, scheme: Scheme, shape: tuple[int, int]) -> Layer:
        leaves = self.folder.layers[layer]
        try:
            tensors = {leaf: self.folder.read(key) for leaf, key in leaves.items() if leaf != "bias"}
            return read_layer(scheme, tensors, shape, find_24=self.find_24)
        except BadTensor as error:
            raise self.folder.wrong(layer, error) from None

    def _bias(self, name: str, module: nn.Module, layers: list[str]) -> nn.Parameter | None:
        """The bias of a layer, in the model's dtype as its other dense parameters."""
        keys = [self.folder.layers[layer].get("bias") for layer in layers]
        if module.bias is None and not any(bool(self.folder.read(key).any()) for key in keys if key):
            return None  # older GPTQ files hold one of zeros where the model has none
        if module.bias is None or not all(keys):
            raise ValueError(
                f"load: {self.folder.path}: {name} has {'a bias only in the files' if any(keys) else 'no bias there'}"
            )
        read: list[Tensor] = [self.folder.read(key) for key in keys if key]
        bias = torch.cat(read) if all(one.ndim == 1 for one in read) else read[0]
        shape = tuple(module.bias.shape)  # type: ignore[arg-type]
        if bias.shape != shape or not bias.is_floating_point() or not bool(torch.isfinite(bias).all()):
            stored = self.folder.files.tensors[str(keys[0])]
            raise ValueError(
                f"load: {stored.path}: tensor {keys[0]!r} must be finite floats {list(shape)}, got {bias.dtype} "
                f"{list(bias.shape)}"
            )
        return nn.Parameter(bias.to(self.device, module.bias.dtype), requires_grad=False)  # type: ignore[arg-type]

    def _refuse_unknown(self, unknown: list[str]) -> None:
        cache = CACHE if self.folder.schemes.notes else ()
        left = [key for key in without_place(self.model, unknown) if key.rpartition(".")[2] not in cache]
        if left:
            raise ValueError(
                f"load: {self.folder.files.tensors[left[0]].path}: {type(self.model).__name__} has no place for tensor "
                f"{left[0]!r} ({len(left)} such tensors)"
            )

    def _tie(self, loaded: set[str]) -> None:
        """Give tied parameters their values. ValueError for a tensor that the files do not give."""
        own = set(_packed_tensors(self.model))
        missing = {name for name in self.model.state_dict() if name not in loaded and name not in own}
        self.model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
        tensors = {**dict(self.model.named_parameters(remove_duplicate=False)), **dict(self.model.named_buffers())}
        empty = sorted(
            name for name in missing
            if tensors[name].is_meta or (name not in dict(self.model.named_parameters(remove_duplicate=False)))
        )  # fmt: skip
        if empty:
            raise ValueError(f"load: {self.folder.path}: no values for {empty[0]} ({len(empty)} tensors)")


def _packed_tensors(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield from (f"{name}.{tensor}" for tensor in (*module._buffers, "bias"))
