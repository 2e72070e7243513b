"""The GPU at its best, now: bytes copied and read per second, and products of bf16 and of int8 per second.

`python -m bench._gpu.ceilings DEVICE OUT` writes JSON. Unlike on a CPU, other libraries' kernels are the ceiling here:
copies and sums of many bytes come close to the memory's rate, and large products to the tensor cores'.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench._gpu.clock import Clock
from bench._gpu.machine import smi

GIB, SIDE = 1 << 30, 8192
SMALL_BYTES, SMALL_SIDE = 1 << 16, 64


def measure(device: str) -> dict[str, Any]:
    """`copy_gb_s` (bytes read and bytes written), `read_gb_s`, `bfloat16_tflops`, `int8_tops`, and `node_us`, what a
    kernel that does next to nothing takes in a graph; each the best of several. A failing one is None, with its reason
    in `notes`.
    """
    clock, cuda = Clock(device), device == "cuda"
    settled = clock.settle()
    nbytes, side = (2 * GIB, SIDE) if cuda else (SMALL_BYTES, SMALL_SIDE)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    wide = source.view(torch.int32).view(torch.float32)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    c, d = (torch.randint(-127, 128, (side, side), device=device, dtype=torch.int8) for _ in range(2))
    one = torch.zeros(1, device=device)
    notes: dict[str, str] = {}

    def least(name: str, call: Callable[[], Any], repeats: int) -> float | None:
        try:
            run = clock.capture([call] * repeats, clock.estimate(call))
            return clock.interleaved({name: run}, 0.3 if cuda else 0.0)[name].least_us / 1e6
        except Exception as error:
            notes[name] = f"{type(error).__name__}: {error}"[:300]
            return None

    seconds = {
        "copy": least("copy", lambda: target.copy_(source), 4),
        "read": least("read", wide.sum, 4),
        "bfloat16": least("bfloat16", lambda: a @ b.t(), 4),
        "int8": least("int8", lambda: torch._int_mm(c, d.t()), 4),
        "node": least("node", lambda: one.add_(1), 50),
    }
    operations = 2 * side**3

    def rate(work: float, name: str, unit: float) -> float | None:
        return round(work / took / unit, 2) if (took := seconds[name]) else None

    return {
        "copy_gb_s": rate(2 * nbytes, "copy", 1e9), "read_gb_s": rate(nbytes, "read", 1e9),
        "bfloat16_tflops": rate(operations, "bfloat16", 1e12), "int8_tops": rate(operations, "int8", 1e12),
        "node_us": round(seconds["node"] * 1e6, 2) if seconds["node"] else None,
        "bytes": nbytes, "side": side, "settled_after": settled, "clocks": smi(), "notes": notes,
    }  # fmt: skip


def as_limits(ceilings: dict[str, Any] | None) -> dict[str, Any]:
    """As llmkern_cli._bench.measure and goals read them. Reading is at least as fast as copying."""
    found = ceilings or {}
    read = max(found.get("read_gb_s") or 0.0, found.get("copy_gb_s") or 0.0) or None
    bf16, int8 = ((found.get(name) or 0.0) * 1e3 or None for name in ("bfloat16_tflops", "int8_tops"))
    return {"read_gb_s": read, "float32_gop_s": None, "bfloat16_gop_s": bf16, "int8_gop_s": int8, "peaks": {}}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(sys.argv[1]), indent=1) + "\n", encoding="utf-8")
