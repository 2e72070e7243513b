"""Int8Weight: int8 codes with a scale per row or per group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkern.formats import _base
from llmkern.ops._linear import FLOATS, groups
from llmkern.ops.int8_linear.reference import dequantize


@dataclass(frozen=True, eq=False)
class Int8Weight(_base.PackedWeight):
    """w[n, k] = (codes[n, k] - zeros[n, k // g]) * scales[n, k // g].

    codes int8 [N, K]; scales fp32/bf16/fp16 [N, G], G = ceil(K / group_size); zeros int8 [N, G] or None (symmetric).
    """

    ops = ("int8_linear", "int8_dynamic_linear")

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    group_size: int

    @classmethod
    def pack(
        cls, weight: Tensor, *, group_size: int | None = None, symmetric: bool = True, scales: Tensor | None = None,
        zeros: Tensor | None = None, scale_dtype: torch.dtype = torch.float32,
    ) -> Int8Weight:  # fmt: skip
        """Round weight [N, K] to the nearest code, on a given grid (scales, zeros) or on each group's own range."""
        _, k = _base.check_weight("Int8Weight", weight)
        group_size = _base.resolve_group_size("Int8Weight", group_size, k)
        if scales is None:
            scales, zeros = _base.grid(weight, group_size, 8, symmetric, scale_dtype)
        codes = _base.quantize(weight, scales, zeros, group_size, 8)
        tensors = {"codes": codes, "scales": scales} | ({} if zeros is None else {"zeros": zeros})
        return cls.from_tensors(tensors, group_size=group_size)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, shape: tuple[int, int] | None = None, group_size: int | None = None
    ) -> Int8Weight:
        """Validate canonical tensors; ValueError names what is wrong. `shape` defaults to that of codes."""
        found: dict[str, Any] = _base.take("Int8Weight", tensors, ("codes", "scales"), ("zeros",))
        shape = _base.check_shape("Int8Weight", tuple(found["codes"].shape) if shape is None else shape)
        weight = cls(**found, shape=shape, group_size=_base.resolve_group_size("Int8Weight", group_size, shape[1]))
        weight._validate()
        return weight

    def _validate(self) -> None:
        n, k = self.shape
        grid = (n, groups(k, self.group_size))
        _base.check_tensor("Int8Weight", "codes", self.codes, (torch.int8,), (n, k))
        _base.check_tensor("Int8Weight", "scales", self.scales, FLOATS, grid)
        _base.check_scale_values("Int8Weight", self.scales)
        if self.zeros is not None:
            _base.check_tensor("Int8Weight", "zeros", self.zeros, (torch.int8,), grid)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]."""
        return dequantize(self.codes, self.scales, self.zeros, self.group_size, torch.float32).to(dtype)

    def op_args(self, bias: Tensor | None) -> tuple[Any, ...]:
        """The arguments of int8_linear after x."""
        return self.codes, self.scales, self.zeros, bias, self.group_size
