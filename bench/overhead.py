"""What a call costs above its kernel: the op and PackedLinear against the native function with pointers, at M = 1.

The kernel runs on one thread: how its threads start and stop is in bench.threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.results import write
from llmkern import _features
from llmkern._registry import OPS
from llmkern.nn import PackedLinear
from llmkern.ops import linear_args
from llmkern_cli._bench import timing
from llmkern_cli._bench.weights import Weights

FORMS = {
    "int8_linear": "int8",
    "int8_dynamic_linear": "int8",
    "int4_linear": "int4",
    "sparse24_linear": "sparse24",
    "sparse24_int4_linear": "sparse24_int4",
    "bitmask_linear": "bitmask",
}
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


def bare(op: str, args: tuple) -> Callable[[], Any]:
    """The native function alone, on the pointers that the op would give it."""
    calls: list[tuple] = []
    run: Any = OPS[op].pick(*args).run  # partial(call, function)
    y = run.func(lambda *pointers: calls.append(pointers), *args)
    function, pointers = run.args[0], calls[0]
    keep = (args, y)  # the pointers are into these

    def call() -> Any:
        return function(*pointers), keep

    return call


def measure(n: int, k: int, seconds: float) -> list[dict[str, Any]]:
    """One row per op and way of calling; all ways of one op and mode are timed in turns."""
    x, rows = torch.randn(1, k), []
    dense = torch.nn.Linear(k, n, bias=False).requires_grad_(False)
    packed = Weights(n, k, 64).packed
    for op, form in FORMS.items():
        weight = packed[form]
        args, layer = linear_args(op, x, weight, None), PackedLinear(weight)
        calls: dict[str, Callable[[], Any]] = {
            "kernel": bare(op, args),
            "op": lambda op=op, args=args: OPS[op].op(*args),
            "PackedLinear": lambda layer=layer: layer(x),
            "torch.nn.Linear": lambda: dense(x),
        }
        if layer.op != op:
            del calls["PackedLinear"]
        for name, mode in MODES.items():
            with mode():
                bursts = {call: timing.burst(run) for call, run in calls.items()}
                timings = timing.interleaved({call: [run] for call, run in calls.items()}, bursts, seconds=seconds)
            kernel_us = timings["kernel"].median_us
            rows += [
                {
                    "op": op, "n": n, "k": k, "m": 1, "dtype": "float32", "mode": name, "call": call,
                    "median_us": round(measured.median_us, 2), "spread": round(measured.spread, 3),
                    "overhead_us": round(measured.median_us - kernel_us, 2) if call in ("op", "PackedLinear") else None,
                }
                for call, measured in timings.items()
            ]  # fmt: skip
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """One line per op and mode."""
    lines = [f"{'op':22}{'mode':16}{'kernel':>8}{'op':>8}{'layer':>8}{'dense':>8}   above the kernel: op, layer (us)"]
    for op, mode in dict.fromkeys((row["op"], row["mode"]) for row in rows):
        mine = {row["call"]: row for row in rows if (row["op"], row["mode"]) == (op, mode)}
        layer = mine.get("PackedLinear", {"median_us": float("nan"), "overhead_us": float("nan")})
        lines.append(
            f"{op:22}{mode:16}{mine['kernel']['median_us']:8.1f}{mine['op']['median_us']:8.1f}"
            f"{layer['median_us']:8.1f}{mine['torch.nn.Linear']['median_us']:8.1f}"
            f"   {mine['op']['overhead_us']:.1f}, {layer['overhead_us']:.1f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="576x576", help="NxK (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="per way of calling (%(default)s)")
    args = parser.parse_args(argv)
    if _features.native is None:
        raise SystemExit(f"bench.overhead: {_features.native_error}")
    n, k = map(int, args.shape.split("x"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = measure(n, k, args.seconds)
    finally:
        torch.set_num_threads(before)
    write("overhead", {"rows": rows})
    print(text(rows))


if __name__ == "__main__":
    main()
