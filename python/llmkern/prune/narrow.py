"""From kept units to a smaller model: its configuration, the check that its stock class can be it, and its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmkern.prune import depth, parts, rebuild
from llmkern.prune.parts import Part
from llmkern.prune.plan import KeptBlock, StructuredPlan


@dataclass(frozen=True)
class Cut:
    """Kept blocks of a model with the parts that get narrower in each (the same names in all), None where they stay."""

    model: nn.Module
    name: str
    kept: tuple[KeptBlock, ...]
    indices: tuple[int, ...]
    channels: Part | None
    heads: Part | None

    def all_blocks(self) -> list[nn.Module]:
        """The dense model's blocks."""
        return list(self.model.get_submodule(self.name).children())

    def removed_after(self, at: int) -> range:
        """The numbers of the blocks that are removed between block `at` and the next one that stays."""
        stop = self.indices[at + 1] if at + 1 < len(self.indices) else len(self.all_blocks())
        return range(self.indices[at] + 1, stop)

    def block(self, at: int) -> nn.Module:
        """The dense model's block that becomes block `at`."""
        return self.model.get_submodule(self.kept[at].name)

    def units(self, at: int) -> list[tuple[Part, Sequence[int]]]:
        """The parts of block `at` that get narrower, in the order in which they run, and what stays of each."""
        block = self.kept[at]
        pairs = ((self.heads, block.heads), (self.channels, block.channels))
        return [(part, units) for part, units in pairs if part is not None and units is not None]

    def changes(self) -> dict[str, Any]:
        """The entries of the configuration that change."""
        config: Any = self.model.config
        found = depth.depth_changes(self.model, self.indices) if len(self.indices) < config.num_hidden_layers else {}
        for part, units in self.units(0):
            if part is self.channels:
                found[str(parts.width_entry(config, part.units))] = len(units)
                continue
            found["num_attention_heads"] = len(units)
            if hasattr(config, "num_key_value_heads"):
                found["num_key_value_heads"] = len({unit // part.shared for unit in units})
            found["head_dim"] = part.unit
        return found

    def skeleton(self, caller: str) -> Any:
        """The smaller model of the same stock class, without values.

        ValueError where that class, built by its configuration, is not what stays of the model.
        """
        changes, kind = self.changes(), type(self.model).__name__
        told = ", ".join(f"{key}={value}" for key, value in changes.items())
        try:
            small = rebuild.skeleton(self.model, rebuild.smaller_config(self.model, changes))
        except Exception as error:  # whatever a class does with values that do not fit
            raise ValueError(f"{caller}: {kind} cannot be built with {told}: {error}") from error
        shapes = {key: tuple(value.shape) for key, value in self.tensors(meta=True).items()}
        for key, value in small.state_dict().items():
            if (wanted := shapes.pop(key, None)) != tuple(value.shape):
                raise ValueError(
                    f"{caller}: a {kind} with {told} has {key} {list(value.shape)}, but {wanted and list(wanted)} would"
                    " stay: its configuration cannot say what was removed"
                )
        if shapes:
            raise ValueError(f"{caller}: a {kind} with {told} has no {', '.join(shapes)}")
        blocks = self.model.get_submodule(self.name)
        assert isinstance(blocks, nn.ModuleList)
        depth.refuse_other_blocks(blocks, small, self.name, self.indices, caller, self._widths())
        return small

    def tensors(self, meta: bool = False) -> Mapping[str, Tensor]:
        """The state dict of the smaller model, nothing restored: new tensors, or their shapes on the meta device."""
        found = depth.of_kept(self.model, self.name, self.indices)
        for at in range(len(self.kept)):
            for part, units in self.units(at):
                smaller = parts.cut(part, self.block(at), units, meta=meta)
                found |= {f"{self.name}.{at}.{key}": value for key, value in smaller.items()}
        old = {value.data_ptr() for value in self.model.state_dict().values()}
        return {key: value.clone() if value.data_ptr() in old and not meta else value for key, value in found.items()}

    def _widths(self) -> set[tuple[int, int]]:
        """The numbers that a block's attributes may change from and to."""
        found: set[tuple[int, int]] = set()
        for part, units in self.units(0):
            found |= {(part.units, len(units)), (part.units * part.unit, len(units) * part.unit)}
            if part is self.heads:
                before, after = part.units // part.shared, len({unit // part.shared for unit in units})
                found |= {(before, after), (before * part.unit, after * part.unit)}
                found.add((part.shared, len(units) // after))
            for layer, rows in part.rows(units).items():
                found.add((parts.features(self.block(0).get_submodule(layer)), len(rows)))
        return found


def planned(model: nn.Module, plan: StructuredPlan, caller: str) -> Cut:
    """What a plan keeps of a model. ValueError where it names a block, layer or unit that the model does not have."""
    name, blocks = rebuild.only_blocks(model, caller)
    indices = depth.checked_indices(plan.indices(), len(blocks), caller)
    if wrong := [block.name for block, k in zip(plan.blocks, indices, strict=True) if block.name != f"{name}.{k}"]:
        raise ValueError(f"{caller}: the plan keeps {wrong[0]}, but the model's blocks are in {name}")
    found: dict[str, Part | None] = {}
    for what, reader in (("channels", plan.channel_reader), ("heads", plan.head_reader)):
        found[what] = None
        if reader is None:
            continue
        part = parts.channels(blocks[0]) if what == "channels" else parts.heads(blocks[0], model.config)
        if isinstance(part, str) or part.reader != reader:
            got = part if isinstance(part, str) else f"the model has {part.reader}"
            raise ValueError(f"{caller}: the plan makes the input of {reader} narrower: {got}")
        if (most := max(max(getattr(block, what)) for block in plan.blocks)) >= part.units:
            raise ValueError(f"{caller}: the plan keeps number {most} of the {part.units} {what} of {name}")
        found[what] = part
        layouts = {_even(block.heads or (), part) for block in plan.blocks} if what == "heads" else set()
        if None in layouts or len(layouts) > 1:
            raise ValueError(f"{caller}: the plan must keep as many query heads of each key-value head in every block")
    cut = Cut(model, name, plan.blocks, indices, found["channels"], found["heads"])
    if dict(plan.config) != (changes := cut.changes()):
        raise ValueError(f"{caller}: the plan changes the configuration by {dict(plan.config)}, wanted {changes}")
    return cut


def _even(heads: Sequence[int], part: Part) -> tuple[int, int] | None:
    """How many key-value heads stay, and how many query heads of each; None if that differs."""
    counts = Counter(head // part.shared for head in heads)
    return (len(counts), counts[min(counts)]) if len(set(counts.values())) == 1 else None
