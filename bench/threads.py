"""Our thread pool beside torch's OpenMP team: alone, in turns, under load, from several threads, after a fork.

Every case times one of our ops and torch's dense product of the same layer, so that the peer meets the same load. The
ratio of a row is its time over that of the same call alone. Calls in turns also take each other's weight out of the
caches: the row with the other on one thread, which wakes none of its workers, shows how much of the ratio that is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bench.results import write
from llmkern.formats import Int8Weight
from llmkern.ops import int8_linear
from llmkern_cli._bench import shapes, timing

BUSY = "while True: pass"
M = 8


def calls(n: int, k: int) -> dict[str, Callable[[], Any]]:
    """Our op and torch's on the same layer at M = 8: at M = 1 torch's product uses one thread."""
    dense, x = torch.randn(n, k), torch.randn(M, k)
    packed = Int8Weight.pack(dense)
    torch.testing.assert_close(int8_linear(x, packed), x @ packed.unpack().T, rtol=1e-3, atol=1e-3)
    return {"ours": lambda: int8_linear(x, packed), "torch": lambda: torch.nn.functional.linear(x, dense)}


def samples(call: Callable[[], Any], seconds: float, before: Callable[[], Any] | None = None) -> list[float]:
    """Seconds of single calls; `before` runs, untimed, before each."""
    found, clock, deadline = [], time.perf_counter, time.perf_counter() + seconds
    while len(found) < 20 or clock() < deadline:
        if before is not None:
            before()
        start = clock()
        call()
        found.append(clock() - start)
    return found


def row(case: str, who: str, threads: int, found: Sequence[float], alone: float | None) -> dict[str, Any]:
    """One line of the result; `alone` is the median in microseconds of the same call by itself."""
    measured = timing.summary(found)
    return {
        "case": case, "call": who, "threads": threads, "median_us": round(measured.median_us, 1),
        "p95_us": round(statistics.quantiles(found, n=20)[-1] * 1e6, 1), "spread": round(measured.spread, 3),
        "ratio_to_alone": None if alone is None else round(measured.median_us / alone, 2),
    }  # fmt: skip


def on_one_thread(call: Callable[[], Any]) -> None:
    """`call` without workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    call()
    torch.set_num_threads(before)


@contextmanager
def busy_process() -> Iterator[None]:
    """One process that never sleeps."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def from_threads(call: Callable[[], Any], callers: int, seconds: float) -> list[float]:
    """The calls of several Python threads at once; each thread's time per call is what its caller waits."""
    found: list[list[float]] = [[] for _ in range(callers)]
    start = threading.Barrier(callers)

    def run(at: int) -> None:
        start.wait()
        found[at] = samples(call, seconds)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [value for mine in found for value in mine]


def after_fork(call: Callable[[], Any], seconds: float) -> list[float]:
    """The calls of a forked child, whose parent has used its threads."""
    call()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writer, "w") as out:
            out.write(" ".join(map(str, samples(call, seconds))))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as source:
        text = source.read()
    os.waitpid(child, 0)
    return [float(value) for value in text.split()]


def measure(n: int, k: int, seconds: float) -> list[dict[str, Any]]:
    """All cases of one layer."""
    both, rows, threads = calls(n, k), [], torch.get_num_threads()
    alone = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        for who, call in both.items():
            found = samples(call, seconds)
            alone[who] = timing.summary(found).median_us
            rows.append(row("alone", who, count, found, None))
    for who, other in (("ours", "torch"), ("torch", "ours")):
        found = samples(both[who], seconds, before=both[other])
        rows.append(row(f"in turns with {other}", who, threads, found, alone[who]))
        found = samples(both[who], seconds, before=lambda call=both[other]: on_one_thread(call))
        rows.append(row(f"in turns with {other} on one", who, threads, found, alone[who]))
    with busy_process():
        for who, call in both.items():
            rows.append(row("one busy process", who, threads, samples(call, seconds), alone[who]))
    for who, call in both.items():
        rows.append(row("from two Python threads", who, threads, from_threads(call, 2, seconds), alone[who]))
    # torch's team does not survive a fork: a child's first parallel call would hang.
    rows.append(row("in a forked child", "ours", threads, after_fork(both["ours"], seconds), alone["ours"]))
    return [{"n": n, "k": k, "m": M, **line} for line in rows]


def text(rows: list[dict[str, Any]]) -> str:
    """One line per row."""
    lines = [f"{'N x K':>12} {'threads':>7} {'case':30}{'call':7}{'median us':>10}{'p95 us':>10}{'/alone':>8}"]
    for one in rows:
        ratio = "" if one["ratio_to_alone"] is None else f"{one['ratio_to_alone']:8.2f}"
        lines.append(
            f"{one['n']:>6}x{one['k']:<5} {one['threads']:>7} {one['case']:30}{one['call']:7}"
            f"{one['median_us']:10.1f}{one['p95_us']:10.1f}{ratio}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.threads", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="1536x576,4096x4096", help="names or NxK, by commas (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per case and call (%(default)s)")
    args = parser.parse_args(argv)
    rows = [line for n, k in shapes.parse(args.shapes) for line in measure(n, k, args.seconds)]
    write("threads", {"rows": rows})
    print(text(rows))


if __name__ == "__main__":
    main()
