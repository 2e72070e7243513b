"""Time on the device: replays of a graph of many calls between two events, candidates in turns.

A call of a few microseconds is shorter than what Python needs to make it, so a candidate's calls, each on the next
copy of its weight, are captured once and replayed. Candidates take turns, so that all see the same clocks. Work is
always waiting in the queue, so the gap between two launches does not show. On a CPU the calls are simply made.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from llmkern_cli._bench.timing import Timing, summary

FEWEST_ROUNDS = 7
CALLS = 48  # in a graph of short calls: what two events add is small beside them
SHORT_SECONDS = 50e-6  # a call; alone it seems longer than it is, because of its launch
GRAPH_SECONDS = CALLS * SHORT_SECONDS  # of a replay of longer calls
AHEAD_CYCLES = 400_000  # of waiting before a round, so that the queue is full when its first replay starts
SETTLE_SECONDS, SETTLED = 4.0, 0.01


class Run(NamedTuple):
    """`calls` calls at once. how: "graph" or "eager", and why not a graph."""

    go: Callable[[], Any]
    calls: int
    how: str
    reason: str | None = None


class Clock:
    """Events and graphs on a GPU, perf_counter on a CPU."""

    def __init__(self, device: str):
        self.device, self.cuda = device, device == "cuda"

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def settle(self) -> int:
        """Multiply until the clocks stay where they are; how many rounds that took."""
        if not self.cuda:
            return 0
        a = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        deadline, last = time.monotonic() + SETTLE_SECONDS, 0.0
        for done in range(10_000):
            took = self._elapsed(lambda: [a @ a for _ in range(50)])
            if (last and abs(took / last - 1) < SETTLED and done > 10) or time.monotonic() > deadline:
                return done
            last = took
        return 10_000

    def _elapsed(self, work: Callable[[], Any]) -> float:
        """Seconds of it, alone."""
        if not self.cuda:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def estimate(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, roughly."""
        call()
        self.sync()
        return statistics.median(self._elapsed(call) for _ in range(3))

    def capture(self, copies: Sequence[Callable[[], Any]], seconds: float) -> Run:
        """A graph of calls on every copy in turn, each as often as any other. seconds: of one call, roughly."""
        wanted = CALLS if seconds <= SHORT_SECONDS else int(GRAPH_SECONDS / seconds) + 1
        calls = [call for _ in range(-(-wanted // len(copies))) for call in copies]

        def eager() -> None:
            for call in calls:
                call()

        if not self.cuda:
            return Run(eager, len(calls), "eager", "graphs are CUDA's")
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                copies[0]()  # what a library makes at its first call on a stream is not to be captured
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=side):
                eager()
            graph.replay()
            torch.cuda.synchronize()
        except Exception as error:  # a peer may refuse in any way
            torch.cuda.synchronize()
            eager()
            return Run(eager, len(calls), "eager", f"not captured: {type(error).__name__}: {error}"[:200])
        return Run(graph.replay, len(calls), "graph")

    def interleaved(self, runs: Mapping[str, Run], seconds: float) -> dict[str, Timing]:
        """Medians of one call; one replay of each candidate per round, for about `seconds` per candidate."""
        samples: dict[str, list[float]] = {name: [] for name in runs}
        deadline = time.monotonic() + seconds * len(runs)
        done = 0
        while done < FEWEST_ROUNDS or time.monotonic() < deadline:
            for name, took in self._round(runs).items():
                samples[name].append(took / runs[name].calls)
            done += 1
        return {name: summary(values) for name, values in samples.items()}

    def _round(self, runs: Mapping[str, Run]) -> dict[str, float]:
        if not self.cuda:
            return {name: self._elapsed(run.go) for name, run in runs.items()}
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in runs}
        torch.cuda._sleep(AHEAD_CYCLES)
        for name, run in runs.items():
            start, end = events[name]
            start.record()
            run.go()
            end.record()
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}

    def eager_us(self, copies: Sequence[Callable[[], Any]]) -> float:
        """One call as Python makes it, on the host's clock: launches included, the device keeping up or not."""
        times = []
        for _ in range(FEWEST_ROUNDS):
            self.sync()
            start = time.perf_counter()
            for at in range(CALLS):
                copies[at % len(copies)]()
            self.sync()
            times.append((time.perf_counter() - start) / CALLS)
        return statistics.median(times) * 1e6
