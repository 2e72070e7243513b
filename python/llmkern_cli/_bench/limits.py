"""The machine at its best, now: bytes read per second, and multiply-adds per second of every kind of factor.

Measured by loops of the native module that do nothing else (csrc/cpu/peaks): another library's product is no ceiling.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from typing import Any

import torch

from llmkern import _features

# The codes of csrc/cpu/peaks/peaks.h, and what a row calls them.
FACTORS = {"float32": 0, "bfloat16": 1, "int8": 2}
READ_BYTES = 1 << 30
RUN_SECONDS = 0.01  # of one run of a loop, so that waking a thread does not show
REPEATS = 5


def measure(*, read_bytes: int = READ_BYTES, run_seconds: float = RUN_SECONDS) -> dict[str, Any]:
    """`read_gb_s`, `float32_gop_s`, `bfloat16_gop_s`, `int8_gop_s`, and every level's own `peaks`, with torch's number
    of threads. The values are None without the native module.

    bf16 values may also be multiplied in fp32, so `bfloat16_gop_s` is the better of the two.
    """
    names = ("read_gb_s", *(f"{factors}_gop_s" for factors in FACTORS))
    threads = torch.get_num_threads()
    usable = [row.name for row in _features.levels() if row.available and row.name not in _features.disabled()]
    if _features.native is None or not usable:
        return {**dict.fromkeys(names), "peaks": {}}
    levels = {name: module for name in usable if (module := getattr(_features.native.peaks, name, None))}
    peaks: dict[str, dict[str, float]] = {}
    for name, module in levels.items():
        found = {factors: _rate(module.multiply_add, code, threads, run_seconds) for factors, code in FACTORS.items()}
        peaks[name] = {factors: round(rate / 1e9, 1) for factors, rate in found.items() if rate}
    best = {factors: max((peak.get(factors, 0) for peak in peaks.values()), default=0) for factors in FACTORS}
    best["bfloat16"] = max(best["bfloat16"], best["float32"])
    read = max(_read_rates([module.read for module in levels.values()], read_bytes, threads))
    return {
        "read_gb_s": round(read / 1e9, 2),
        **{f"{factors}_gop_s": best[factors] or None for factors in FACTORS},
        "peaks": peaks,
    }


def _rate(multiply_add: Callable[..., float], code: int, threads: int, run_seconds: float) -> float:
    """Operations per second at best; 0 where the level has no such instruction."""
    rounds, best = 10_000, 0.0
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        operations = multiply_add(code, rounds, threads)
        seconds = max(time.perf_counter() - start, 1e-9)
        if not operations:
            return 0.0
        best = max(best, operations / seconds)
        rounds = max(1, int(rounds * run_seconds / seconds))
    return best


def _read_rates(reads: list[Callable[..., None]], nbytes: int, threads: int) -> list[float]:
    """Bytes per second of every way to read: each level, one stream or four, three distances of prefetching."""
    with mmap.mmap(-1, nbytes) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
        address, rates = buffer.data_ptr(), []
        for _ in range(2):
            for read in reads:
                for streams in (1, 4):
                    for ahead in (0, 512, 2048):
                        start = time.perf_counter()
                        read(address, nbytes, streams, ahead, threads)
                        rates.append(nbytes / (time.perf_counter() - start))
        del buffer  # it exports the memory, which could not be closed
    return rates
