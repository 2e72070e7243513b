"""Packed weights as the tensors of a compressed-tensors checkpoint, and back.

Int4Weight -> `pack-quantized` of 4 bits, the same words, or of 2 or 3 where the codes were solved for fewer; Int8Weight
-> of 8 bits; Int8Weight per row with int8 activations -> `int-quantized`. Sparse weights with codes are stored as their
dense codes (code 0 where pruned), those with float values as an ordinary dense `weight` with its zeros, so that readers
who know nothing of sparsity read the right numbers. Where kept values are 0 the dense form does not tell the mask;
`extra` holds it then.

Layout: compressed-tensors 0.20, `compressors/pack_quantized` (codes u = q + 2^(bits-1), least significant first).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern.formats import BitmaskWeight, Int4Weight, Int8Weight, PackedWeight, Sparse24Int4Weight, Sparse24Weight
from llmkern.formats.bit_words import pack_codes, unpack_codes, width
from llmkern.formats.bitmask import pack_bits
from llmkern.formats.int4 import pack_words
from llmkern.formats.sparse24 import choose_positions, gather, pack_positions
from llmkern.ops.bitmask_linear.reference import unpack_bits
from llmkern.ops.sparse24_linear.reference import scatter, unpack_positions

Kind = type[PackedWeight]
KINDS: dict[str, Kind] = {
    kind.__name__: kind for kind in (Int4Weight, Int8Weight, Sparse24Weight, Sparse24Int4Weight, BitmaskWeight)
}


class Stored(NamedTuple):
    """tensors: by their suffix (`weight_packed`); scheme: the `weights` entry of the config group, None for a plain
    dense weight; extra: what the standard layout has no place for, by canonical name.
    """

    tensors: dict[str, Tensor]
    scheme: dict[str, Any] | None
    extra: dict[str, Tensor]


def encode(
    packed: PackedWeight, *, activations: str | None = None, bits: int | None = None, act_order: str | None = None
) -> Stored:
    """The tensors and the scheme of one layer.

    bits: of its codes in the file (default: what the class stores); act_order: "static" if the solver took the columns
    in another order. ValueError for codes that need more bits.
    """
    if isinstance(packed, Int4Weight):
        words = packed.words if bits in (None, 4) else pack_codes(packed.codes(), bits)
        return _with_grid(packed, {"weight_packed": words}, bits or 4, act_order, packed.zeros)
    if isinstance(packed, Int8Weight):
        if activations and packed.zeros is None and packed.scales.shape[1] == 1:
            tensors = {"weight": packed.codes, "weight_scale": packed.scales}
            return Stored(tensors, _scheme(packed, 8, act_order, True), {})
        return _with_grid(packed, {"weight_packed": pack_codes(packed.codes, 8)}, 8, act_order, packed.zeros)
    if isinstance(packed, Sparse24Int4Weight):
        codes = scatter(packed.codes(), packed.positions, packed.shape[1])
        stored = _with_grid(packed, {"weight_packed": pack_codes(codes, bits or 4)}, bits or 4, act_order, None)
        return stored._replace(extra=_positions_if_needed(packed, codes))
    if isinstance(packed, Sparse24Weight):
        dense = scatter(packed.values, packed.positions, packed.shape[1])
        extra = _positions_if_needed(packed, dense)
    elif isinstance(packed, BitmaskWeight):
        keep = unpack_bits(packed.bits, packed.shape[1])
        dense = torch.zeros(keep.shape, dtype=packed.values.dtype, device=packed.device)
        dense[keep] = packed.values
        extra = {} if torch.equal(dense != 0, keep) else {"bits": packed.bits}
    else:
        raise TypeError(f"compressed-tensors: no layout for {type(packed).__name__}")
    if packed.scales is None:
        return Stored({"weight": dense.contiguous()}, None, extra)
    return _with_grid(packed, {"weight_packed": pack_codes(dense, 8)}, 8, act_order, None)._replace(extra=extra)


def decode(
    kind: str, tensors: Mapping[str, Tensor], extra: Mapping[str, Tensor], *, shape: tuple[int, int], group_size: int,
    bits: int | None = None,
) -> PackedWeight:  # fmt: skip
    """The packed weight of class `kind` from what `encode` gave, bit for bit; ValueError for what is not that."""
    if kind not in KINDS:
        raise ValueError(f"unknown packed weight {kind!r}; known: {', '.join(KINDS)}")
    if "weight_shape" in tensors and tensors["weight_shape"].tolist() != list(shape):
        found_shape = str(tensors["weight_shape"].tolist())
        raise ValueError(f"weight_shape is {found_shape:.100}, but the layer is {list(shape)}")
    scales = tensors.get("weight_scale")
    found: dict[str, Tensor] = {} if scales is None else {"scales": scales}
    n, k = shape
    bits = bits or (4 if "Int4" in kind else 8)
    if kind == "Int4Weight":
        words = _need(tensors, "weight_packed")
        found["words"] = words if bits == 4 else pack_words(_codes(words, bits, k))
    elif kind == "Int8Weight":
        plain = tensors.get("weight")
        found["codes"] = _codes(_need(tensors, "weight_packed"), 8, k) if plain is None else plain
    if kind in ("Int4Weight", "Int8Weight"):
        if "weight_zero_point" in tensors:
            found["zeros"] = unpack_zeros(tensors["weight_zero_point"], n, bits)
        return KINDS[kind].from_tensors(found, shape=shape, group_size=group_size)  # type: ignore[attr-defined]
    dense = _dense(tensors, shape, bits)
    if kind == "BitmaskWeight":
        mask = extra.get("bits", pack_bits(dense != 0))
        if mask.dtype != torch.uint8 or mask.shape != (n, -(-k // 8)):
            raise ValueError(f"bits must be uint8 [{n}, {-(-k // 8)}], got {mask.dtype} {list(mask.shape)}")
        keep = unpack_bits(mask, k)
        if "bits" in extra and bool((dense.ne(0) & ~keep).any()):
            raise ValueError("bits prune a value that is not 0")
        counts = torch.nn.functional.pad(keep.sum(1, dtype=torch.int64), (1, 0))
        found |= {"values": dense[keep], "bits": mask, "row_offsets": counts.cumsum(0)}
        return BitmaskWeight.from_tensors(found, shape=shape, group_size=group_size)
    positions = extra.get("positions")
    if positions is None:
        positions = pack_positions(choose_positions(kind, dense, None))
    elif positions.dtype != torch.uint8 or positions.shape != (n, -(-k // 8)):
        raise ValueError(f"positions must be uint8 [{n}, {-(-k // 8)}], got {positions.dtype} {list(positions.shape)}")
    kept = gather(dense, unpack_positions(positions, -(-k // 4)))
    if "positions" in extra and int(kept.count_nonzero()) != int(dense.count_nonzero()):
        raise ValueError("positions must be distinct and ascending, and keep every value that is not 0")
    found |= {"positions": positions}
    found |= {"words": pack_words(kept)} if kind == "Sparse24Int4Weight" else {"values": kept}
    return KINDS[kind].from_tensors(found, shape=shape, group_size=group_size)  # type: ignore[attr-defined]


def quantization_config(
    groups: list[tuple[dict[str, Any] | None, str | None, list[str]]], ignore: list[str], *, standard: bool = True
) -> dict[str, Any]:
    """The entry of config.json. groups: (scheme, activations, names of the layers); ignore: dense linear layers.

    `standard=False` for layers that compressed-tensors does not know (Conv1D, experts): a format that readers refuse,
    because transformers would otherwise leave such layers at random values and only print a table. A scheme may then be
    None, for layers without codes.
    """
    formats = [_format(scheme, activations) if standard and scheme else "llmkern" for scheme, activations, _ in groups]
    entries = {}
    for at, (scheme, _, names) in enumerate(groups):
        dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        entries[f"group_{at}"] = {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "weights": scheme,
            "input_activations": dynamic if formats[at] == "int-quantized" else None,
            "output_activations": None,
            "format": formats[at],
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "llmkern" if not standard else formats[0] if len(set(formats)) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": entries,
    }


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero points int8 [N, G] -> int32 [ceil(N * bits / 32), G], packed along N."""
    return pack_codes(zeros.T.contiguous(), bits).T.contiguous()


