"""In which order the layers of a block are solved, so that each sees what the layers before it, as solved, hand on."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence

# Distinct inputs of a block up to which they are taken one after the other.
MAX_STAGES = 8


def stages(layers: Sequence[str], groups: Sequence[Sequence[str]], routed: Container[str] = ()) -> list[list[str]]:
    """The layers of one block as stages, each a pass over the data.

    groups: the layers that share an input, in the order in which they first ran. routed: the layers of `Experts`.

    A stage is a group. Experts do not feed each other, so their layers of one kind (`experts.*.down_proj`) are one
    stage however many they are. Where that makes more than MAX_STAGES, or leaves out layers that have not run yet
    (rarely hit experts in a list), layers that differ only in a number are taken together wherever they are. If
    even that does not do, all are one stage.
    """
    found = _merged(layers, groups, lambda name: _kind(name) if name in routed else name)
    if not _fits(found, layers):
        found = _merged(layers, groups, _kind)
    return found if _fits(found, layers) else [list(layers)]


def _kind(name: str) -> str:
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
