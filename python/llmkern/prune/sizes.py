"""How much stays of a model: shares and numbers, as asked for, as numbers that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmkern.prune import parts, rebuild
from llmkern.prune.narrow import Cut
from llmkern.prune.parts import Part
from llmkern.prune.plan import KeptBlock


@dataclass(frozen=True)
class Sizes:
    """Numbers that stay in every block: channels, key-value heads, and query heads of each of these; None for all.

    blocks: how many stay of `count` blocks of the list `name`. mlp and attention: the parts of a block, where they get
    narrower.
    """

    model: nn.Module
    name: str
    count: int
    blocks: int
    channels: int | None = None
    kv_heads: int | None = None
    heads_per_kv: int | None = None
    mlp: Part | None = None
    attention: Part | None = None

    def cut(self, kept: Sequence[KeptBlock]) -> Cut:
        """What these blocks are of the model."""
        indices = tuple(int(block.name.rpartition(".")[2]) for block in kept)
        return Cut(self.model, self.name, tuple(kept), indices, self.mlp, self.attention)

    def all_blocks(self) -> list[nn.Module]:
        """The blocks of the model."""
        return list(self.model.get_submodule(self.name).children())

    def first(self) -> list[KeptBlock]:
        """As many blocks and units as will stay, simply the first: enough to see whether such a model can be."""
        channels = tuple(range(self.channels)) if self.channels else None
        heads = None
        if self.attention is not None and self.kv_heads and self.heads_per_kv:
            starts = range(0, self.kv_heads * self.attention.shared, self.attention.shared)
            heads = tuple(start + head for start in starts for head in range(self.heads_per_kv))
        return [KeptBlock(f"{self.name}.{at}", channels, heads) for at in range(self.blocks)]


def sizes(
    model: nn.Module, *, mlp: float | None, kv_groups: float | None, heads: float | None, blocks: float | None,
    multiple_of: int, caller: str,
) -> Sizes:  # fmt: skip
    """The numbers behind the arguments of `plan_structured`, which says what they are and what is refused."""
    name, found = rebuild.only_blocks(model, caller)
    if mlp is kv_groups is heads is blocks is None:
        raise ValueError(f"{caller}: nothing to remove: give mlp, kv_groups, heads or blocks")
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"{caller}: multiple_of must be an int >= 1, got {multiple_of!r}")
    config: Any = model.config
    kept = len(found) if blocks is None else _number("blocks", blocks, len(found), 1, caller)
    channels = part = None
    if mlp is not None:
        part = _same_part([parts.channels(block) for block in found], name, caller)
        channels = _number("mlp", mlp, part.units, multiple_of, caller)
        if parts.width_entry(config, part.units) is None:
            raise ValueError(f"{caller}: no entry of the configuration says that an MLP has {part.units} channels")
    kv = per = attention = None
    if kv_groups is not None or heads is not None:
        attention = _same_part([parts.heads(block, config) for block in found], name, caller)
        if attention.shared == 1 and None not in (kv_groups, heads):
            raise ValueError(f"{caller}: heads and kv_groups are the same here (no grouped heads): give one of them")
        kv, per = attention.units // attention.shared, attention.shared
        if attention.shared == 1 or kv_groups is not None:
            key = "kv_groups" if kv_groups is not None else "heads"
            kv = _number(key, heads if kv_groups is None else kv_groups, kv, 1, caller)
        if attention.shared > 1 and heads is not None:
            per = _number("heads", heads, kv * per, kv, caller) // kv
    return Sizes(model, name, len(found), kept, channels, kv, per, part, attention)


def _number(name: str, asked: Any, total: int, multiple: int, caller: str) -> int:
    """How many of `total` stay: an int as it is, a float's share rounded up to a multiple."""
    if isinstance(asked, bool) or not isinstance(asked, int | float):
        raise TypeError(f"{caller}: {name} must be a share (float) or a number (int), got {asked!r}")
    if isinstance(asked, float):
        if not 0 < asked < 1:
            raise ValueError(f"{caller}: {name} as a float is the share to keep, in (0, 1), got {asked}")
        # Not one multiple more because of rounding: 0.1 * 30 is a little more than 3.
        kept = math.ceil(asked * total / multiple - 1e-9) * multiple
        if kept >= total:
            raise ValueError(
                f"{caller}: {name}={asked} of {total}, rounded up to a multiple of {multiple}, keeps all of them"
            )
        return kept
    if not 0 < asked < total:
        raise ValueError(f"{caller}: {name} must keep at least 1 and fewer than all {total}, got {asked}")
    if asked % multiple:
        raise ValueError(f"{caller}: {name} must be a multiple of {multiple}, got {asked}")
    return asked


def _same_part(found: Sequence[Part | str], name: str, caller: str) -> Part:
    """The part that all blocks have. ValueError with the reason where one has none, or another one."""
    for at, part in enumerate(found):
        if isinstance(part, str):
            raise ValueError(f"{caller}: {name}.{at}: {part}")
        if part != found[0]:
            raise ValueError(f"{caller}: {name}.{at} is laid out in another way than {name}.0")
    first = found[0]
    assert isinstance(first, Part)
    return first