def unpack_zeros(words: Tensor, n: int, bits: int) -> Tensor:
    """The inverse of `pack_zeros`."""
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[0] != width(n, bits):
        wanted = f"int32 [{width(n, bits)}, G]"
        raise ValueError(f"weight_zero_point must be {wanted}, got {words.dtype} {list(words.shape)}")
    return unpack_codes(words.T.contiguous(), bits, n).T.contiguous()


def _with_grid(
    packed: Any, tensors: dict[str, Tensor], bits: int, act_order: str | None, zeros: Tensor | None
) -> Stored:
    tensors |= {"weight_scale": packed.scales, "weight_shape": torch.tensor(packed.shape, dtype=torch.int64)}
    if zeros is not None:
        tensors["weight_zero_point"] = pack_zeros(zeros, bits)
    return Stored(tensors, _scheme(packed, bits, act_order, zeros is None), {})


def _scheme(packed: Any, bits: int, act_order: str | None, symmetric: bool) -> dict[str, Any]:
    grouped = packed.scales.shape[1] > 1
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": packed.group_size if grouped else None,
        "dynamic": False,
        "actorder": act_order if grouped else None,
    }


def _format(scheme: dict[str, Any], activations: str | None) -> str:
    whole_rows = scheme["num_bits"] == 8 and scheme["symmetric"] and scheme["strategy"] == "channel"
    return "int-quantized" if activations and whole_rows else "pack-quantized"


def _positions_if_needed(packed: Any, dense: Tensor) -> dict[str, Tensor]:
    told = pack_positions(choose_positions(type(packed).__name__, dense, None))
    return {} if torch.equal(told, packed.positions) else {"positions": packed.positions}


def _codes(words: Tensor, bits: int, k: int) -> Tensor:
    try:
        return unpack_codes(words, bits, k)
    except ValueError as error:
        raise ValueError(f"weight_packed of {bits} bits: {error}") from None


def _dense(tensors: Mapping[str, Tensor], shape: tuple[int, int], bits: int) -> Tensor:
    """The dense codes or values of a sparse weight."""
    dense = tensors["weight"] if "weight" in tensors else _codes(_need(tensors, "weight_packed"), bits, shape[1])
    if tuple(dense.shape) != shape:
        raise ValueError(f"the stored weight is {list(dense.shape)}, but the layer is {list(shape)}")
    return dense


def _need(tensors: Mapping[str, Tensor], suffix: str) -> Tensor:
    if suffix not in tensors:
        raise ValueError(f"missing tensor {suffix!r}; got {', '.join(sorted(tensors)) or 'none'}")
    return tensors[suffix]
