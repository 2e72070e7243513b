"""In which order layers are solved: in a block so that each sees what those before it, as solved, hand on."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence

# Distinct inputs of a block up to which they are taken one after the other.
MAX_STAGES = 8
# What the Hessians of a stage may take, fp32 [K, K] per input; 256 experts of K = 7168 would be 53 GB.
MAX_HESSIANS = 4 << 30


def stages(layers: Sequence[str], groups: Sequence[Sequence[str]], routed: Container[str] = ()) -> list[list[str]]:
    """The layers of one block as stages, each a pass over the data.

    groups: the layers that share an input, in the order in which they first ran. routed: the layers of `Experts`.

    A stage is a group. Experts do not feed each other, so their layers of one kind (`experts.*.down_proj`) are one
    stage however many they are. Where that makes more than MAX_STAGES, or leaves out layers that have not run yet
    (rarely hit experts in a list), layers that differ only in a number are taken together wherever they are. If
    even that does not do, all are one stage.
    """
    found = _merged(layers, groups, lambda name: kind_of(name) if name in routed else name)
    if not _fits(found, layers):
        found = _merged(layers, groups, kind_of)
    return found if _fits(found, layers) else [list(layers)]


def split(stage: Sequence[str], groups: Sequence[Sequence[str]], k: Mapping[str, int]) -> list[list[str]]:
    """A stage as several, none with more than MAX_HESSIANS bytes of Hessians unless one alone is larger.

    groups: as in `stages`; k: the input features of each layer. Layers that share an input stay together. Each part is
    one more pass over the data.
    """
    together = {name: tuple(group) for group in groups for name in group}
    parts: list[list[str]] = []
    room = 0
    for group in dict.fromkeys(together.get(name, (name,)) for name in stage):
        need = 4 * k[group[0]] ** 2
        if not parts or need > room:
            parts.append([])
            room = MAX_HESSIANS
        room -= need
        parts[-1] += group
    return parts


def parts(sizes: Mapping[str, int], blocks: Mapping[str, str], least: int) -> list[list[str]]:
    """Layers that need no data, in their order, as parts of a run: `least` bytes each or more, the last one aside.

    sizes: the bytes of each; blocks: the block of those that are in one. A block is in one part: where it is read from
    files, it is read once, and by one rank alone.
    """
    found: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if size >= least and (name not in blocks or blocks[name] != blocks.get(found[-1][-1])):
            found.append([])
            size = 0
        found[-1].append(name)
        size += nbytes
    return found


def kind_of(name: str) -> str:
    """The name with its numbers left out, but the last part: `experts.*.w1`, while `mlp.0` and `mlp.2` differ."""
    return re.sub(r"\d+(?=\.)", "*", name)


def _merged(layers: Sequence[str], groups: Sequence[Sequence[str]], kind: Callable[[str], str]) -> list[list[str]]:
    """Groups that have a kind in common as one; then layers of these kinds that are in no group."""
    merged: list[list[str]] = []
    place: dict[str, list[str]] = {}
    for group in groups:
        stage = next((place[kind(name)] for name in group if kind(name) in place), None)
        if stage is None:
            merged.append(stage := [])
        stage.extend(group)
        for name in group:
            place.setdefault(kind(name), stage)
    ran = {name for group in groups for name in group}
    for name in layers:
        if name not in ran and kind(name) in place:
            place[kind(name)].append(name)
    return merged


def _fits(found: list[list[str]], layers: Sequence[str]) -> bool:
    return len(found) <= MAX_STAGES and sum(map(len, found)) == len(layers)
