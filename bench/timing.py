"""Timing on a machine that others use as well: interleaved rounds, medians with their spread, weights that are cold.

Calling A a hundred times and then B a hundred times measures the neighbours' load as much as A and B. Here every round
times each candidate once, so all see the same load, and a median over rounds throws out the rounds that were hit.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

COLD_BYTES = 500_000_000  # more than any outer cache: at M <= 4 a weight must come from memory, as in a real model
FEWEST_ROUNDS = 7


class Timing(NamedTuple):
    """Median, least and spread (interquartile range over median) of one call, in microseconds."""

    median_us: float
    least_us: float
    spread: float
    rounds: int


def interleaved(candidates: Mapping[str, Callable[[], Any]], *, seconds: float = 1.0) -> dict[str, Timing]:
    """Time each candidate, one call of each per round, for about `seconds` per candidate and 7 rounds at least.

    Calls shorter than 100 us are repeated within a round, so that the clock's own cost does not show.
    """
    inner = {}
    for name, call in candidates.items():
        call()  # first touch: page faults, prepacking
        start = time.perf_counter()
        call()
        inner[name] = max(1, round(100e-6 / max(time.perf_counter() - start, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + seconds * len(candidates)
    while len(next(iter(samples.values()))) < FEWEST_ROUNDS or time.perf_counter() < deadline:
        for name, call in candidates.items():
            count = inner[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - start) / count)
    return {name: summary(values) for name, values in samples.items()}


def summary(seconds: Sequence[float]) -> Timing:
    """Median, least and spread of the samples."""
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median * 1e6, min(seconds) * 1e6, (third - first) / median, len(seconds))


def rotating(call: Callable[[Any], Any], copies: Sequence[Any]) -> Callable[[], Any]:
    """`call` on the next copy each time."""
    turn = itertools.cycle(copies)
    return lambda: call(next(turn))


def copies_for(nbytes: int, m: int) -> int:
    """How many copies of a weight to rotate over: one for M > 4, where a weight is reused from cache anyway."""
    return 1 if m > 4 else COLD_BYTES // max(nbytes, 1) + 1
