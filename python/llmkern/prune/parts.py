"""The parts of a block that can be made narrower: its MLP's channels and its attention's heads.

    hidden ─> writers ─> units ─> reader ─> hidden
              gate, up   channels  down
              q, k, v    heads     o

A unit is some features of the reader's input, and with it go the rows of the writers that make them. Which layers write
and read is known by their names, which these are; that they do is checked by `llmkern.prune.structured_apply` on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.nn import dense_weight, is_conv1d, is_linear

# (writers, reader): the first that is there counts, so gated ones come before plain ones.
CHANNELS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("lin1",), "lin2"),
    (("intermediate.dense",), "output.dense"),
)
HEADS = tuple(
    (writers, reader)
    for writers in (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
    for reader in ("o_proj", "out_proj", "dense")
)
# The entry of the configuration that holds the number of channels.
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim")


@dataclass(frozen=True)
class Segment:
    """Rows `start` and on of a writer: `unit` of them for every `shared` units of the reader."""

    layer: str
    start: int
    shared: int = 1


@dataclass(frozen=True)
class Part:
    """What one reader reads: `units` units of `unit` input features each. Names are those within the block.

    shared: query heads per key-value head, 1 for channels.
    """

    reader: str
    segments: tuple[Segment, ...]
    units: int
    unit: int = 1
    shared: int = 1

    def columns(self, kept: Sequence[int]) -> Tensor:
        """int64: the reader's input features that belong to these units."""
        return _features(kept, self.unit)

    def rows(self, kept: Sequence[int]) -> dict[str, Tensor]:
        """int64 per writer: its output features that belong to these units."""
        found: dict[str, list[Tensor]] = {}
        for segment in self.segments:
            units = sorted({unit // segment.shared for unit in kept})
            found.setdefault(segment.layer, []).append(segment.start + _features(units, self.unit))
        return {layer: torch.cat(parts) for layer, parts in found.items()}

    def written(self, block: nn.Module) -> Tensor:
        """fp32 [units * unit]: the squared norm of the writers' rows behind each feature that the reader reads.

        Rows that several units share count for each of them in part.
        """
        total = torch.zeros(self.units * self.unit, device=next(block.parameters()).device)
        for segment in self.segments:
            weight = dense_weight(block.get_submodule(segment.layer))
            count = len(total) // segment.shared
            energy = weight[segment.start : segment.start + count].float().square().sum(1) / segment.shared
            total += energy.view(-1, 1, self.unit).expand(-1, segment.shared, -1).reshape(-1)
        return total


def channels(block: nn.Module) -> Part | str:
    """The MLP of a block, or why it has none that can be pruned."""
    if mixture := _mixture(block):
        return mixture
    found = _find(block, CHANNELS)
    if isinstance(found, str):
        return f"no MLP was recognised: {found}"
    writers, reader = found
    width = dense_weight(block.get_submodule(reader)).shape[1]
    copies = 2 if writers[0].endswith("gate_up_proj") else 1
    for writer in writers:
        if (rows := features(block.get_submodule(writer))) != copies * width:
            return f"{writer} has {rows} rows, wanted {copies * width} for the {width} columns of {reader}"
    return Part(reader, tuple(Segment(w, at * width) for w in writers for at in range(copies)), width)


def heads(block: nn.Module, config: Any) -> Part | str:
    """The attention of a block, or why it has none that can be pruned."""
    found = _find(block, HEADS)
    if isinstance(found, str):
        return f"no attention was recognised: {found}"
    writers, reader = found
    count, size = config.num_attention_heads, head_dim(config)
    kv = getattr(config, "num_key_value_heads", None) or count
    if count % kv:
        return f"{count} heads do not divide into {kv} key-value heads"
    sizes = (count * size, kv * size, kv * size)
    wanted = (sum(sizes),) if len(writers) == 1 else sizes
    for writer, rows in zip(writers, wanted, strict=True):
        if (got := features(block.get_submodule(writer))) != rows:
            return f"{writer} has {got} rows, wanted {rows} for {count} heads, {kv} key-value heads of {size}"
    if (got := dense_weight(block.get_submodule(reader)).shape[1]) != sizes[0]:
        return f"{reader} has {got} columns, wanted {sizes[0]} for {count} heads of {size}"
    starts = (0, sizes[0], sizes[0] + sizes[1]) if len(writers) == 1 else (0, 0, 0)
    layers = writers * 3 if len(writers) == 1 else writers
    shared = (1, count // kv, count // kv)
    return Part(reader, tuple(map(Segment, layers, starts, shared)), count, size, count // kv)


def head_dim(config: Any) -> int:
    """Features per head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def width_entry(config: Any, width: int) -> str | None:
    """The entry of the configuration that says how many channels an MLP has; None if there is none."""
    for key in WIDTHS:
        if hasattr(config, key) and getattr(config, key) in (width, None):
            return key
    return None


def features(layer: nn.Module) -> int:
    """The output features of a layer."""
    return dense_weight(layer).shape[0]


def cut(part: Part, block: nn.Module, kept: Sequence[int], meta: bool = False) -> dict[str, Tensor]:
    """The smaller tensors of the part's layers, by their names within the block: copies, or shapes on `meta`."""

    def take(tensor: Tensor, dim: int, which: Tensor) -> Tensor:
        tensor = tensor.detach().to("meta") if meta else tensor.detach()
        return tensor.index_select(dim, which.to(tensor.device))

    found = {}
    for layer, rows in part.rows(kept).items():
        module: Any = block.get_submodule(layer)
        found[f"{layer}.weight"] = take(module.weight, 1 if is_conv1d(module) else 0, rows)
        if module.bias is not None:
            found[f"{layer}.bias"] = take(module.bias, 0, rows)
    reader: Any = block.get_submodule(part.reader)
    found[f"{part.reader}.weight"] = take(reader.weight, 0 if is_conv1d(reader) else 1, part.columns(kept))
    return found


def _features(units: Sequence[int], unit: int) -> Tensor:
    return (torch.tensor(units, dtype=torch.int64).unsqueeze(1) * unit + torch.arange(unit)).view(-1)


def _find(block: nn.Module, kinds: Sequence[tuple[tuple[str, ...], str]]) -> tuple[tuple[str, ...], str] | str:
    """The writers and the reader of the first kind that is in the block, or what is wrong."""
    names = {name for name, module in block.named_modules() if is_linear(module)}
    for writers, reader in kinds:
        places = [
            name[: len(name) - len(reader)] for name in sorted(names) if name == reader or name.endswith(f".{reader}")
        ]
        places = [place for place in places if all(place + writer in names for writer in writers)]
        if len(places) == 1:
            return tuple(places[0] + writer for writer in writers), places[0] + reader
        if places:
            return f"{len(places)} layers are named {reader}"
    known = ", ".join(dict.fromkeys(f"{'+'.join(writers)} -> {reader}" for writers, reader in kinds))
    return f"its layers are {', '.join(sorted(names)) or 'none'}; known are {known}"


def _mixture(block: nn.Module) -> str:
    """Why a mixture of experts is not pruned; "" where there is none."""
    many = next((name for name, value in block.named_parameters() if value.ndim == 3), "")
    many = many or next((name for name, part in block.named_modules() if isinstance(part, nn.ModuleList)), "")
    reason = "its MLP is a mixture of experts, each of which would need channels of its own"
    return f"{reason} ({many})" if many else ""
