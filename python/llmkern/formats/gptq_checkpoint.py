"""Packed weights as the tensors of a GPTQ checkpoint (AutoGPTQ v1 layout), and back. Symmetric, 2, 3, 4 and 8 bits.

`qweight` [K * bits / 32, N] holds the same words as compressed-tensors, transposed. v1 stores zero points minus one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmkern._version import __version__
from llmkern.formats import Int4Weight, Int8Weight, PackedWeight, Sparse24Int4Weight
from llmkern.formats import compressed_tensors as ct
from llmkern.formats._base import resolve_group_size
from llmkern.formats.bit_words import pack_codes

MULTIPLE = 32  # readers' kernels need K and N to be multiples of it


def encode(packed: PackedWeight, *, bits: int | None = None, act_order: str | None = None) -> ct.Stored:
    """The tensors of one layer; arguments as `compressed_tensors.encode`.

    ValueError for what the layout cannot hold exactly.
    """
    if not isinstance(packed, Int4Weight | Int8Weight | Sparse24Int4Weight):
        raise ValueError(
            f"gptq: the layout holds dense codes of integers, not {type(packed).__name__}; use compressed-tensors"
        )
    n, k = packed.shape
    if getattr(packed, "zeros", None) is not None:
        raise ValueError("gptq: only symmetric codes are written (v1 corrupts the neighbours of zero point 0)")
    if n % MULTIPLE or k % MULTIPLE or k % packed.group_size:
        raise ValueError(
            f"gptq: N and K must be multiples of {MULTIPLE} and K of group_size, got N={n}, K={k}, "
            f"group_size={packed.group_size}"
        )
    bits = bits or (8 if isinstance(packed, Int8Weight) else 4)
    stored = ct.encode(packed, bits=bits)
    scales = packed.scales.to(torch.float16)
    if not torch.equal(scales.to(packed.scales.dtype), packed.scales):
        raise ValueError("gptq: scales are stored as float16, and these are not; compress with scale_dtype float16")
    groups = scales.shape[1]
    tensors = {
        "qweight": stored.tensors["weight_packed"].T.contiguous(),
        "qzeros": zero_words(groups, n, bits),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(k) // packed.group_size).to(torch.int32),
    }
    scheme = {"bits": bits, "group_size": packed.group_size if groups > 1 else -1, "static_groups": bool(act_order)}
    return ct.Stored(tensors, scheme, stored.extra)


def zero_words(groups: int, n: int, bits: int) -> Tensor:
    """The `qzeros` int32 [G, N * bits / 32] of symmetric codes: u has zero point 2^(bits-1), and v1 keeps one less."""
    return pack_codes(torch.full((groups, n), -1, dtype=torch.int8), bits)


def decode(
    kind: str, tensors: Mapping[str, Tensor], extra: Mapping[str, Tensor], *, shape: tuple[int, int], group_size: int,
    bits: int | None = None,
) -> PackedWeight:  # fmt: skip
    """The packed weight of class `kind` from what `encode` gave, scales in float16; ValueError for what is not that."""
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        if name not in tensors:
            raise ValueError(f"missing tensor {name!r}; got {', '.join(sorted(tensors)) or 'none'}")
    bits = bits or (8 if kind == "Int8Weight" else 4)
    resolve_group_size("gptq", group_size, shape[1])
    zeros = zero_words(-(-shape[1] // group_size), shape[0], bits)
    _same("qzeros", tensors["qzeros"], zeros, "those of symmetric codes")
    _same("g_idx", tensors["g_idx"], (torch.arange(shape[1]) // group_size).to(torch.int32), f"k // {group_size}")
    standard = {
        "weight_packed": tensors["qweight"].T,
        "weight_scale": tensors["scales"].T.clone(memory_format=torch.contiguous_format),
    }
    return ct.decode(kind, standard, extra, shape=shape, group_size=group_size, bits=bits)


def quantization_config(schemes: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of config.json. ValueError when layers differ: the layout has one setting for all."""
    grids = [{key: scheme[key] for key in ("bits", "group_size")} for scheme in schemes]
    if any(grid != grids[0] for grid in grids):
        raise ValueError("gptq: all layers must have the same bits and group_size; use compressed-tensors")
    return {
        "quant_method": "gptq",
        "desc_act": False,  # groups are contiguous whatever order the solver took
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {
            "quantizer": [f"llmkern:{__version__}"],
            "static_groups": all(scheme["static_groups"] for scheme in schemes),
        },
        **grids[0],
    }


def _same(name: str, tensor: Tensor, wanted: Tensor, what: str) -> None:
    """ValueError unless the tensor is the one that symmetric, ordered groups have."""
    if tensor.dtype != wanted.dtype or tensor.shape != wanted.shape:
        raise ValueError(f"{name} must be {wanted.dtype} {list(wanted.shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if not torch.equal(tensor, wanted.to(tensor.device)):
        raise ValueError(f"{name} must be {what}")
