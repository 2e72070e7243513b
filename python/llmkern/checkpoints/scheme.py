"""What readers share: a layer's scheme, the tensors that a format wants, and the error for a tensor that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern.formats import PackedWeight
from llmkern.formats._base import are_scales
from llmkern.ops._linear import FLOATS

INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Scheme:
    """How one layer is stored.

    format: the layout, as `FORMATS` of the package names it; bits: of a code, 0 for float values; group_size: columns
    that share a scale, None for one scale per row; per_tensor: one scale for the whole layer; act_order: the layer may
    hold an index of its columns' groups; activations: "int8" where x is quantized, else None; word_layout: how codes
    of a width that does not divide 32 lie in words, "dense" or "padded", None where the tensors must tell;
    zero_rule: how GPTQ's zero points come out of their fields (`gptq.ZERO_RULES`).
    """

    format: str
    bits: int = 0
    symmetric: bool = True
    group_size: int | None = None
    per_tensor: bool = False
    act_order: bool = False
    activations: str | None = None
    word_layout: str | None = None
    zero_rule: str = "plain"

    @property
    def packed(self) -> str:
        """The name of the packed class that a layer becomes."""
        if self.format in ("sparse-24-bitmask", "marlin-24"):
            return "Sparse24Int4Weight" if self.format == "marlin-24" and self.bits == 4 else "Sparse24Weight"
        if self.format == "sparse-bitmask":
            return "BitmaskWeight"
        return "Int4Weight" if self.bits <= 4 else "Int8Weight"

    def groups(self, k: int) -> int:
        """How many scales a row of `k` columns has."""
        return 1 if self.group_size is None else -(-k // self.group_size)


class Layer(NamedTuple):
    """A packed weight [N, K], and the columns of x that its columns belong to (int32 [K]; None: in order)."""

    weight: PackedWeight
    input_order: Tensor | None


class Part(NamedTuple):
    """One tensor of a layer: the dtypes and shapes it may have (the usual one first; a size of -1 is any); optional:
    it may be absent.
    """

    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False


class BadTensor(ValueError):
    """A tensor of a layer is missing, unknown, or not what it must be; `leaf` is its name inside the layer."""

    def __init__(self, leaf: str, text: str) -> None:
        super().__init__(f"{leaf} {text}")
        self.leaf, self.text = leaf, text


class Schemes:
    """What a quantization_config says of each layer."""

    method = ""

    def __init__(self, formats: tuple[str, ...], notes: tuple[str, ...] = ()) -> None:
        """`notes`: what runs otherwise than the config says."""
        self.formats, self.notes = formats, notes

    def of(self, name: str, kind: str = "Linear", also: tuple[str, ...] = ()) -> Scheme | None:
        """The scheme of a module, None where it stays dense.

        name: its dotted name in the checkpoint; kind: the name of its class; also: other names that it goes by.
        """
        raise NotImplementedError


def check_parts(parts: Mapping[str, Part], tensors: Mapping[str, Tensor]) -> None:
    """BadTensor unless the tensors are those of a layout, in dtype and shape."""
    for leaf in tensors:
        if leaf not in parts:
            raise BadTensor(leaf, f"is not a tensor of this layout; known: {', '.join(parts)}")
    for leaf, part in parts.items():
        tensor = tensors.get(leaf)
        if tensor is None:
            if not part.optional:
                raise BadTensor(leaf, f"is missing; got {', '.join(sorted(tensors)) or 'none'}")
            continue
        if tensor.dtype not in part.dtypes:
            raise BadTensor(leaf, f"must be {' or '.join(map(name_of, part.dtypes))}, got {name_of(tensor.dtype)}")
        if not any(_fits(tuple(tensor.shape), shape) for shape in part.shapes):
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(part.shapes)).replace("-1", "any")
            raise BadTensor(leaf, f"must be {wanted}, got {list(tensor.shape)}")


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, size) for size, want in zip(shape, wanted, strict=True))


def check_scales(leaf: str, scales: Tensor) -> None:
    """BadTensor for a NaN, infinite, zero or negative scale."""
    if not are_scales(scales):
        at = [int(i) for i in (~(torch.isfinite(scales) & (scales > 0))).nonzero()[0]]
        raise BadTensor(leaf, f"must be finite and above 0, got {float(scales[tuple(at)])} at {at}")


def check_values(leaf: str, values: Tensor) -> None:
    """BadTensor for a value that is NaN or infinite."""
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        at = [int(i) for i in (~torch.isfinite(values)).nonzero()[0]]
        raise BadTensor(leaf, f"must be finite, got {float(values[tuple(at)])} at {at}")


def scales_part(n: int, groups: int) -> Part:
    """Scales [N, G]."""
    return Part(FLOATS, ((n, groups),))


def name_of(dtype: torch.dtype) -> str:
    """Without torch's prefix."""
    return str(dtype).removeprefix("torch.")


def integer(config: Mapping[str, Any], key: str, where: str) -> int:
    """An int of a configuration; ValueError for anything else (a bool, a float, a string)."""
    value = config.get(key)
    if type(value) is not int:
        raise ValueError(f"{where}: {key} must be an int, got {value!r}")
    return value


def group_size(config: Mapping[str, Any], where: str) -> int | None:
    """Columns of a group; None for whole rows, which GPTQ and AWQ write as -1. ValueError for any other number."""
    value = integer(config, "group_size", where)
    if value < 1 and value != -1:
        raise ValueError(f"{where}: group_size must be -1 or at least 1, got {value}")
    return None if value == -1 else value


def choice(config: Mapping[str, Any], key: str, default: Any, known: tuple[Any, ...], where: str) -> Any:
    """A value of a configuration that must be one of a few."""
    value = config.get(key, default)
    if not any(type(value) is type(one) and value == one for one in known):
        raise ValueError(f"{where}: {key} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value
