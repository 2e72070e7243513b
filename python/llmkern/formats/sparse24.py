"""Sparse24Weight and Sparse24Int4Weight: two kept values of every four columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkern.formats import _base
from llmkern.formats.int4 import pack_words
from llmkern.ops._linear import FLOATS, groups
from llmkern.ops.int4_linear.reference import unpack_words
from llmkern.ops.sparse24_int4_linear.reference import dequantize as dequantize_int4
from llmkern.ops.sparse24_linear.reference import dequantize, unpack_positions


def _pair(bits: int) -> tuple[int, int]:
    kept = [column for column in range(4) if bits >> column & 1]
    filled = (kept + [column for column in range(4) if column not in kept])[:2]
    return (min(filled), max(filled)) if len(kept) <= 2 else (-1, -1)


# The two stored columns of a quad, by the bits of its kept ones; -1 where they are too many.
PAIR_OF_BITS = [_pair(bits) for bits in range(16)]


def choose_positions(name: str, weight: Tensor, mask: Tensor | None, first_row: int = 0) -> Tensor:
    """int64 [N, Q, 2], ascending: which two of every four columns are kept.

    With a mask (bool [N, K], True = kept) those it keeps, else those not 0; a quad that has fewer is filled up with
    its first other columns. ValueError if a quad keeps more than two; its row counts from `first_row`.
    """
    keep = (weight != 0) if mask is None else mask
    n, k = weight.shape
    if keep.shape != weight.shape:
        raise ValueError(f"{name}: mask must be {list(weight.shape)}, got {list(keep.shape)}")
    if mask is not None and bool(((weight != 0) & ~mask).any()):
        raise ValueError(f"{name}: weight is not 0 where the mask prunes it")
    pairs = torch.tensor(PAIR_OF_BITS, device=weight.device).index_select(0, kept_bits(keep).flatten())
    pairs = pairs.view(n, -(-k // 4), 2)
    if pairs.numel() and int(pairs.min()) < 0:
        row, quad = (int(i) for i in (pairs[..., 0] < 0).nonzero()[0])
        raise ValueError(
            f"{name}: not 2:4: row {first_row + row} keeps more than two of columns {4 * quad}..{4 * quad + 3}"
        )
    return pairs


def kept_bits(keep: Tensor) -> Tensor:
    """bool [N, K] -> int32 [N, ceil(K/4)]: a bit per column of a quad, the first the lowest."""
    n, k = keep.shape
    quads = torch.nn.functional.pad(keep, (0, -k % 4)).contiguous().view(torch.uint8)
    if not quads.numel():
        return quads.new_zeros(n, -(-k // 4), dtype=torch.int32)
    # The bytes of a quad, 0 or 1, are one number, the first the lowest; times this, byte i comes to bit 24 + i.
    return quads.view(torch.int32) * 0x01020408 >> 24 & 15


def keep_two(name: str, weight: Tensor, mask: Tensor | None, values: Tensor) -> tuple[Tensor, Tensor]:
    """Packed positions uint8 [N, ceil(Q/2)] of what weight [N, K] keeps, and of `values` [N, K] those kept [N, 2Q].

    Errors as `choose_positions`.
    """
    n, k = weight.shape
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(f"{name}: mask must be {list(weight.shape)}, got {list(mask.shape)}")
    n_quads = -(-k // 4)
    positions = weight.new_zeros(n, -(-n_quads // 2), dtype=torch.uint8)
    kept = values.new_zeros(n, 2 * n_quads)
    for rows in _base.row_parts(weight):
        pairs = choose_positions(name, weight[rows], None if mask is None else mask[rows], rows.start)
        positions[rows], kept[rows] = pack_positions(pairs), gather(values[rows], pairs)
    return positions, kept


def pack_positions(positions: Tensor) -> Tensor:
    """int64 [N, Q, 2] -> uint8 [N, ceil(Q/2)]; see ops/sparse24_linear/reference.py for the bits. Pad nibbles are 0."""
    nibbles = positions[..., 0] | (positions[..., 1] << 2)
    nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2))
    return (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).to(torch.uint8)


def gather(weight: Tensor, positions: Tensor) -> Tensor:
    """The kept values [N, 2Q] of a dense [N, K]."""
    n, k = weight.shape
    return torch.nn.functional.pad(weight, (0, -k % 4)).view(n, -(-k // 4), 4).gather(2, positions).flatten(1)


def check_positions(name: str, positions: Tensor, n: int, k: int) -> None:
    """ValueError unless positions are uint8 [N, ceil(Q/2)] and each quad's two are distinct and ascending."""
    n_quads = -(-k // 4)
    _base.check_tensor(name, "positions", positions, (torch.uint8,), (n, -(-n_quads // 2)))
    bad = torch.stack([positions & 3, positions >> 4 & 3], -1) >= torch.stack([positions >> 2 & 3, positions >> 6], -1)
    bad = bad.flatten(1)[:, :n_quads]
    if bad.any():
        pairs = unpack_positions(positions, n_quads)
        row, quad = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name}: a quad's two positions must be distinct and ascending, got {pairs[row, quad].tolist()} at row "
            f"{row}, quad {quad}"
        )


def check_quad_groups(name: str, group_size: int, k: int) -> None:
    """ValueError when a group ends inside a quad of four columns."""
    if group_size < k and group_size % 4:
        raise ValueError(f"{name}: group_size must be a multiple of 4 (or one group per row), got {group_size}")


@dataclass(frozen=True, eq=False)
class Sparse24Weight(_base.PackedWeight):
    """Two kept values of every four columns (a quad); the last quad may be short.

    values [N, 2Q], Q = ceil(K/4), fp32/bf16/fp16, or int8 with scales fp32/bf16/fp16 [N, G]; positions uint8
    [N, ceil(Q/2)], a nibble per quad, low nibble first: bits 0-1 the first kept column, bits 2-3 the second, ascending.
    """

    ops = ("sparse24_linear",)

    values: Tensor
    positions: Tensor
    scales: Tensor | None
    shape: tuple[int, int]
    group_size: int

    @classmethod
    def pack(
        cls, weight: Tensor, *, mask: Tensor | None = None, dtype: torch.dtype | None = None,
        group_size: int | None = None, scales: Tensor | None = None, scale_dtype: torch.dtype = torch.float32,
    ) -> Sparse24Weight:  # fmt: skip
        """Pack a weight [N, K] that is 2:4 already; `dtype`: of the values (default: weight's), int8 to quantize.

        int8 values are symmetric, on given scales or on each group's own range. ValueError if a quad of four columns
        keeps more than two.
        """
        name = "Sparse24Weight"
        shape = _base.check_weight(name, weight)
        group_size = _base.resolve_group_size(name, group_size, shape[1])
        check_quad_groups(name, group_size, shape[1])
        values = weight
        tensors = {}
        if dtype == torch.int8:
            if scales is None:
                scales, _ = _base.grid(weight, group_size, 8, True, scale_dtype)
            values = _base.quantize(weight, scales, None, group_size, 8)
            tensors["scales"] = scales
        tensors["positions"], kept = keep_two(name, weight, mask, values)
        tensors["values"] = kept.to(values.dtype if dtype is None else dtype)
        return cls.from_tensors(tensors, shape=shape, group_size=group_size)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], group_size: int | None = None
    ) -> Sparse24Weight:
        """Validate canonical tensors; ValueError names what is wrong."""
        name = "Sparse24Weight"
        found: dict[str, Any] = _base.take(name, tensors, ("values", "positions"), ("scales",))
        shape = _base.check_shape(name, shape)
        weight = cls(**found, shape=shape, group_size=_base.resolve_group_size(name, group_size, shape[1]))
        weight._validate()
        return weight

    def _validate(self) -> None:
        name, (n, k) = "Sparse24Weight", self.shape
        check_quad_groups(name, self.group_size, k)
        _base.check_tensor(name, "values", self.values, (*FLOATS, torch.int8), (n, 2 * -(-k // 4)))
        _base.check_finite(name, "values", self.values)
        check_positions(name, self.positions, n, k)
        if (self.values.dtype == torch.int8) != (self.scales is not None):
            raise ValueError(f"{name}: scales go with int8 values and only with them")
        if self.scales is not None:
            _base.check_tensor(name, "scales", self.scales, FLOATS, (n, groups(k, self.group_size)))
            _base.check_scale_values(name, self.scales)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K] with its zeros."""
        dense = dequantize(self.values, self.positions, self.scales, self.group_size, self.shape[1], torch.float32)
        return dense.to(dtype)

    def op_args(self, bias: Tensor | None) -> tuple[Any, ...]:
        """The arguments of sparse24_linear after x."""
        return self.values, self.positions, self.scales, bias, self.group_size


@dataclass(frozen=True, eq=False)
class Sparse24Int4Weight(_base.PackedWeight):
    """As Sparse24Weight with int4 codes: words int32 [N, ceil(2Q/8)] (as Int4Weight, over the kept values).

    scales fp32/bf16/fp16 [N, G], G = ceil(K / group_size) over the dense columns; positions as Sparse24Weight.
    """

    ops = ("sparse24_int4_linear",)

    words: Tensor
    positions: Tensor
    scales: Tensor
    shape: tuple[int, int]
    group_size: int

    @classmethod
    def pack(
        cls, weight: Tensor, *, mask: Tensor | None = None, group_size: int | None = 128,
        scales: Tensor | None = None, scale_dtype: torch.dtype = torch.float32,
    ) -> Sparse24Int4Weight:  # fmt: skip
        """Pack a weight [N, K] that is 2:4 already, rounding to the nearest symmetric int4 code.

        ValueError if a quad of four columns keeps more than two. `group_size=None` is one group per row.
        """
        name = "Sparse24Int4Weight"
        shape = _base.check_weight(name, weight)
        group_size = _base.resolve_group_size(name, group_size, shape[1])
        check_quad_groups(name, group_size, shape[1])
        if scales is None:
            scales, _ = _base.grid(weight, group_size, 4, True, scale_dtype)
        positions, codes = keep_two(name, weight, mask, _base.quantize(weight, scales, None, group_size, 4))
        tensors = {"words": pack_words(codes), "positions": positions, "scales": scales}
        return cls.from_tensors(tensors, shape=shape, group_size=group_size)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], group_size: int | None = None
    ) -> Sparse24Int4Weight:
        """Validate canonical tensors; ValueError names what is wrong."""
        name = "Sparse24Int4Weight"
        found: dict[str, Any] = _base.take(name, tensors, ("words", "positions", "scales"))
        shape = _base.check_shape(name, shape)
        weight = cls(**found, shape=shape, group_size=_base.resolve_group_size(name, group_size, shape[1]))
        weight._validate()
        return weight

    def _validate(self) -> None:
        name, (n, k) = "Sparse24Int4Weight", self.shape
        check_quad_groups(name, self.group_size, k)
        _base.check_tensor(name, "words", self.words, (torch.int32,), (n, -(-2 * -(-k // 4) // 8)))
        check_positions(name, self.positions, n, k)
        _base.check_tensor(name, "scales", self.scales, FLOATS, (n, groups(k, self.group_size)))
        _base.check_scale_values(name, self.scales)

    def codes(self) -> Tensor:
        """The kept signed codes int8 [N, 2Q]."""
        return unpack_words(self.words, 2 * -(-self.shape[1] // 4))

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K] with its zeros."""
        dense = dequantize_int4(self.words, self.positions, self.scales, self.group_size, self.shape[1], torch.float32)
        return dense.to(dtype)

    def op_args(self, bias: Tensor | None) -> tuple[Any, ...]:
        """The arguments of sparse24_int4_linear after x."""
        return self.words, self.positions, self.scales, bias, self.group_size
