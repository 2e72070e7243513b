"""Int4Weight: int4 codes in int32 words with a scale per row or per group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkern.formats import _base
from llmkern.ops._linear import FLOATS, groups
from llmkern.ops.int4_linear.reference import dequantize, unpack_words


def pack_words(codes: Tensor) -> Tensor:
    """Signed int4 codes [N, K] -> int32 words [N, ceil(K/8)]: u = q + 8, lowest nibble first, pad nibbles 0."""
    n, k = codes.shape
    words = codes.new_empty(n, -(-k // 8), dtype=torch.int32)
    for rows in _base.row_parts(codes):
        nibbles = torch.nn.functional.pad((codes[rows] + 8).to(torch.uint8), (0, -k % 8))
        # Least significant byte first, as on every machine torch runs on: 0x0b0a is two nibbles, and becomes 0xba.
        pairs = nibbles.view(torch.int16)
        words[rows] = (pairs | pairs >> 4).to(torch.uint8).view(torch.int32)
    return words


@dataclass(frozen=True, eq=False)
class Int4Weight(_base.PackedWeight):
    """w[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g], q in [-8, 7].

    words int32 [N, ceil(K/8)], code u = q + 8, least significant nibble first: the words of compressed-tensors
    pack-quantized; scales fp32/bf16/fp16 [N, G], G = ceil(K / group_size); zeros int8 [N, G] in [-8, 7] or None.
    """

    ops = ("int4_linear",)

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    group_size: int

    @classmethod
    def pack(
        cls, weight: Tensor, *, group_size: int | None = 128, symmetric: bool = True, scales: Tensor | None = None,
        zeros: Tensor | None = None, scale_dtype: torch.dtype = torch.float32,
    ) -> Int4Weight:  # fmt: skip
        """Round weight [N, K] to the nearest code, on a given grid (scales, zeros) or on each group's own range.

        `group_size=None` is one group per row.
        """
        shape = _base.check_weight("Int4Weight", weight)
        group_size = _base.resolve_group_size("Int4Weight", group_size, shape[1])
        if scales is None:
            scales, zeros = _base.grid(weight, group_size, 4, symmetric, scale_dtype)
        words = pack_words(_base.quantize(weight, scales, zeros, group_size, 4))
        tensors = {"words": words, "scales": scales} | ({} if zeros is None else {"zeros": zeros})
        return cls.from_tensors(tensors, shape=shape, group_size=group_size)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], group_size: int | None = None
    ) -> Int4Weight:
        """Validate canonical tensors; ValueError names what is wrong."""
        found: dict[str, Any] = _base.take("Int4Weight", tensors, ("words", "scales"), ("zeros",))
        shape = _base.check_shape("Int4Weight", shape)
        weight = cls(**found, shape=shape, group_size=_base.resolve_group_size("Int4Weight", group_size, shape[1]))
        weight._validate()
        return weight

    def _validate(self) -> None:
        n, k = self.shape
        grid = (n, groups(k, self.group_size))
        _base.check_tensor("Int4Weight", "words", self.words, (torch.int32,), (n, -(-k // 8)))
        _base.check_tensor("Int4Weight", "scales", self.scales, FLOATS, grid)
        _base.check_scale_values("Int4Weight", self.scales)
        if self.zeros is not None:
            _base.check_tensor("Int4Weight", "zeros", self.zeros, (torch.int8,), grid)
            if self.zeros.numel() and not (int(self.zeros.min()) >= -8 and int(self.zeros.max()) <= 7):
                raise ValueError("Int4Weight: zeros must be in [-8, 7]")

    def codes(self) -> Tensor:
        """Signed codes int8 [N, K]."""
        return unpack_words(self.words, self.shape[1])

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]."""
        return dequantize(self.words, self.scales, self.zeros, self.group_size, self.shape[1], torch.float32).to(dtype)

    def op_args(self, bias: Tensor | None) -> tuple[Any, ...]:
        """The arguments of int4_linear after x."""
        return self.words, self.scales, self.zeros, bias, self.group_size
