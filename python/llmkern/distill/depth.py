"""drop_layers: a student that is its teacher without some of the blocks."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from llmkern.blocks import find_lists
from llmkern.weight_files import parameters_on_meta

CALLER = "drop_layers"
INDICES = ("layer_idx", "layer_id", "layer_number", "block_idx")  # attributes: the place of a block in the model
PLAIN = (int, float, str, bool, type(None))
UNEQUAL = ("training", "gradient_checkpointing")  # attributes that are no part of what a model is


def drop_layers(model: nn.Module, keep: str | list[int] | None = None) -> Any:
    """A new, smaller model of copies of some of a transformers model's blocks and of all else: a student to distil.

    DistilBERT's initialisation (arXiv 1910.01108). keep: the blocks that stay, ascending, from 0; "every_other" (or
    None): half of them (rounded up), evenly from the first to the last: of twelve 0, 2, 4, 7, 9, 11, as DistilBERT has.
    The configuration has the new number of layers and, where it says something of each layer, that of those kept; the
    blocks know their new places, so that caches of keys and values and `generate` work. Shared weights stay shared, the
    model is not changed, and nothing is shared with it.

    Decoders and encoders. Raises ValueError for an encoder-decoder, for a model whose blocks are not one list with an
    entry per layer, for a `keep` that makes no sense, and where the class, given the new configuration, would build
    something else than what is left; TypeError for a model without a transformers configuration.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        raise TypeError(f"{CALLER}: {type(model).__name__} has no transformers configuration")
    name, blocks = _blocks(model)
    kept = _kept(keep, len(blocks))
    # The copy of a dropped block is None: it is never made.
    dropped = {id(block): None for number, block in enumerate(blocks) if number not in kept}
    small = copy.deepcopy(model, dict(dropped))
    left = [block for block in small.get_submodule(name).children() if block is not None]
    small.set_submodule(name, nn.ModuleList(left))
    _shorten(small.config, len(blocks), kept)
    _fit(small, type(model).__name__)
    return small


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the blocks. ValueError where they are not one list with an entry per layer."""
    config: Any = model.config
    kind = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{CALLER}: {kind} has an encoder and a decoder; wanted a decoder or an encoder alone")
    lists = find_lists(model)
    if len(lists) != 1:
        names = ", ".join(name for name, _ in lists) or "none"
        raise ValueError(f"{CALLER}: {kind} must have one list of blocks, got {names}")
    layers = getattr(config, "num_hidden_layers", None)
    if layers != len(lists[0][1]):
        raise ValueError(
            f"{CALLER}: {kind} must have a block per layer of its configuration, got {len(lists[0][1])} blocks and "
            f"num_hidden_layers={layers}"
        )
    return lists[0]


def _kept(keep: str | list[int] | None, blocks: int) -> list[int]:
    """The blocks that stay. ValueError unless they are some, ascending, and there."""
    if keep is None or keep == "every_other":
        half = (blocks + 1) // 2
        return [round(at * (blocks - 1) / max(half - 1, 1)) for at in range(half)]
    if isinstance(keep, str):
        raise ValueError(f'{CALLER}: keep must be "every_other" or a list of blocks, got {keep!r}')
    kept = [int(number) for number in keep]
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < blocks:
        raise ValueError(f"{CALLER}: keep must be ascending numbers of blocks in [0, {blocks}), got {kept}")
    return kept


def _shorten(config: Any, before: int, kept: list[int]) -> None:
    """Make the configuration that of the kept layers: their number, and lists that have an entry per layer."""
    for key, value in vars(config).items():
        if "layer" in key and isinstance(value, list | tuple) and len(value) == before:
            setattr(config, key, type(value)(value[number] for number in kept))
    config.num_hidden_layers = len(kept)


def _fit(small: nn.Module, kind: str) -> None:
    """Number the blocks anew. ValueError unless `small` is what its class builds of its configuration."""
    try:
        with parameters_on_meta():
            wanted = type(small)._from_config(copy.deepcopy(small.config))  # type: ignore[attr-defined]
    except Exception as error:  # whatever a class does with a configuration that makes no sense to it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{CALLER}: {kind} cannot be built with fewer layers: {reason:.300}") from error
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (small, wanted)]
    if differing := sorted(shapes[0].items() ^ shapes[1].items()):
        raise ValueError(
            f"{CALLER}: {kind} with the new configuration has other tensors than the blocks that are left, as "
            f"{differing[0][0]}"
        )
    built = dict(wanted.named_modules())
    for name, module in small.named_modules():
        for key, value in vars(module).items():
            here = getattr(built[name], key, None)
            if type(value) not in PLAIN or type(here) not in PLAIN or value == here or key in UNEQUAL:
                continue
            if key not in INDICES:
                raise ValueError(
                    f"{CALLER}: {kind} with the new configuration has {name}.{key} = {here!r}, the block that is left "
                    f"has {value!r}"
                )
            setattr(module, key, here)
