"""Timing on a machine that others use as well: interleaved rounds, medians with their spread, weights that are cold.

Calling A a hundred times and then B a hundred times measures the neighbours' load as much as A and B. Here every round
times each candidate once, so all see the same load, and a median over rounds throws out the rounds that were hit.

A weight that is read again soon comes from a cache, which in a real model it never does. So every candidate has several
copies of its weight, and takes the next at each call; between two uses of one copy all candidates together read more
than COLD_BYTES.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

COLD_BYTES = 1 << 30
FEWEST_ROUNDS = 5
# A burst of calls is timed as one, so that neither the clock nor the wake-up of the candidate's threads shows ...
BURST_SECONDS = 300e-6
# ... and up to this length of a call an untimed call comes first, which wakes them.
LEAD_IN_SECONDS = 5e-3


class Timing(NamedTuple):
    """Median, least and spread (interquartile range over median) of one call, in microseconds."""

    median_us: float
    least_us: float
    spread: float
    rounds: int


class Burst(NamedTuple):
    """What a candidate does in one round: `lead_in` calls before the clock starts, then `timed` calls."""

    lead_in: int
    timed: int

    @property
    def calls(self) -> int:
        """All of them."""
        return self.lead_in + self.timed


def burst(call: Callable[[], Any]) -> Burst:
    """How many calls make a burst, from the second call; the first may fault pages in or prepack."""
    call()
    start = time.perf_counter()
    call()
    seconds = max(time.perf_counter() - start, 1e-7)
    return Burst(int(seconds < LEAD_IN_SECONDS), max(1, math.ceil(BURST_SECONDS / seconds)))


def cold_rounds(bytes_per_round: int) -> int:
    """How many rounds read more than COLD_BYTES: a copy may be used again after as many."""
    return COLD_BYTES // max(bytes_per_round, 1) + 1


def interleaved(
    calls: Mapping[str, Sequence[Callable[[], Any]]], bursts: Mapping[str, Burst], *, seconds: float
) -> dict[str, Timing]:
    """Time each candidate, one burst of each per round, for about `seconds` per candidate and 5 rounds at least.

    calls: each candidate's call on each copy of its weight, taken in turn.
    """
    turns = {name: itertools.cycle(copies) for name, copies in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds * len(calls)
    for done in itertools.count():
        if done >= FEWEST_ROUNDS and time.perf_counter() >= deadline:
            break
        for name, turn in turns.items():
            lead_in, timed = bursts[name]
            for call in itertools.islice(turn, lead_in):
                call()
            batch = list(itertools.islice(turn, timed))
            start = time.perf_counter()
            for call in batch:
                call()
            samples[name].append((time.perf_counter() - start) / timed)
    return {name: summary(values) for name, values in samples.items()}


def summary(seconds: Sequence[float]) -> Timing:
    """Median, least and spread of the samples."""
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median * 1e6, min(seconds) * 1e6, (third - first) / median, len(seconds))
