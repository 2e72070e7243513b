"""compute-sanitizer over bench._gpu.small: its tools side by side, and what each found."""

from __future__ import annotations

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench._gpu import supervise

# The tool's name, its further options, and whether it takes the smaller set of cases: it slows kernels down most.
TOOLS = (
    ("memcheck", ("--report-api-errors", "no", "--print-limit", "50"), False),
    ("racecheck", ("--racecheck-report", "all", "--print-limit", "50"), True),
    ("synccheck", ("--print-limit", "50"), True),
)
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
# torch's cache would hide what lies outside of a tensor but inside of its block.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
FOUND = 9  # the sanitizer's exit code when it has found something
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
CASES = re.compile(r"CASES: (\d+), WRONG: (\d+)")


def sanitizer() -> str | None:
    """The tool, on the path or where CUDA puts it."""
    return next(filter(None, map(shutil.which, ("compute-sanitizer", *PLACES))), None)


def run(logs: Path, seconds: float, env: dict[str, str], device: str) -> list[dict[str, Any]]:
    """A row per tool. On a CPU the driver runs by itself, which tests the driver alone."""
    driver = [sys.executable, "-u", "-m", "bench._gpu.small", "--device", device]
    tool = sanitizer() if device == "cuda" else None
    if device == "cuda" and tool is None:
        return [_row(name, "compute-sanitizer is not installed") for name, _, _ in TOOLS]

    def one(name: str, options: tuple[str, ...], fewer: bool) -> dict[str, Any]:
        log = logs / f"{name}.log"
        prefix = [tool, "--tool", name, "--error-exitcode", str(FOUND), *options] if tool else []
        command = [*prefix, *driver, *(["--fewer"] if fewer or not tool else [])]
        outcome = supervise.run(command, log, seconds, env={**env, **ENVIRONMENT})
        return _read(name, outcome, log.read_text(encoding="utf-8", errors="replace"), sanitized=bool(tool))

    tools = TOOLS if tool else (("none", (), True),)
    with ThreadPoolExecutor(len(tools)) as pool:
        return list(pool.map(lambda each: one(*each), tools))


def _row(name: str, skipped: str | None = None) -> dict[str, Any]:
    return {
        "tool": name, "found": None, "cases": None, "wrong": None, "seconds": None, "out_of_time": False,
        "first": None, "skipped": skipped,
    }  # fmt: skip


def _read(name: str, outcome: supervise.Outcome, text: str, *, sanitized: bool) -> dict[str, Any]:
    row = {**_row(name), "seconds": round(outcome.seconds, 1), "out_of_time": outcome.out_of_time}
    if match := CASES.search(text):
        row["cases"], row["wrong"] = int(match[1]), int(match[2])
    if sanitized and row["cases"] == 0:
        row["skipped"] = "no kernel of this device runs here"
    if match := SUMMARY.search(text):
        row["found"] = int(match[1])
    elif outcome.out_of_time:
        row["found"] = len(re.findall(r"^========= (?:Invalid|Error|Warning|Race|Barrier)", text, re.MULTILINE))
    elif sanitized:
        row["skipped"] = f"no summary, exit code {outcome.code}: {_last(text)}"
    # The case that was printed last before the first report.
    lines = text.splitlines()
    reported = (at for at, line in enumerate(lines) if re.match(r"=========\s+(Invalid|Error|Race|Barrier)", line))
    if (at := next(reported, None)) is not None:
        case = next((line for line in reversed(lines[:at]) if line and not line.startswith("=")), "")
        row["first"] = f"{case}: {lines[at].strip('= ')}"[:300]
    return row


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
