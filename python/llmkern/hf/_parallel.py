"""Tensor parallel: one rank's share of a packed weight, cut by the model's own plan.

transformers shards parameters before it loads them and moves activations between ranks around each layer's forward
(transformers.distributed.tensor_parallel, 5.24). Packed tensors are no parameters: a rank reads the layer and keeps
its share. Cuts along K come between groups, and where every tensor of the format can be cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkern.experts import mixtures
from llmkern.formats import BitmaskWeight, PackedWeight
from llmkern.formats.bitmask import pack_bits
from llmkern.nn import FORMATS, PackedLinear
from llmkern.ops.bitmask_linear.reference import unpack_bits

ROWS = ("colwise", "colwise_rep", "colwise_gather_output")
HALVES = "packed_colwise"  # two matrices under one another, as gate over up
COLUMNS = ("rowwise", "rowwise_rep", "rowwise_split_input")
WHOLE = ("replicate", "replicated_with_grad_allreduce", "all_reduce", "mla_kv_a_proj")
# Columns of K per column of a tensor, and what a cut must be a multiple of.
COLUMNS_PER = {
    "Int8Weight": {"codes": 1},
    "Int4Weight": {"words": 8},
    "Sparse24Weight": {"values": 2, "positions": 8},
    "Sparse24Int4Weight": {"words": 16, "positions": 8},
}


class Rank(NamedTuple):
    """This process among those that share the layers."""

    at: int
    size: int


def rank_of(model: Any) -> Rank | None:
    """This process's place in the model's tensor parallel mesh; None without one.

    NotImplementedError for other kinds of parallelism, which cut what cannot be cut here.
    """
    config = getattr(model.config, "distributed_config", None)
    for kind in ("dp_size", "pp_size", "ep_size"):
        if (getattr(config, kind, None) or 1) > 1:
            raise NotImplementedError(
                f"from_pretrained: packed layers run in tensor parallel only, got {kind}={getattr(config, kind)}"
            )
    if (getattr(config, "tp_size", None) or 1) == 1:
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise NotImplementedError("from_pretrained: tensor parallel of packed layers needs a newer transformers")
        return None
    mesh = model._device_mesh
    mesh = mesh["tp"] if mesh is not None and mesh.ndim > 1 else mesh
    return None if mesh is None else Rank(mesh.get_local_rank(), mesh.size())


def wildcard(name: str) -> str:
    """A name as plans have it: `*` for each number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def take_styles(model: Any, plan: dict[str, str]) -> dict[str, str]:
    """The styles that `plan` has for 3-D parameters of mixtures that are linear layers now, out of the plan.

    Left in, transformers would warn that they match nothing. What the caller asked for stays, or would be an error.
    """
    asked = getattr(getattr(model.config, "distributed_config", None), "tp_plan", None)
    styles: dict[str, str] = {}
    for home, mixture in mixtures(model).items():
        for key in (wildcard(f"{home}.{name}{part}") for name in mixture.projections(0) for part in ("", "_bias")):
            if isinstance(asked, dict) and key in asked:
                styles[key] = plan[key] = asked[key]
            elif key in plan:
                styles[key] = plan.pop(key)
    return styles


def style_of(name: str, home: str, plan: Mapping[str, str]) -> str | None:
    """The style of a layer; one of the mixture `home` (or "") goes by its 3-D parameters."""
    return plan.get(wildcard(f"{home}.{name.rpartition('.')[2]}" if home else name))


