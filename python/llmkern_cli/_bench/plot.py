"""Speed over M as one self-contained SVG: a panel per shape, a line per candidate, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, GAP, LINE = 640, 360, 70, 40, 70, 15
COLOURS = ("#2f6fb7", "#c2622d", "#2c8a57", "#8a4fb0", "#b0392f", "#5c7a1f", "#1f8a99", "#99701f")


def render(rows: Sequence[dict[str, Any]]) -> str:
    """SVG text. Speed is 2MNK over the median, dense operations, so that sparse and dense compare. Ours are solid."""
    timed = [row for row in rows if row["median_us"]]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in timed))
    parts, top = [], TOP
    for shape in shapes:
        lines = _lines([row for row in timed if (row["n"], row["k"]) == shape])
        parts.append(_panel(shape, lines, top))
        top += max(HEIGHT, LINE * len(lines)) + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 520}" height="{top}" '
        f'viewBox="0 0 {WIDTH + 520} {top}" style="background:#fff">'
        "<style>text{font:11px system-ui,sans-serif;fill:#1c2430} .head{font-size:14px;font-weight:600}</style>"
        f"{''.join(parts)}</svg>\n"
    )


def _lines(rows: Sequence[dict[str, Any]]) -> dict[tuple, list[tuple[int, float]]]:
    """(is a peer, name) -> its (M, Gop/s), fastest at the largest M first."""
    lines: dict[tuple, list[tuple[int, float]]] = {}
    for row in rows:
        who = row["peer"] or f"{row['op']} {row['values']} ({row['kernel']})"
        name = f"{who}, {row['dtype']}, {row['activations']}"
        speed = 2 * row["m"] * row["n"] * row["k"] / row["median_us"] / 1e3
        lines.setdefault((row["peer"] is not None, name), []).append((row["m"], speed))
    return dict(sorted(lines.items(), key=lambda item: -item[1][-1][1]))


def _panel(shape: tuple[int, int], lines: dict[tuple, list[tuple[int, float]]], top: int) -> str:
    points = [point for line in lines.values() for point in line]
    ms = sorted({m for m, _ in points})
    low, high = min(speed for _, speed in points), max(speed for _, speed in points)
    x = _axis(ms[0], ms[-1], LEFT, WIDTH - 20)
    y = _axis(low, high, top + HEIGHT - 20, top + 10)
    parts = [f'<text class="head" x="{LEFT}" y="{top - 8}">N x K = {shape[0]} x {shape[1]}: Gop/s over M</text>']
    parts += [f'<text x="{x(m):.1f}" y="{top + HEIGHT}" text-anchor="middle">{m}</text>' for m in ms]
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        if low <= 10**power <= high:
            at = y(10**power)
            parts.append(
                f'<path d="M{LEFT} {at:.1f}H{WIDTH - 20}" stroke="#d7dce3"/>'
                f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10**power:g}</text>'
            )
    for at, ((peer, name), line) in enumerate(lines.items()):
        colour, dashes = COLOURS[at % len(COLOURS)], ' stroke-dasharray="4 3"' if peer else ""
        path = " ".join(f"{x(m):.1f},{y(speed):.1f}" for m, speed in line)
        label = top + 10 + LINE * at
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{1 if peer else 2}"{dashes}>'
            f"<title>{escape(name)}</title></polyline>"
            f'<path d="M{WIDTH} {label - 4}h24" stroke="{colour}" stroke-width="2"{dashes}/>'
            f'<text x="{WIDTH + 30}" y="{label}">{escape(name)}</text>'
        )
    return "".join(parts)


def _axis(low: float, high: float, start: float, end: float) -> Any:
    """A logarithmic scale from values to places; a single value lies in the middle."""
    if high <= low:
        return lambda value: (start + end) / 2
    return lambda value: start + (end - start) * math.log(value / low) / math.log(high / low)
