"""drop_layers: a student that is its teacher without some of the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from llmkern.prune.depth import keep_blocks
from llmkern.prune.rebuild import only_blocks

CALLER = "drop_layers"


def drop_layers(model: nn.Module, keep: str | Sequence[int] | None = None) -> Any:
    """A new, smaller model of copies of some of a transformers model's blocks and of all else: a student to distil.

    DistilBERT's initialisation (arXiv 1910.01108). keep: the blocks that stay, rising, from 0; "every_other" (or None):
    half of them (rounded up), evenly from the first to the last: of twelve 0, 2, 4, 7, 9, 11, as DistilBERT has. What
    such a model is, and what is raised for one that cannot be made (an encoder-decoder, shared blocks), says
    `prune.depth.keep_blocks`; ValueError for any other text in `keep`.
    """
    if isinstance(keep, str) and keep != "every_other":
        raise ValueError(f'{CALLER}: keep must be "every_other" or numbers of blocks, got {keep!r}')
    if keep is None or isinstance(keep, str):
        keep = evenly(len(only_blocks(model, CALLER)[1]))
    return keep_blocks(model, keep, caller=CALLER)


def evenly(blocks: int) -> list[int]:
    """Half of the blocks, rounded up, evenly from the first to the last."""
    half = (blocks + 1) // 2
    return [round(at * (blocks - 1) / max(half - 1, 1)) for at in range(half)]