def share(packed: PackedWeight, style: str | None, rank: Rank, interleaved: bool) -> PackedWeight:
    """The part of a layer's weight that this rank multiplies with. interleaved: gate and up rows take turns.

    ValueError for a layer that the ranks cannot share alike, NotImplementedError for a style that is not known.
    """
    n, k = packed.shape
    if style is None or style in WHOLE:
        return packed
    if style in ROWS or style == HALVES:
        parts = 2 if style == HALVES and not interleaved else 1
        if n % (parts * rank.size):
            what = f"{parts} x {n // parts}" if parts > 1 else str(n)
            raise ValueError(f"tensor parallel ({style}): its {what} rows cannot be shared by {rank.size} ranks alike")
        return rows(packed, row_numbers(n, parts, rank))
    if style in COLUMNS:
        _check_columns(packed, k, style, rank)
        return columns(packed, rank.at * k // rank.size, (rank.at + 1) * k // rank.size)
    raise NotImplementedError(f"tensor parallel: style {style!r} is not known for packed layers")


def row_numbers(n: int, parts: int, rank: Rank) -> Tensor:
    """The rows of this rank: its share of each of `parts` equal parts."""
    step = n // parts // rank.size
    return torch.arange(n).view(parts, rank.size, step)[:, rank.at].flatten()


def rows(packed: PackedWeight, numbers: Tensor) -> PackedWeight:
    """Some rows of a weight."""
    if isinstance(packed, BitmaskWeight):
        return _bitmask(packed, unpack_bits(packed.bits, packed.shape[1]), numbers, slice(0, packed.shape[1]))
    tensors = {name: tensor[numbers] for name, tensor in packed.tensors().items()}
    return replace(packed, **tensors, shape=(len(numbers), packed.shape[1]))  # type: ignore[type-var]


def columns(packed: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Columns start to stop of a weight, both where the tensors can be cut."""
    n, k = packed.shape
    if isinstance(packed, BitmaskWeight):
        return _bitmask(packed, unpack_bits(packed.bits, k), torch.arange(n), slice(start, stop))
    per = COLUMNS_PER[type(packed).__name__]
    cut = {}
    for name, tensor in packed.tensors().items():
        width = per.get(name, packed.group_size)
        cut[name] = tensor[:, start // width : -(-stop // width)].contiguous()
    group_size = min(packed.group_size, stop - start)
    return FORMATS[type(packed).__name__].from_tensors(cut, shape=(n, stop - start), group_size=group_size)


def cut_bias(layer: PackedLinear, style: str | None, rank: Rank, interleaved: bool) -> None:
    """The bias of an expert's layer: with its rows, or where columns are shared, on the first rank alone."""
    if layer.bias is None:
        return
    if style in COLUMNS:
        layer.bias = layer.bias if rank.at == 0 else None
    elif style in ROWS or style == HALVES:
        numbers = row_numbers(len(layer.bias), 2 if style == HALVES and not interleaved else 1, rank)
        layer.bias = nn.Parameter(layer.bias.detach()[numbers], requires_grad=layer.bias.requires_grad)


def _check_columns(packed: PackedWeight, k: int, style: str, rank: Rank) -> None:
    """ValueError unless all cuts come between groups, and between elements of every tensor."""
    unit = 8 if isinstance(packed, BitmaskWeight) else max(COLUMNS_PER[type(packed).__name__].values())
    name = f"tensor parallel ({style})"
    if k % rank.size:
        raise ValueError(f"{name}: its {k} columns cannot be shared by {rank.size} ranks alike")
    step = k // rank.size
    if packed.group_size < k and step % packed.group_size:
        raise ValueError(
            f"{name}: {step} columns for each of {rank.size} ranks are not whole groups of {packed.group_size}"
        )
    if step % unit:
        raise ValueError(
            f"{name}: {step} columns for each of {rank.size} ranks are no multiple of {unit}, which "
            f"{type(packed).__name__} stores together"
        )


def _bitmask(packed: BitmaskWeight, keep: Tensor, numbers: Tensor, part: slice) -> BitmaskWeight:
    chosen = torch.zeros_like(keep)
    chosen[numbers, part] = keep[numbers, part]
    mine = keep[numbers][:, part]
    counts = torch.nn.functional.pad(mine.sum(1, dtype=torch.int64), (1, 0))
    tensors = {"values": packed.values[chosen[keep]], "bits": pack_bits(mine), "row_offsets": counts.cumsum(0)}
    group_size = min(packed.group_size, mine.shape[1])
    if packed.scales is not None:
        groups = slice(part.start // packed.group_size, -(-part.stop // packed.group_size))
        tensors["scales"] = packed.scales[numbers][:, groups].contiguous()
    return BitmaskWeight.from_tensors(tensors, shape=tuple(mine.shape), group_size=group_size)  # type: ignore[arg-type]
