"""compressed-tensors' older layouts of sparse weights, and 2:4 found in codes.

    sparse-24-bitmask   compressed [N, K / 2]   the kept values of each row, two of every four columns
                        bitmask uint8 [N, ceil(K / 8)]   bit i of byte j is column 8 j + i
                        shape int64 [2, 1]
    sparse-bitmask      compressed [nnz], bitmask, shape [2]
                        row_offsets int64 [N]   where each row's values begin

Values are floats, or int8 codes with weight_scale [N, G] beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.checkpoints.codes import parts
from llmkern.checkpoints.packed import check_shape
from llmkern.checkpoints.scheme import (
    INTEGERS,
    BadTensor,
    Layer,
    Part,
    Scheme,
    check_parts,
    check_scales,
    check_values,
    scales_part,
)
from llmkern.formats import BitmaskWeight, Int4Weight, Int8Weight, PackedWeight, Sparse24Int4Weight, Sparse24Weight
from llmkern.formats.int4 import pack_words
from llmkern.formats.sparse24 import PAIR_OF_BITS, keep_two, kept_bits
from llmkern.ops._linear import FLOATS
from llmkern.ops.bitmask_linear.reference import unpack_bits
from llmkern.ops.int4_linear.reference import unpack_words


def layout(scheme: Scheme, shape: tuple[int, int]) -> dict[str, Part]:
    """The tensors of a layer [N, K]."""
    n, k = shape
    two_of_four = scheme.format == "sparse-24-bitmask"
    if two_of_four and k % 4:
        raise BadTensor("compressed", f"needs K to be a multiple of 4, got K={k}")
    values = (torch.int8,) if scheme.bits else FLOATS
    found = {
        "compressed": Part(values, ((n, k // 2),) if two_of_four else ((-1,),)),
        "bitmask": Part((torch.uint8,), ((n, -(-k // 8)),)),
        "shape": Part(INTEGERS, ((2, 1), (2,))),
    }
    if not two_of_four:
        found["row_offsets"] = Part((torch.int64,), ((n,),))
    if scheme.bits:
        found["weight_scale"] = scales_part(n, scheme.groups(k))
        found["weight_zero_point"] = Part((torch.int8,), ((n, scheme.groups(k)),), optional=True)
        found["input_scale"] = Part(FLOATS, ((1,), ()), optional=True)
        found["input_zero_point"] = Part((torch.int8, *FLOATS), ((1,), ()), optional=True)
    return found


def read(scheme: Scheme, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Layer:
    """The packed layer with the values and the mask of the file."""
    k = shape[1]
    check_parts(layout(scheme, shape), tensors)
    check_shape("shape", tensors["shape"], shape)
    values, bitmask = tensors["compressed"], tensors["bitmask"]
    check_values("compressed", values)
    found = {"values": values}
    if scheme.bits:
        check_scales("weight_scale", tensors["weight_scale"])
        found["scales"] = tensors["weight_scale"]
        if "weight_zero_point" in tensors and bool(tensors["weight_zero_point"].any()):
            raise BadTensor("weight_zero_point", "must be 0 everywhere: a pruned weight is code 0")
    if k % 8 and bool((bitmask[:, -1] >> (k % 8)).any()):
        raise BadTensor("bitmask", f"must be 0 beyond column {k - 1}")
    group_size = min(scheme.group_size or k, k)
    if scheme.format == "sparse-24-bitmask":
        found["positions"] = _positions(bitmask, k)
        return Layer(Sparse24Weight.from_tensors(found, shape=shape, group_size=group_size), None)
    counts = unpack_bits(bitmask, k).sum(1, dtype=torch.int64)
    ends = torch.nn.functional.pad(counts, (1, 0)).cumsum(0)
    if not torch.equal(tensors["row_offsets"], ends[:-1]):
        row = int((tensors["row_offsets"] != ends[:-1]).nonzero()[0])
        wanted, got = int(ends[row]), int(tensors["row_offsets"][row])
        raise BadTensor("row_offsets", f"must be {wanted} in row {row}, as many bits are set before it, got {got}")
    if values.numel() != int(ends[-1]):
        raise BadTensor("compressed", f"must hold {int(ends[-1])} values, as many bits are set, got {values.numel()}")
    found |= {"bits": bitmask, "row_offsets": ends}
    return Layer(BitmaskWeight.from_tensors(found, shape=shape, group_size=group_size), None)


def _positions(bitmask: Tensor, k: int) -> Tensor:
    """A byte of the mask is two quads of four columns, as a byte of positions is."""
    quads = torch.stack([bitmask & 15, bitmask >> 4], -1).flatten(1)[:, : k // 4]
    counts = torch.tensor([bits.bit_count() for bits in range(16)], device=bitmask.device)[quads.int()]
    if bool((counts != 2).any()):
        row, quad = (int(i) for i in (counts != 2).nonzero()[0])
        raise BadTensor(
            "bitmask",
            f"must keep 2 of columns {4 * quad}..{4 * quad + 3} of row {row}, keeps {int(counts[row, quad])}",
        )
    nibble = torch.tensor([max(low, 0) | max(high, 0) << 2 for low, high in PAIR_OF_BITS], dtype=torch.uint8)
    nibbles = nibble.to(bitmask.device)[quads.int()]
    nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2))
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def with_24(weight: PackedWeight) -> PackedWeight:
    """The weight without its zeros where no quad of four columns has more than two codes other than 0.

    For Int4Weight and Int8Weight without zero points; anything else comes back as it is.
    """
    n, k = weight.shape
    if not isinstance(weight, Int4Weight | Int8Weight) or weight.zeros is not None:
        return weight
    if weight.group_size < k and weight.group_size % 4:
        return weight
    codes = weight.words if isinstance(weight, Int4Weight) else weight.codes
    name = "Sparse24Int4Weight" if isinstance(weight, Int4Weight) else "Sparse24Weight"
    quads = -(-k // 4)
    kept = codes.new_empty(n, 2 * quads, dtype=torch.int8)
    positions = codes.new_empty(n, -(-quads // 2), dtype=torch.uint8)
    for rows in parts(n, k):
        dense = unpack_words(codes[rows], k) if isinstance(weight, Int4Weight) else codes[rows]
        counts = torch.tensor([bits.bit_count() for bits in range(16)], device=codes.device)[kept_bits(dense != 0)]
        if bool((counts > 2).any()):
            return weight
        positions[rows], kept[rows] = keep_two(name, dense, None, dense)
    found = {"positions": positions, "scales": weight.scales}
    if isinstance(weight, Int4Weight):
        return Sparse24Int4Weight.from_tensors(
            {**found, "words": pack_words(kept)}, shape=weight.shape, group_size=weight.group_size
        )
    return Sparse24Weight.from_tensors({**found, "values": kept}, shape=weight.shape, group_size=weight.group_size)
