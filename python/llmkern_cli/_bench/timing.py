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
# A burst of calls is timed as one, so that the clock does not show.
BURST_SECONDS = 300e-6
# Before it the candidate runs untimed for as long as the one before may disturb it: that one's threads still spin, its
# own sleep, and its code is cold. Its first call takes up to three times as long, the next ones a quarter more, and
# after this time nothing is left of it.
LEAD_IN_SECONDS = 2e-3
# From this length of a call on, what is disturbed in it does not show.
LONG_SECONDS = 5e-3
PROBES = 5


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
    """How many calls make a burst, by the shortest of a few: the first may fault pages in or prepack, and any of them
    may be interrupted.
    """
    call()
    shortest, spent = math.inf, 0.0
    for _ in range(PROBES):
        start = time.perf_counter()
        call()
        seconds = max(time.perf_counter() - start, 1e-7)
        shortest, spent = min(shortest, seconds), spent + seconds
        if spent > LONG_SECONDS:
            break
    lead_in = math.ceil(LEAD_IN_SECONDS / shortest) if shortest < LONG_SECONDS else 0
    return Burst(lead_in, math.ceil(BURST_SECONDS / shortest))


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
