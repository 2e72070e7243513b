"""Bits: which weights of one parameter are kept, a bit each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmkern.formats._base import row_parts
from llmkern.formats.bitmask import pack_bits
from llmkern.ops.bitmask_linear.reference import unpack_bits


@dataclass(frozen=True, eq=False)
class Bits:
    """Kept weights of a parameter [N, K], [K, N] (`transposed`) or of a stack of either, as experts have them.

    bits uint8 [rows, ceil(columns / 8)] over the parameter's own layout, least significant bit first, 1 = kept, pad
    bits 0; rows are those of all matrices of the stack.
    """

    bits: Tensor
    shape: tuple[int, ...]
    transposed: bool = False

    @classmethod
    def pack(cls, keep: Tensor, transposed: bool = False) -> Bits:
        """From a bool tensor of two or three dimensions, True = kept."""
        return cls(pack_bits(keep.flatten(0, -2)), tuple(keep.shape), transposed)

    @classmethod
    def checked(cls, bits: Tensor, shape: tuple[int, ...], transposed: bool) -> Bits:
        """From what somebody stored; ValueError for bits that are none for this shape."""
        sizes = all(type(size) is int and size > 0 for size in shape)
        if not sizes or len(shape) not in (2, 3) or type(transposed) is not bool:
            raise ValueError(f"wanted a shape of two or three sizes, got {list(shape)}, transposed={transposed!r}")
        rows, columns = shape[-2] * (shape[0] if len(shape) == 3 else 1), shape[-1]
        wanted = (rows, -(-columns // 8))
        if bits.dtype != torch.uint8 or tuple(bits.shape) != wanted:
            raise ValueError(f"wanted uint8 {list(wanted)} for {list(shape)}, got {bits.dtype} {list(bits.shape)}")
        if columns % 8 and bool((bits[:, -1] >> (columns % 8)).any()):
            raise ValueError(f"a pad bit beyond column {columns - 1} is set")
        return cls(bits, tuple(shape), transposed)

    def unpack(self) -> Tensor:
        """The bool tensor, True = kept."""
        return unpack_bits(self.bits, self.shape[-1]).view(self.shape)

    def to(self, device: torch.device) -> Bits:
        """The same on another device; itself where it is there already."""
        return self if self.bits.device == device else replace(self, bits=self.bits.to(device))

    @property
    def size(self) -> int:
        """How many weights the parameter has."""
        return math.prod(self.shape)

    def zeros(self) -> int:
        """How many weights are not kept."""
        kept = sum(int(unpack_bits(self.bits[rows], self.shape[-1]).sum()) for rows in row_parts(self.bits))
        return self.size - kept

    def clear_(self, *tensors: Tensor) -> None:
        """Set to 0, in place, what is not kept of tensors of this shape on this device."""
        for pruned, parts in self._parts(tensors):
            for part in parts:
                part.masked_fill_(pruned, 0)

    def revived(self, tensor: Tensor) -> int:
        """How many values of a tensor of this shape are not 0 (or NaN) where nothing is kept."""
        return sum(int(((part != 0) & pruned).sum()) for pruned, (part,) in self._parts((tensor,)))

    def groups(self, m: int) -> tuple[Tensor, Tensor]:
        """How many weights each m columns of a row [N, K] keep: those of whole groups, those of the short last ones."""
        keep = self.unpack()
        keep = (keep.mT if self.transposed else keep).flatten(0, -2)
        whole = keep.shape[1] - keep.shape[1] % m
        return keep[:, :whole].reshape(-1, m).sum(-1), keep[:, whole:].sum(-1)

    def _parts(self, tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Some rows after the other: where they are pruned, and views of the same rows of each tensor."""
        n, k = self.shape[-2:]
        stacks = [tensor.detach() if len(self.shape) == 3 else tensor.detach()[None] for tensor in tensors]
        for at, bits in enumerate(self.bits.view(len(stacks[0]), n, -1 if n else 0)):
            for rows in row_parts(stacks[0][at]):
                yield ~unpack_bits(bits[rows], k), [stack[at][rows] for stack in stacks]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its share, which is a view; else the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor (FSDP2, tensor parallel), found without importing torch.distributed."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def shard(name: str, bits: Bits, parameter: Tensor) -> Bits:
    """The bits of what this rank holds of the parameter of this name, on its device; no communication.

    ValueError for a way of sharding in which masks cannot be cut.
    """
    own = local(parameter)
    if not is_sharded(parameter):
        return bits.to(own.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    keep = distribute_tensor(bits.unpack(), mesh, placements, src_data_rank=None).to_local()
    if keep.shape != own.shape:
        raise ValueError(f"MaskSet: {name}: a mask cannot be cut as its weight is: {placements}, {list(own.shape)}")
    return Bits.pack(keep, bits.transposed).to(own.device)
