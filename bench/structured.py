"""Structured pruning of SmolLM2-135M: perplexity with and without restoration, size, and speed in stock transformers.

A quarter of the MLP channels by each way of choosing them, one of three key-value groups, three of thirty blocks; on
the windows of `bench.quality`. Models are saved by `save_pretrained` and measured as `AutoModelForCausalLM` loads them.
Sizes are what speed depends on, so it is timed once for each, in the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.quality import protocol
from bench.results import write
from llmkern._dense import dense_by_onednn
from llmkern.evaluate import decode_speed, perplexity, prefill_speed
from llmkern.prune import StructuredReport, apply_structured, plan_structured
from llmkern.prune.selection import METHODS

WANTED = 0.5  # of the perplexity without restoration, at most
ROWS = "rows.json"
ROUNDS = 3


class Case(NamedTuple):
    """What to keep, how it is chosen, and the damping of the restoration: a row for each."""

    name: str
    kept: dict[str, Any]
    method: str
    damps: tuple[float, ...] = (0.1,)


CASES = (
    *(Case(f"mlp 0.75 {one}", {"mlp": 0.75}, one) for one in METHODS),
    Case("kv groups 2 of 3 obs", {"kv_groups": 2}, "obs"),
    Case("blocks 27 of 30", {"blocks": 27}, "magnitude"),
)


def made(folder: Path) -> list[dict[str, Any]]:
    """A row per model, each saved in the folder, without speeds; those that are there from an earlier run stay."""
    dense, calibration, evaluation, _ = protocol()
    rows: list[dict[str, Any]] = json.loads((folder / ROWS).read_text()) if (folder / ROWS).is_file() else []
    there = {row["model"] for row in rows}

    def add(name: str, model: Any, bare: float | None = None, **more: Any) -> float:
        path = folder / name.replace(" ", "_")
        model.save_pretrained(path)
        loaded = AutoModelForCausalLM.from_pretrained(path)
        with dense_by_onednn(loaded):
            value = perplexity(loaded, evaluation).value
        if bare is not None:
            more |= {"ratio": round(value / bare, 4), "wanted": WANTED, "met": value <= WANTED * bare}
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        count = sum(parameter.numel() for parameter in loaded.parameters())
        row = {"model": name, "perplexity": round(value, 3), "parameters": count, "file_bytes": size}
        rows[:] = [*(one for one in rows if one["model"] != name), {**row, "folder": path.name, **more}]
        (folder / ROWS).write_text(json.dumps(rows), encoding="utf-8")
        print(f"{name:32}{value:14.3f}{count:12}", file=sys.stderr, flush=True)
        return value

    if "dense" not in there:
        add("dense", dense)
    for case in CASES:
        if f"{case.name} damp {case.damps[-1]}" in there:
            continue
        plan = plan_structured(dense, calibration, method=case.method, **case.kept, progress=False)
        small = apply_structured(dense, plan, restore="none")
        bare = add(f"{case.name} unrestored", small, restored=False)
        for damp in case.damps:
            report = StructuredReport()
            small = apply_structured(dense, plan, calibration=calibration, damp=damp, report=report, progress=False)
            add(f"{case.name} damp {damp}", small, bare, restored=True, report=report.to_dict())
    return rows


def add_speeds(folder: Path, rows: list[dict[str, Any]], window: Tensor) -> None:
    """Tokens per second of the first model of each size, to all rows of that size: the median of ROUNDS, in turns."""
    first = {row["parameters"]: row["folder"] for row in reversed(rows)}
    models = {size: AutoModelForCausalLM.from_pretrained(folder / name).eval() for size, name in first.items()}
    prefill: dict[int, list[float]] = {size: [] for size in models}
    decode: dict[int, list[float]] = {size: [] for size in models}
    for _ in range(ROUNDS):
        for size, model in models.items():
            prefill[size].append(prefill_speed(model, window))
            decode[size].append(decode_speed(model, window[: len(window) // 2]))
    for row in rows:
        row["prefill_tokens_per_s"] = round(statistics.median(prefill[row["parameters"]]), 1)
        row["decode_tokens_per_s"] = round(statistics.median(decode[row["parameters"]]), 2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, help="a folder for the models, which stay there")
    parser.add_argument("--speed", action="store_true", help="only time the models in --keep, and write the results")
    args = parser.parse_args(argv)
    if args.speed and args.keep is None:
        parser.error("--speed needs --keep, the folder of an earlier run")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        rows = json.loads((folder / ROWS).read_text()) if args.speed else made(folder)
        _, _, evaluation, tokens = protocol()
        add_speeds(folder, rows, evaluation[0])
    write("structured", {"tokens": tokens, "rows": rows})


if __name__ == "__main__":
    main()
