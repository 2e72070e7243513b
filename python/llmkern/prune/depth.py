"""Whole blocks: a model of the blocks that are kept."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from typing import Any

from torch import nn

from llmkern.prune import rebuild

# Entries of a configuration that hold one value per block.
PER_BLOCK = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")


def keep_blocks(model: nn.Module, indices: Sequence[int], *, caller: str = "keep_blocks") -> Any:
    """A new model of the same class with copies of the blocks at `indices`, and of everything outside the blocks.

    model: a transformers decoder or encoder with one list of blocks, dense and on one device; it is not changed.
    indices: rising, each in [0, number of blocks). Blocks are numbered anew (`layer_idx`), and so are the entries of
    the configuration that hold a value per block (`layer_types`, `max_window_layers`), so that `save_pretrained` and
    the stock `from_pretrained` give the same model again.

    Raises ValueError: no block is kept, an index that is out of range, double or not rising, several lists of blocks
    (an encoder-decoder), packed layers, or a block that its new place would make another one (one whose window or scale
    follows from its number). TypeError: no transformers model, or indices that are no ints.
    """
    rebuild.refuse_unless_dense(model, caller)
    name, blocks = rebuild.only_blocks(model, caller)
    kept = checked_indices(indices, len(blocks), caller)
    small = rebuild.skeleton(model, rebuild.smaller_config(model, depth_changes(model, kept)))
    refuse_other_blocks(blocks, small, name, kept, caller)
    return rebuild.fill(small, model, {key: value.clone() for key, value in of_kept(model, name, kept).items()})


def checked_indices(indices: Sequence[int], count: int, caller: str) -> tuple[int, ...]:
    """`indices` as a tuple; ValueError or TypeError unless they are rising ints in [0, count), one at least."""
    kept = tuple(indices)
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in kept):
        raise TypeError(f"{caller}: indices must be ints, got {list(kept)!r:.100}")
    if not kept:
        raise ValueError(f"{caller}: indices are empty; at least one block must stay")
    if any(not 0 <= index < count for index in kept) or any(a >= b for a, b in itertools.pairwise(kept)):
        raise ValueError(f"{caller}: indices must be rising and in [0, {count}), got {list(kept)!r:.100}")
    return kept


def depth_changes(model: nn.Module, kept: Sequence[int]) -> dict[str, Any]:
    """The entries of the configuration that change when these blocks are kept."""
    config: Any = model.config
    count = config.num_hidden_layers
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key in PER_BLOCK:
        values = getattr(config, key, None)
        if isinstance(values, list | tuple) and len(values) == count:
            changes[key] = [values[index] for index in kept]
    if isinstance(first := getattr(config, "max_window_layers", None), int):
        changes["max_window_layers"] = sum(index < first for index in kept)
    return changes


def refuse_other_blocks(
    blocks: nn.ModuleList, small: nn.Module, name: str, kept: Sequence[int], caller: str,
    widths: Container[tuple[Any, Any]] = (),
) -> None:  # fmt: skip
    """ValueError where a kept block would compute another thing at its new place."""
    for at, index in enumerate(kept):
        if found := rebuild.difference(blocks[index], small.get_submodule(f"{name}.{at}"), widths):
            place = f"block {index} would be another one as block {at}" if at != index else f"block {at} would change"
            raise ValueError(f"{caller}: {place} of {len(kept)}: {found}; the configuration cannot say otherwise")


def of_kept(model: nn.Module, name: str, kept: Sequence[int]) -> dict[str, Any]:
    """The model's state dict with the tensors of the kept blocks under their new numbers, without those of others."""
    places = {f"{name}.{index}.": f"{name}.{at}." for at, index in enumerate(kept)}
    found = {}
    for key, value in model.state_dict().items():
        if not key.startswith(f"{name}."):
            found[key] = value
            continue
        prefix = f"{name}.{key[len(name) + 1 :].split('.')[0]}."
        if prefix in places:
            found[places[prefix] + key[len(prefix) :]] = value
    return found
