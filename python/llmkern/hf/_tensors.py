"""The tensors of a checkpoint's safetensors files by name, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern.weight_files import DTYPES


class Place(NamedTuple):
    """Where a tensor's values are: a tensor of a file, or of a stack of experts there the one `at`, perhaps turned."""

    file: str
    key: str
    at: int | None = None
    turned: bool = False


class Tensors:
    """Names -> places. Headers are read and checked when it is made; ValueError for a file that cannot be read."""

    def __init__(self, paths: Iterable[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self.places: dict[str, Place] = {}
        self._files: dict[str, Any] = {}
        for path in paths:
            if path.suffix != ".safetensors":
                raise ValueError(f"from_pretrained: {path.name}: wanted safetensors; nothing else is opened")
            try:
                file = self._files[path.name] = safe_open(path, framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise ValueError(f"from_pretrained: {path.name} cannot be read: {str(error).splitlines()[0]}") from None
            for key in file.keys():  # noqa: SIM118 -- no mapping
                if key in self.places:
                    other = self.places[key].file
                    raise ValueError(f"from_pretrained: {path.name}: tensor {key} is in {other} as well")
                self.places[key] = Place(path.name, key)

    def rename(self, name: Callable[[str], str]) -> None:
        """Give every tensor the name `name(...)` of it."""
        self.places = {name(key): place for key, place in self.places.items()}

    def of(self, layer: str) -> dict[str, str]:
        """The tensors of a layer: last part of the name -> name."""
        return self._by_owner().get(layer, {})

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, from the header."""
        file, key, at, turned = self.places[name]
        shape = list(self._files[file].get_slice(key).get_shape())[0 if at is None else 1 :]
        return shape[::-1] if turned else shape

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a tensor, from the header; None for one that nothing here is made of."""
        file, key = self.places[name][:2]
        return DTYPES.get(self._files[file].get_slice(key).get_dtype())

    def read(self, name: str) -> Tensor:
        """A tensor's values, on the CPU."""
        file, key, at, turned = self.places[name]
        if at is None:
            return self._files[file].get_tensor(key)
        part = self._files[file].get_slice(key)[at]
        return part.T.contiguous() if turned else part

    def file_of(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return self.places[name].file

    def close(self) -> None:
        """Let go of the files; tensors that were read stay."""
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files = {}

    def _by_owner(self) -> dict[str, dict[str, str]]:
        # Asked once per layer; the places change only while a model is prepared.
        if getattr(self, "_owners", (None,))[0] is not self.places:
            owners: dict[str, dict[str, str]] = {}
            for name in self.places:
                owner, _, leaf = name.rpartition(".")
                owners.setdefault(owner, {})[leaf] = name
            self._owners = (self.places, owners)
        return self._owners[1]
