"""The linear ops and their peers on a GPU: every cell of the plan, checked, then timed in turns.

`python -m bench._gpu.sweep JOURNAL` goes on behind what the journal holds: a candidate that ended the process is left
out of its cell, with the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench._gpu import plan
from bench._gpu.ceilings import as_limits
from bench._gpu.clock import Clock, Run
from bench._gpu.journal import Journal
from bench._gpu.plan import Cell
from llmkern_cli._bench import measure, ours, peers
from llmkern_cli._bench.candidate import Candidate
from llmkern_cli._bench.weights import Weights

COLD_BYTES = 256 << 20  # of weight copies, and more than L2_TIMES the L2
L2_TIMES = 2
KEEP_FREE = 30 << 30  # bytes of the GPU's memory: with less, what earlier shapes left is dropped
PEER_SECONDS = 45.0  # for one library's building and compiling: some compile for every M
LOST = 70  # exit code when the context is
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OUT_OF_TIME = "out of time"
BUILDING, TIMING = "building the weights", "timing"

Row = dict[str, Any]


def who(candidate: Candidate) -> str:
    """A candidate's name, unique in a cell."""
    return f"{candidate.name} {candidate.row['values']}"


def _library(candidate: Candidate) -> str:
    """Of a peer that is no part of torch; empty for all others."""
    name = (candidate.row["peer"] or "").split(".")[0]
    return "" if name == "torch" else name


