"""The JSON of a GPU run as a page of tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench._gpu import goals
from bench._gpu.plan import MS

Row = dict[str, Any]


def table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows)


def render(result: dict[str, Any]) -> str:
    """All of it."""
    parts = [_machine(result), _steps(result["steps"]), _tests(result["tests"]), _sanitizer(result["sanitizer"])]
    parts += [_ceilings(result["ceilings"]), _goals(result["goals"]), _solver(result["solver"]), _rows(result["rows"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    gpu = machine.get("gpu") or {}
    words = [
        gpu.get("name") or "no GPU: a dry run on the CPU", f"capability {gpu.get('capability')}" if gpu else "",
        f"driver {clocks['driver_version']}" if (clocks := machine.get("clocks")) else "",
        f"torch {machine.get('torch')}", f"CUDA {machine.get('cuda')}", f"nvcc {machine.get('nvcc')}",
        f"commit {machine.get('commit')}", str(machine.get("date")),
    ]  # fmt: skip
    kernels = [(op, ", ".join(names) or "none") for op, names in (machine.get("kernels") or {}).items()]
    refused = "".join(f"\n- {text}" for text in machine.get("refused") or ())
    text = f"# llmkern on a GPU\n\n{'; '.join(word for word in words if word)}\n\n" + table(("op", "kernels"), kernels)
    return text + (f"\n\nNot runnable here:\n{refused}" if refused else "")


def _steps(steps: Sequence[Row]) -> str:
    lines = [(step["step"], step["status"], f"{step['seconds']:.0f}", step["note"]) for step in steps]
    return "## Steps\n\n" + table(("step", "status", "s", "note"), lines)


def _tests(found: Row | None) -> str:
    if not found:
        return ""
    counts = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "died", "skipped"))
    lines = [f"- {one['outcome']}: `{one['test']}`: {_line(one['message'])}" for one in found["failures"]]
    if found["more_failures"]:
        lines.append(f"- and {found['more_failures']} more")
    lines += [f"- {count} skipped: {_line(reason)}" for reason, count in found["skips"].items()]
    return f"## Tests: {counts}\n\n" + "\n".join(lines)


def _line(text: str, most: int = 240) -> str:
    return " ".join(text.split())[:most]


def _sanitizer(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [
        (row["tool"], row["found"], row["cases"], row["wrong"], row["seconds"],
         row["skipped"] or ("out of time; " if row["out_of_time"] else "") + (row["first"] or ""))
        for row in rows
    ]  # fmt: skip
    return "## compute-sanitizer\n\n" + table(("tool", "found", "cases", "wrong", "s", "note"), lines)


def _ceilings(found: Row | None) -> str:
    if not found:
        return ""
    names = ("copy_gb_s", "read_gb_s", "bfloat16_tflops", "int8_tops", "node_us")
    return "## Ceilings of the machine\n\n" + table(("what", "measured"), [(name, found[name]) for name in names])


def _goals(entries: Sequence[Row]) -> str:
    if not entries:
        return ""
    by_m = ["M = " + ", ".join(map(str, ms)) for ms in goals.COLUMNS]
    first = table(("must reach", "what", *by_m), goals.lines(entries))
    second = table(("at 4 of 5 shapes", *(f"M = {m}" for m in MS)), goals.peer_lines(entries))
    return f"## Goals\n\nThe worst cell of each.\n\n{first}\n\n{second}"


def _solver(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [
        (row["what"], row["kernel"], f"{row['n']}x{row['k']}", row["median_us"], row["wanted_us"],
         {True: "met", False: "not met", None: ""}[row["met"]], row["reference_us"], _number(row["loss"]),
         _number(row["reference_loss"]), row["skipped"])
        for row in rows
    ]  # fmt: skip
    header = ("what", "kernel", "N x K", "us", "wanted", "", "reference us", "loss", "reference loss", "not measured")
    return "## Solvers\n\n" + table(header, lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _rows(rows: Sequence[Row]) -> str:
    """Per shape a table: a candidate per line, an M per column: microseconds, and how many times as fast as dense."""
    parts = []
    for forced, title in ((False, "Linear ops and peers"), (True, "Each of our kernels, forced")):
        mine = [row for row in rows if bool(row.get("forced")) == forced]
        for n, k in dict.fromkeys((row["n"], row["k"]) for row in mine):
            here = [row for row in mine if (row["n"], row["k"]) == (n, k)]
            if any(row["median_us"] for row in here):
                parts.append(f"### {n} x {k}\n\n{_shape(here, forced)}")
            else:
                parts.append(f"### {n} x {k}\n\nNot measured: {_reasons(here)}")
        if mine:
            parts.insert(len(parts) - len({(row["n"], row["k"]) for row in mine}), f"## {title}\n\nus (x dense)")
    return "\n\n".join(parts)


def _shape(rows: Sequence[Row], forced: bool) -> str:
    ms = sorted({row["m"] for row in rows})
    lines: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in rows:
        name = row["peer"] or ((row["kernel"] or "") if forced else "ours")
        key = (row["op"], row["values"], row["activations"], name, row["dtype"])
        lines.setdefault(key, {})[row["m"]] = row
    timed = {key: found for key, found in lines.items() if any(row["median_us"] for row in found.values())}
    text = table(
        ("op", "values", "activations", "who", "dtype", *(f"M={m}" for m in ms)),
        [(*key, *(_cell(found.get(m)) for m in ms)) for key, found in timed.items()],
    )
    left = [row for key, found in lines.items() if key not in timed for row in found.values()]
    return text + (f"\n\nNot measured: {_reasons(left)}" if left else "")


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["median_us"] is None:
        return "-"
    ratio = f" ({1 / row['ratio_to_dense']:.2f}x)" if row["ratio_to_dense"] else ""
    eager = "" if row.get("timed") == "graph" else " eager"
    kernel = f" {row['kernel']}" if row["kernel"] and not row.get("forced") else ""
    return f"{row['median_us']:.1f}{ratio}{eager}{kernel}"


def _reasons(rows: Sequence[Row]) -> str:
    found: dict[str, list[str]] = {}
    for row in rows:
        name = row["peer"] or row["kernel"] or row["op"]
        names = found.setdefault(row["skipped"] or "", [])
        if name not in names:
            names.append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in found.items())
