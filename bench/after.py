"""What a call costs right after another library's: its threads may still spin, and ours sleep.

Per candidate before and per call after: the median over rounds of the calls that start so many milliseconds after the
other's last one. The lead-in of `llmkern bench` (timing.LEAD_IN_SECONDS) is read off here.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.results import write
from llmkern_cli._bench import measure, ours, peers, shapes, timing
from llmkern_cli._bench.candidate import Candidate
from llmkern_cli._bench.weights import Weights

EDGES_MS = (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
CALLS_BEFORE = 3
COPIES_BEFORE = 6
AFTER = ("torch.dense", "ggml.q4_0")  # peers to time beside ours, where they are installed
GROUP = 128

Turn = Iterator[Callable[[], Any]]


def turn(candidate: Candidate, m: int, copies: int) -> Turn:
    """Its calls on one copy after the other, without end."""
    assert candidate.build is not None
    assert candidate.bind is not None
    x = measure.input_rows(m, candidate.row["k"], candidate.dtype)
    calls = [candidate.bind(candidate.build(number), x) for number in range(copies)]
    measure.check(candidate, calls[0], x)
    return itertools.cycle(calls)


def windows(calls: Turn) -> dict[float, float]:
    """The mean seconds of the calls that start in each window, from now on."""
    found: dict[float, list[float]] = {}
    first = now = time.perf_counter()
    while (now - first) * 1e3 < EDGES_MS[-1]:
        call, start = next(calls), time.perf_counter()
        call()
        now = time.perf_counter()
        edge = max(edge for edge in EDGES_MS if edge <= (start - first) * 1e3)
        found.setdefault(edge, []).append(now - start)
    return {edge: statistics.fmean(values) for edge, values in found.items()}


def usable(candidates: Sequence[Candidate], m: int, copies: Callable[[Candidate], int]) -> dict[str, Turn]:
    """Those that can be built and are right here, by name."""
    found = {}
    for candidate in candidates:
        if candidate.row["skipped"]:
            continue
        try:
            found[candidate.name] = turn(candidate, m, copies(candidate))
        except Exception as error:  # a peer may fail in any way; `llmkern bench` has the row with its reason
            print(f"{candidate.name}: {error}"[:200])
    return found


@torch.inference_mode()
def rows(n: int, k: int, m: int, rounds: int) -> list[dict[str, Any]]:
    """One row per (before, call), with the median microseconds of each window."""
    weights = Weights(n, k, GROUP)
    theirs = list(peers.candidates(weights, torch.float32))
    mine = list(ours.candidates(weights, torch.float32, ["int4_linear", "int8_dynamic_linear"], "best"))
    after = [*mine, *(one for one in theirs if one.row["peer"] in AFTER)]
    calls = usable(after, m, lambda one: timing.cold_rounds(one.nbytes * len(after)))
    befores = usable([*theirs, *mine], m, lambda one: COPIES_BEFORE)
    found: dict[tuple[str, str], list[dict[float, float]]] = {}
    for _ in range(rounds):
        for (who, before), (name, timed) in itertools.product(befores.items(), calls.items()):
            for call in itertools.islice(before, CALLS_BEFORE):
                call()
            found.setdefault((who, name), []).append(windows(timed))
    return [
        {
            "n": n, "k": k, "m": m, "before": who, "call": name,
            "median_us": {
                str(edge): round(statistics.median(times) * 1e6, 1)
                for edge in EDGES_MS if (times := [one[edge] for one in seen if edge in one])
            },
        }
        for (who, name), seen in found.items()
    ]  # fmt: skip


def text(found: Sequence[dict[str, Any]]) -> str:
    """A block per call, a line per what ran before."""
    lines = []
    for name in dict.fromkeys(one["call"] for one in found):
        lines.append(f"{name}, us of the calls this many ms after")
        lines.append(" " * 72 + "".join(f"{edge:>9g}" for edge in EDGES_MS[:-1]))
        for one in found:
            if one["call"] == name:
                cells = (one["median_us"].get(str(edge)) for edge in EDGES_MS[:-1])
                lines.append(f"  {one['before']:70}" + "".join(f"{'-' if c is None else c:>9}" for c in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.after", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="1536x576", help="NxK (%(default)s)")
    parser.add_argument("--m", type=int, default=1, help="rows of x (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="(%(default)s)")
    args = parser.parse_args(argv)
    ((n, k),) = shapes.parse(args.shape)
    found = rows(n, k, args.m, args.rounds)
    write("after", {"rows": found})
    print(text(found))


if __name__ == "__main__":
    main()
