"""Speed over M as one self-contained SVG: a panel per shape and class, a line per candidate, both axes logarithmic.

Only what keeps the activations alike is compared, so each class has its own panel, and the many candidates that keep
them have one per dtype of x. torch's dense product is in all of them, in grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from llmkern_cli._bench.candidate import CLASSES, KEPT

WIDTH, HEIGHT, LEFT, TOP, HEAD, GAP, LINE = 430, 300, 48, 16, 44, 34, 15
LEGEND, COLUMNS = 350, 2
COLOURS = (
    "#2f6fb7", "#d1661f", "#2c8a57", "#8a4fb0", "#c0392b", "#9a7a0a", "#1494a8", "#d0559b", "#5f6b12", "#3b3fa8",
    "#8b4a2b", "#19703b",
)  # fmt: skip
DENSE, GREY = "torch.dense", "#8a929e"
STEPS = (1, 2, 5)
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

Line = tuple[str, bool, list[tuple[int, float]]]  # its name, whether it is a peer, and (M, Gop/s)


def render(rows: Sequence[dict[str, Any]]) -> str:
    """SVG text. Speed is 2MNK over the median, dense operations, so that sparse and dense compare. Ours are solid."""
    timed = [row for row in rows if row["median_us"]]
    parts, top, panel = [], TOP, WIDTH + LEGEND
    for n, k in dict.fromkeys((row["n"], row["k"]) for row in timed):
        panels = _panels([row for row in timed if (row["n"], row["k"]) == (n, k)])
        parts.append(f'<text class="head" x="{LEFT}" y="{top + 14}">N x K = {n} x {k}: Gop/s over M</text>')
        top += HEAD
        for first in range(0, len(panels), COLUMNS):
            beside = panels[first : first + COLUMNS]
            parts += [_panel(title, lines, panel * at, top) for at, (title, lines) in enumerate(beside)]
            top += max(HEIGHT, *(LINE * len(lines) + 10 for _, lines in beside)) + GAP
    width = COLUMNS * panel
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" viewBox="0 0 {width} {top}" '
        'style="background:#fff">'
        "<style>text{font:11px system-ui,sans-serif;fill:#1c2430} .head{font-size:15px;font-weight:600} "
        ".title{font-size:12px;font-weight:600}</style>"
        f"{''.join(parts)}</svg>\n"
    )


def _panels(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[Line]]]:
    """(title, lines) of one shape; a panel that would hold torch's dense product alone is left out."""
    found = []
    for activations in CLASSES:
        dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
        for mine in [[one] for one in dtypes] if activations == KEPT else [dtypes]:
            here = [
                row for row in rows if row["dtype"] in mine and (row["activations"] == activations or _dense(row))
            ]  # fmt: skip
            if not all(_dense(row) for row in here):
                title = f"activations {activations}" + (f", {mine[0]}" if activations == KEPT else "")
                found.append((title, _lines(here, named=len(mine) > 1)))
    return found


def _dense(row: dict[str, Any]) -> bool:
    return row["peer"] == DENSE


def _lines(rows: Sequence[dict[str, Any]], *, named: bool) -> list[Line]:
    """Fastest at its largest M first; `named`: with the dtype of x."""
    lines: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for row in rows:
        name = row["peer"] or f"{row['op']} {row['values']} ({row['kernel']})"
        name += f", {SHORT.get(row['dtype'], row['dtype'])}" if named else ""
        speed = 2 * row["m"] * row["n"] * row["k"] / row["median_us"] / 1e3
        lines.setdefault((name, row["peer"] is not None), []).append((row["m"], speed))
    return sorted(((*who, points) for who, points in lines.items()), key=lambda line: -line[2][-1][1])


def _panel(title: str, lines: list[Line], left: int, top: int) -> str:
    start, end, bottom = left + LEFT, left + WIDTH - 16, top + HEIGHT - 20
    points = [point for _, _, line in lines for point in line]
    ms = sorted({m for m, _ in points})
    low, high = min(speed for _, speed in points), max(speed for _, speed in points)
    x, y = _axis(ms[0], ms[-1], start, end), _axis(low, high, bottom - 6, top + 6)
    parts = [f'<text class="title" x="{start}" y="{top - 6}">{escape(title)}</text>']
    parts += [f'<text x="{x(m):.1f}" y="{bottom + 16}" text-anchor="middle">{m}</text>' for m in ms]
    for value in _ticks(low, high):
        parts.append(
            f'<path d="M{start} {y(value):.1f}H{end}" stroke="#e1e5ea"/>'
            f'<text x="{start - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    parts.append(f'<path d="M{start} {top}V{bottom}H{end}" fill="none" stroke="#9aa3af"/>')
    colours = 0
    for at, (name, peer, line) in enumerate(lines):
        dense = name.split(",")[0] == DENSE
        colour = GREY if dense else COLOURS[colours % len(COLOURS)]
        colours += not dense
        parts.append(
            _drawn(name, peer, [(x(m), y(speed)) for m, speed in line], colour, end + 16, top + 12 + LINE * at)
        )
    return "".join(parts)


def _drawn(name: str, peer: bool, places: list[tuple[float, float]], colour: str, left: int, label: int) -> str:
    """A line, the points that were measured, and its label."""
    stroke = f'stroke="{colour}" ' + ('stroke-width="1.2" stroke-dasharray="5 3"' if peer else 'stroke-width="2.4"')
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2 if peer else 3}" fill="{colour}"/>' for x, y in places)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return (
        f'<g><title>{escape(name)}</title><polyline points="{path}" fill="none" {stroke}/>{dots}</g>'
        f'<path d="M{left} {label - 4}h22" {stroke}/><text x="{left + 28}" y="{label}">{escape(name)}</text>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within; only the powers over more than two decades."""
    steps = STEPS if high < 100 * low else STEPS[:1]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _axis(low: float, high: float, start: float, end: float) -> Any:
    """A logarithmic scale from values to places; a single value lies in the middle."""
    if high <= low:
        return lambda value: (start + end) / 2
    return lambda value: start + (end - start) * math.log(value / low) / math.log(high / low)
