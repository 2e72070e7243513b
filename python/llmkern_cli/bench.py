"""`llmkern bench`: the machine's limits, then our linear ops (and other libraries') against them and each other."""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llmkern_cli._common import Number, UsageError, at_least, progress, refuse_foreign, table

NAME = "bench"
HELP = "Measure the machine's limits and every linear op against them, torch, and other libraries."
MARKER = "bench.json"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
RECIPES = "rtn-int8,w8a8,rtn-int4-g128,magnitude-2:4,magnitude-0.5"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="linear ops (all)")
    parser.add_argument("--ops", dest="more_ops", default="", metavar="OPS", help="the same, by commas")
    parser.add_argument("--shapes", default="goals", help="llama3-8b, smollm2, ... or NxK, by commas (%(default)s)")
    parser.add_argument("--m", default="1,4,16,64,256,512", help="rows of x, by commas (%(default)s)")
    parser.add_argument("--dtype", default="fp32,bf16", help="of x, by commas: fp32, bf16, fp16 (%(default)s)")
    parser.add_argument(
        "--group-size",
        type=at_least(1),
        default=128,
        metavar="G",
        help="of int4, halved where it does not divide K (%(default)s)",
    )
    parser.add_argument("--kernels", choices=["best", "all"], default="best", help="which of ours (%(default)s)")
    parser.add_argument("--peers", action="store_true", help="other libraries as well, those that are installed")
    parser.add_argument("--threads", type=at_least(1), metavar="T", help="(torch's own number)")
    parser.add_argument("--seconds", type=float, default=0.1, help="per candidate and M (%(default)s)")
    parser.add_argument("--model", metavar="MODEL", help="whole models instead: MODEL or llama-1b (random weights)")
    parser.add_argument("--recipes", default=RECIPES, help="of --model, by commas (%(default)s)")
    parser.add_argument("--prompt", type=at_least(2), default=128, metavar="P", help="tokens, of --model (%(default)s)")
    parser.add_argument("--tokens", type=at_least(2), default=16, metavar="T", help="decoded, of --model (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write bench.json and bench.svg there")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, limits, rows, and the goals with what was measured; with --model its speeds."""
    import torch

    if args.out:
        refuse_foreign(args.out, MARKER)
    if args.threads:
        torch.set_num_threads(args.threads)
    result = _models(args) if args.model else _linear(args)
    result = {"machine": _machine(), **result}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / MARKER).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if not args.model:
            from llmkern_cli._bench import plot

            (args.out / "bench.svg").write_text(plot.render(result["rows"]), encoding="utf-8")
    return result


def _linear(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from llmkern_cli._bench import goals, limits, measure, ours, peers, shapes
    from llmkern_cli._bench.weights import Weights

    ops = [*args.ops, *(part for part in args.more_ops.split(",") if part)] or list(ours.OP_NAMES)
    if unknown := sorted(set(ops) - set(ours.OP_NAMES)):
        raise UsageError(f"unknown op {', '.join(unknown)}; known: {', '.join(ours.OP_NAMES)}")
    dtypes = [getattr(torch, _dtype(name)) for name in args.dtype.split(",")]
    try:
        sizes = shapes.parse(args.shapes)
    except ValueError as error:
        raise UsageError(str(error)) from error
    ms = _counts(args.m)
    started = time.perf_counter()
    limit = limits.measure()
    progress(_limits_text(limit))
    rows: list[dict[str, Any]] = []
    for n, k in sizes:
        weights = Weights(n, k, args.group_size)
        found: list[Any] = []
        for dtype in dtypes:
            found += peers.candidates(weights, dtype, peers.FILES if args.peers else ("torch_dense",))
            found += ours.candidates(weights, dtype, ops, args.kernels)

        def told(text: str, n: int = n, k: int = k) -> None:
            progress(f"{n}x{k} {text} ({time.perf_counter() - started:.0f} s)")

        rows += measure.measure(found, ms, limit, args.seconds, told)
    return {"limits": limit, "rows": rows, "goals": goals.judge(rows, limit)}


def _models(args: argparse.Namespace) -> dict[str, Any]:
    from llmkern_cli._bench import generate
    from llmkern_cli._common import parse_recipe, quiet_transformers

    recipes = [name for name in args.recipes.split(",") if name]
    for name in recipes:
        parse_recipe(name)
    dtypes = [_dtype(name) for name in args.dtype.split(",")]
    quiet_transformers()
    return generate.measure(args.model, recipes, dtypes, args.prompt, args.tokens)


def _dtype(name: str) -> str:
    full = DTYPES.get(name, name)
    if full not in DTYPES.values():
        raise UsageError(f"--dtype: wanted {', '.join(DTYPES)}, got {name!r}")
    return full


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"--m: wanted numbers of at least 1 by commas, got {text!r}")
    return [int(part) for part in parts]


def _machine() -> dict[str, Any]:
    import torch

    import llmkern
    from llmkern import _features
    from llmkern_cli.env import machine

    return {
        **machine(),
        "levels": [level.name for level in _features.levels() if level.available],
        "threads": torch.get_num_threads(),
        "llmkern": llmkern.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _limits_text(limits: dict[str, Any]) -> str:
    if limits["read_gb_s"] is None:
        return "limits: not measured, the native module is not built"
    peaks = ", ".join(
        f"{level} {factors} {rate:,.0f}" for level, found in limits["peaks"].items() for factors, rate in found.items()
    )
    return f"limits: read {limits['read_gb_s']} GB/s; multiply-adds in Gop/s: {peaks}"


def show(result: dict[str, Any]) -> str:
    """Limits, a line per row, then the goals; or the speeds of a model."""
    if "model" in result:
        header = ("model", "dtype", "recipe", "prefill tok/s", "decode tok/s", "bytes", "note")
        lines = [
            (result["model"], row["dtype"], row["recipe"], _number(row["prefill_tokens_per_s"]),
             _number(row["decode_tokens_per_s"]), row["bytes"] or 0, row["skipped"] or "")
            for row in result["rows"]
        ]  # fmt: skip
        return table(header, lines)
    from llmkern_cli._bench import goals

    columns = ("op", "kernel or peer", "N x K", "M", "x", "activations", "us", "spread", "/dense", "of limit", "bound")
    timed = [_cells(row) for row in result["rows"] if row["median_us"]]
    reasons = dict.fromkeys(
        (row["peer"] or row["kernel"], row["dtype"], row["skipped"]) for row in result["rows"] if row["skipped"]
    )
    parts = [_limits_text(result["limits"]), "", table(columns, timed)]
    if reasons:
        parts += ["", "not measured:", *(f"  {who} {dtype}: {reason}" for who, dtype, reason in reasons)]
    if result["goals"]:
        by_m = ["M = " + ", ".join(map(str, ms)) for ms in goals.COLUMNS]
        parts += ["", table(("must reach", "what", *by_m), goals.cells(result["goals"]))]
        parts += filter(None, [goals.reach(result["goals"])])
    return "\n".join(parts)


def _number(value: float | None) -> Any:
    return "" if value is None else Number(value, 1)


def _cells(row: dict[str, Any]) -> tuple:
    share = "" if row["limit_share"] is None else f"{row['limit_share']:.0%}"
    ratio = "" if row["ratio_to_dense"] is None else f"{row['ratio_to_dense']:.2f}"
    values = f" {row['values']}" if row["op"] == "bitmask_linear" else ""
    return (
        row["op"] + values, row["peer"] or row["kernel"], f"{row['n']}x{row['k']}", row["m"], row["dtype"],
        row["activations"], Number(row["median_us"], 1), f"{row['spread']:.0%}", ratio, share, row["bound"] or "",
    )  # fmt: skip
