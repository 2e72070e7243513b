"""Packed weights as the tensors of a GPTQ checkpoint (AutoGPTQ v1 layout), and back. Symmetric 4 and 8 bits.

`qweight` [K * bits / 32, N] holds the same words as compressed-tensors, transposed. v1 stores zero points minus one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmkern.formats import Int4Weight, Int8Weight, PackedWeight, Sparse24Int4Weight
from llmkern.formats import compressed_tensors as ct

# Symmetric codes have zero point 2^(bits-1); v1 keeps one less in every field.
ZERO_WORDS = {4: 0x77777777, 8: 0x7F7F7F7F}
MULTIPLE = 32  # readers' kernels need K and N to be multiples of it


def encode(packed: PackedWeight) -> ct.Stored:
    """The tensors of one layer. ValueError for what the layout cannot hold exactly."""
    if not isinstance(packed, Int4Weight | Int8Weight | Sparse24Int4Weight):
        raise ValueError(
            f"gptq: the layout holds 4- and 8-bit codes, not {type(packed).__name__}; use compressed-tensors"
        )
    n, k = packed.shape
    if getattr(packed, "zeros", None) is not None:
        raise ValueError("gptq: only symmetric codes are written (v1 corrupts the neighbours of zero point 0)")
    if n % MULTIPLE or k % MULTIPLE or k % packed.group_size:
        raise ValueError(
            f"gptq: N and K must be multiples of {MULTIPLE} and K of group_size, got N={n}, K={k}, "
            f"group_size={packed.group_size}"
        )
    stored = ct.encode(packed)
    bits = 8 if isinstance(packed, Int8Weight) else 4
    scales = packed.scales.to(torch.float16)
    if not torch.equal(scales.to(packed.scales.dtype), packed.scales):
        raise ValueError("gptq: scales are stored as float16, and these are not; compress with scale_dtype float16")
    groups = scales.shape[1]
    tensors = {
        "qweight": stored.tensors["weight_packed"].T.contiguous(),
        "qzeros": torch.full((groups, n * bits // 32), ZERO_WORDS[bits], dtype=torch.int32),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(k) // packed.group_size).to(torch.int32),
    }
    return ct.Stored(tensors, {"bits": bits, "group_size": packed.group_size if groups > 1 else -1}, stored.extra)


def decode(
    kind: str, tensors: Mapping[str, Tensor], extra: Mapping[str, Tensor], *, shape: tuple[int, int], group_size: int
) -> PackedWeight:
    """The packed weight of class `kind` from what `encode` gave, scales in float16; ValueError for what is not that."""
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        if name not in tensors:
            raise ValueError(f"missing tensor {name!r}; got {', '.join(sorted(tensors)) or 'none'}")
    bits = 8 if kind == "Int8Weight" else 4
    if not bool((tensors["qzeros"] == ZERO_WORDS[bits]).all()):
        raise ValueError("qzeros are not those of symmetric codes")
    if not torch.equal(tensors["g_idx"].long(), torch.arange(shape[1], device=tensors["g_idx"].device) // group_size):
        raise ValueError(f"g_idx is not k // {group_size}")
    standard = {
        "weight_packed": tensors["qweight"].T,
        "weight_scale": tensors["scales"].T.clone(memory_format=torch.contiguous_format),
    }
    return ct.decode(kind, standard, extra, shape=shape, group_size=group_size)


def quantization_config(schemes: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of config.json. ValueError when layers differ: the layout has one setting for all."""
    first = schemes[0]
    if any(scheme != first for scheme in schemes):
        raise ValueError("gptq: all layers must have the same bits and group_size; use compressed-tensors")
    return {
        "quant_method": "gptq",
        "desc_act": False,  # groups are contiguous whatever order the solver took
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        **first,
    }