class Sweep:
    """The candidates of the shapes met so far, and how to measure a cell of them."""

    def __init__(self, device: str, dtype: torch.dtype, limits: dict[str, Any], seconds: float):
        self.clock, self.dtype, self.limits, self.seconds = Clock(device), dtype, limits, seconds
        self._weights: dict[tuple[int, int], Weights] = {}
        self._templates: list[Row] | None = None
        self._candidates: dict[tuple[int, int, str], list[Candidate]] = {}
        self._spent: dict[str, float] = {}  # seconds by library
        self.cold = COLD_BYTES
        if self.clock.cuda:
            self.cold = max(COLD_BYTES, L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size + 1)
        if device == "cpu":
            self.cold = 1 << 16

    def templates(self) -> list[Row]:
        """The rows of a cell, without results: for cells that are never reached."""
        if self._templates is None:
            self._templates = [{**one.row, "skipped": None} for one in self._build(128, 256, "best")]
        return self._templates

    def _build(self, n: int, k: int, kernels: str) -> list[Candidate]:
        weights = self._weights.setdefault((n, k), Weights(n, k, plan.GROUP_SIZE, self.clock.device))
        files = peers.FILES if kernels == "best" and self.clock.cuda else ("torch_dense",)
        theirs = peers.candidates(weights, self.dtype, files)
        return [*theirs, *ours.candidates(weights, self.dtype, ours.OP_NAMES, kernels)]

    def candidates(self, cell: Cell) -> list[Candidate]:
        """Of its shape, built when first asked for."""
        key = (cell.n, cell.k, cell.kernels)
        if key not in self._candidates:
            if self.clock.cuda and torch.cuda.mem_get_info()[0] < KEEP_FREE:
                self._forget()
            self._candidates[key] = self._build(*key)
        return self._candidates[key]

    def measured(self, cell: Cell, blocked: dict[str, str], doing: Callable[[str], None]) -> list[Row]:
        """As measure, or rows that say why the cell as a whole failed."""
        try:
            return self.measure(cell, blocked, doing)
        except Exception as error:
            self._end_if_lost()
            print(f"{cell}: {type(error).__name__}: {error}", flush=True)
            self._forget()
            return _unreached(self.templates(), cell, f"{type(error).__name__}: {error}"[:300])

    def _forget(self) -> None:
        """Drop the weights of every shape, and the memory that graphs and caches held."""
        self._candidates.clear()
        self._weights.clear()
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()

    def measure(self, cell: Cell, blocked: dict[str, str], doing: Callable[[str], None]) -> list[Row]:
        """The cell's rows. What fails, is wrong or is blocked is a row with its reason."""
        doing(BUILDING)
        candidates = self.candidates(cell)
        x = measure.input_rows(cell.m, cell.k, self.dtype, self.clock.device)
        rows = [{**one.row, "m": cell.m, "forced": cell.kernels == "all"} for one in candidates]
        runs: dict[str, Run] = {}
        for at, one in enumerate(candidates):
            if one.row["skipped"]:
                continue
            if reason := blocked.get(who(one)):
                rows[at]["skipped"] = reason
                continue
            library = _library(one)
            if library and self._spent.get(library, 0.0) > PEER_SECONDS:
                rows[at]["skipped"] = f"{OUT_OF_TIME}: {library} took {self._spent[library]:.0f} s to build and compile"
                continue
            doing(who(one))
            start = time.monotonic()
            try:
                runs[str(at)] = self._prepare(one, x, rows[at], eager=cell.m in plan.EAGER_MS)
            except Exception as error:  # a peer may fail in any way; that is its row
                rows[at]["skipped"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                self._end_if_lost()
            self._spent[library] = self._spent.get(library, 0.0) + time.monotonic() - start
        doing(TIMING)
        timings = self.clock.interleaved(runs, self.seconds) if runs else {}
        dense = next((found for at, found in timings.items() if rows[int(at)]["peer"] == "torch.dense"), None)
        for name, found in timings.items():
            row, one, run = rows[int(name)], candidates[int(name)], runs[name]
            row.update(
                median_us=round(found.median_us, 3), least_us=round(found.least_us, 3), spread=round(found.spread, 3),
                rounds=found.rounds, calls=run.calls, timed=run.how, not_a_graph=run.reason, copies=len(one.layers),
                rotated_bytes=one.nbytes * len(one.layers), bytes=one.nbytes, operations=2 * cell.m * one.multiplied,
                **measure.limit_share(one, cell.m, self.limits, found.median_us),
            )  # fmt: skip
            if dense is not None:
                row["ratio_to_dense"] = round(found.median_us / dense.median_us, 3)
        runs.clear()
        if self.clock.cuda:
            torch.cuda.empty_cache()  # the graphs' own memory
        return rows

    def _prepare(self, one: Candidate, x: torch.Tensor, row: Row, *, eager: bool) -> Run:
        """Check a candidate, then capture its calls."""
        assert one.build is not None
        assert one.bind is not None
        if one.kernel_at is not None:
            row["kernel"] = one.kernel_at(x)
        wanted = max(2, min(self.cold // max(one.nbytes, 1) + 1, one.most_copies))
        one.layers += [one.build(number) for number in range(len(one.layers), wanted)]
        first = one.bind(one.layers[0], x)
        row["error"] = measure.check(one, first, x)
        self.clock.sync()
        copies = [first, *(one.bind(layer, x) for layer in one.layers[1:])]
        run = self.clock.capture(copies, self.clock.estimate(first))
        if eager:
            row["eager_us"] = round(self.clock.eager_us(copies), 2)
        return run

    def _end_if_lost(self) -> None:
        """After an illegal access every call fails: this process is of no use any more."""
        try:
            self.clock.sync()
        except Exception as error:
            print(f"the context is lost: {error}", flush=True)
            os._exit(LOST)


def blocked_by(entries: Iterable[dict[str, Any]]) -> dict[Cell, dict[str, str]]:
    """cell -> what was under way when a process died there -> why."""
    found: dict[Cell, dict[str, str]] = {}
    last: tuple[Cell, str] | None = None
    for entry in entries:
        if "doing" in entry:
            last = Cell(*entry["doing"]), entry["who"]
        elif "died" in entry and last is not None:
            found.setdefault(last[0], {})[last[1]] = entry["died"]
    return found


def rows_of(entries: Sequence[dict[str, Any]]) -> list[Row]:
    """All rows of a journal: those measured, and for every cell of the plan that was not reached, why not."""
    done = {Cell(*entry["cell"]): entry["rows"] for entry in entries if "cell" in entry}
    died = blocked_by(entries)
    found: list[Row] = []
    for entry in entries:
        for cell in [Cell(*cell) for cell in entry.get("plan", ())]:
            reason = next(iter(died.get(cell, {}).values()), OUT_OF_TIME)
            found += done.get(cell) or _unreached(entry["templates"], cell, reason)
    return found


def _unreached(templates: Sequence[Row], cell: Cell, reason: str) -> list[Row]:
    place = {"n": cell.n, "k": cell.k, "m": cell.m, "forced": cell.kernels == "all", "skipped": reason}
    return [{**row, **place} for row in templates if cell.kernels == "best" or not row["peer"]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench._gpu.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("journal", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--plan", choices=plan.PLANS, default="full")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--ceilings", type=Path, help="JSON of bench._gpu.ceilings")
    parser.add_argument("--until", type=float, default=float("inf"), help="time.time() after which no cell is begun")
    parser.add_argument("--seconds", type=float, default=0.012, help="per candidate and cell (%(default)s)")
    args = parser.parse_args(argv)
    found = json.loads(args.ceilings.read_text()) if args.ceilings and args.ceilings.exists() else None
    journal = Journal(args.journal)
    entries = journal.read()
    with torch.inference_mode():
        sweep = Sweep(args.device, DTYPES[args.dtype], as_limits(found), args.seconds)
        cells = plan.PLANS[args.plan]
        if not entries:
            journal.write(plan=cells, templates=sweep.templates())
        blocked = blocked_by(entries)
        done = {Cell(*entry["cell"]) for entry in entries if "cell" in entry}
        sweep.clock.settle()
        for cell in cells:
            if time.time() > args.until:
                break
            if cell in done:
                continue
            stopped = blocked.get(cell, {})
            if whole := stopped.get(BUILDING) or stopped.get(TIMING):
                journal.write(cell=cell, rows=_unreached(sweep.templates(), cell, whole))
                continue
            rows = sweep.measured(cell, stopped, lambda name, cell=cell: journal.write(doing=cell, who=name))
            journal.write(cell=cell, rows=rows)
            timed = sum(row["median_us"] is not None for row in rows)
            print(f"{cell.n}x{cell.k} M={cell.m} {cell.kernels}: {timed} of {len(rows)} timed", flush=True)


if __name__ == "__main__":
    main()
