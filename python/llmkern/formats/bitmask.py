"""BitmaskWeight: unstructured sparsity as kept values and one bit per position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkern.formats import _base
from llmkern.ops._linear import FLOATS, groups
from llmkern.ops.bitmask_linear.reference import dequantize, unpack_bits


def pack_bits(keep: Tensor) -> Tensor:
    """bool [N, K] -> uint8 [N, ceil(K/8)], least significant bit first, pad bits 0."""
    n, k = keep.shape
    eights = torch.nn.functional.pad(keep, (0, -k % 8)).view(n, -(-k // 8), 8).to(torch.uint8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(-1, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class BitmaskWeight(_base.PackedWeight):
    """Kept values of each row and one bit per position; any sparsity.

    values [nnz] row after row, fp32/bf16/fp16, or int8 with scales fp32/bf16/fp16 [N, G]; bits uint8 [N, ceil(K/8)],
    least significant bit first, pad bits 0; row_offsets int64 [N + 1], where each row's values begin.
    """

    ops = ("bitmask_linear",)

    values: Tensor
    bits: Tensor
    row_offsets: Tensor
    scales: Tensor | None
    shape: tuple[int, int]
    group_size: int

    @classmethod
    def pack(
        cls, weight: Tensor, *, mask: Tensor | None = None, dtype: torch.dtype | None = None,
        group_size: int | None = None, scales: Tensor | None = None, scale_dtype: torch.dtype = torch.float32,
    ) -> BitmaskWeight:  # fmt: skip
        """Pack weight [N, K]: keep what the mask keeps (bool, True = kept), or what is not 0.

        `dtype` is that of the values (default: weight's), int8 to quantize symmetrically on given scales or on each
        group's own range.
        """
        name = "BitmaskWeight"
        shape = _base.check_weight(name, weight)
        group_size = _base.resolve_group_size(name, group_size, shape[1])
        keep = weight != 0 if mask is None else mask
        if keep.shape != weight.shape:
            raise ValueError(f"{name}: mask must be {list(shape)}, got {list(keep.shape)}")
        if mask is not None and bool((weight.masked_fill(mask, 0) != 0).any()):
            raise ValueError(f"{name}: weight is not 0 where the mask prunes it")
        counts = torch.nn.functional.pad(keep.sum(1, dtype=torch.int64), (1, 0))
        tensors = {"bits": pack_bits(keep), "row_offsets": counts.cumsum(0)}
        if dtype == torch.int8:
            if scales is None:
                scales, _ = _base.grid(weight, group_size, 8, True, scale_dtype)
            weight = _base.quantize(weight, scales, None, group_size, 8)
            tensors["scales"] = scales
        tensors["values"] = weight[keep].to(weight.dtype if dtype is None else dtype)
        return cls.from_tensors(tensors, shape=shape, group_size=group_size)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], group_size: int | None = None
    ) -> BitmaskWeight:
        """Validate canonical tensors; ValueError names what is wrong."""
        name = "BitmaskWeight"
        found: dict[str, Any] = _base.take(name, tensors, ("values", "bits", "row_offsets"), ("scales",))
        shape = _base.check_shape(name, shape)
        weight = cls(**found, shape=shape, group_size=_base.resolve_group_size(name, group_size, shape[1]))
        weight._validate()
        return weight

    def _validate(self) -> None:
        name, (n, k) = "BitmaskWeight", self.shape
        _base.check_tensor(name, "bits", self.bits, (torch.uint8,), (n, -(-k // 8)))
        _base.check_tensor(name, "row_offsets", self.row_offsets, (torch.int64,), (n + 1,))
        if k % 8 and n and bool((self.bits[:, -1] >> (k % 8)).any()):
            raise ValueError(f"{name}: a pad bit beyond column {k - 1} is set")
        counts = unpack_bits(self.bits, k).sum(1, dtype=torch.int64)
        if not torch.equal(self.row_offsets, torch.nn.functional.pad(counts, (1, 0)).cumsum(0)):
            raise ValueError(f"{name}: row_offsets do not match the number of bits set in each row")
        _base.check_tensor(name, "values", self.values, (*FLOATS, torch.int8), (int(counts.sum()),))
        _base.check_finite(name, "values", self.values)
        if (self.values.dtype == torch.int8) != (self.scales is not None):
            raise ValueError(f"{name}: scales go with int8 values and only with them")
        if self.scales is not None:
            _base.check_tensor(name, "scales", self.scales, FLOATS, (n, groups(k, self.group_size)))
            _base.check_scale_values(name, self.scales)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K] with its zeros."""
        dense = dequantize(self.values, self.bits, self.scales, self.group_size, self.shape[1], torch.float32)
        return dense.to(dtype)

    def op_args(self, bias: Tensor | None) -> tuple[Any, ...]:
        """The arguments of bitmask_linear after x."""
        return self.values, self.bits, self.row_offsets, self.scales, bias, self.group_size
