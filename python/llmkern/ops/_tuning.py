"""Autotuning of the products in Triton: bounded, asked for, and never while a CUDA graph is captured.

By default the blocks of a product are a function of its shape (`_tiles.py`). Inside `autotune()` the first call of a
shape times up to MOST variants of them, and later calls, there and outside, use the fastest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch

from llmkern.ops._tiles import Tiles

MOST = 6
ROUNDS = 5  # timed calls of a variant, after one that compiles it
_asked: ContextVar[bool] = ContextVar("llmkern_autotune", default=False)
_found: dict[Hashable, Tiles] = {}


@contextmanager
def autotune() -> Iterator[None]:
    """Time variants of the Triton kernels' blocks for every new shape that is called inside, and keep the fastest.

    A first call then takes as long as compiling and running six variants, and waits for the GPU. M counts by powers of
    two. The choices last as long as the process. Has no effect while a CUDA graph is captured, or on other kernels.
    """
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def chosen(key: Hashable, usual: Tiles, attempt: Callable[[Tiles], None]) -> Tiles:
    """The blocks for this key: those found, those found now by running `attempt`, or the usual ones."""
    if (found := _found.get(key)) is not None:
        return found
    if not _asked.get() or _capturing():
        return usual
    timed = [(seconds, at, tiles) for at, tiles in enumerate(variants(usual)) if (seconds := _time(attempt, tiles))]
    _found[key] = min(timed)[2] if timed else usual
    return _found[key]


def variants(usual: Tiles) -> list[Tiles]:
    """The usual blocks first, then what may suit a GPU better: the pipeline's depth, warps, and how K is divided."""
    steps = usual.per_split * usual.splits
    # A group's integers are summed by one program.
    unit = usual.per_group if usual.per_split % usual.per_group == 0 else 1
    found = [usual, replace(usual, stages=usual.stages + 1), replace(usual, warps=12 - usual.warps)]
    if usual.stages > 2:
        found.append(replace(usual, stages=usual.stages - 1))
    for per_split in (usual.per_split * 2, usual.per_split // 2):
        per_split = min(-(-max(per_split, 1) // unit) * unit, steps)
        found.append(replace(usual, per_split=per_split, splits=-(-steps // per_split)))
    return list(dict.fromkeys(found))[:MOST]


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _time(attempt: Callable[[Tiles], None], tiles: Tiles) -> float | None:
    """Median seconds of a call; None if these blocks do not fit the GPU."""
    try:
        attempt(tiles)
    except Exception as error:  # Triton's OutOfResources, which cannot be named without importing it
        if type(error).__name__ != "OutOfResources":
            raise
        return None
    seconds = []
    for _ in range(ROUNDS):
        _wait()
        start = time.perf_counter()
        attempt(tiles)
        _wait()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[ROUNDS // 2]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
