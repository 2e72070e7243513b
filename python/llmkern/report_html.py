"""The report as one self-contained HTML page: totals, two bar charts as inline SVG, and the table of layers."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmkern.report import Report, Row

ROW_HEIGHT, LABEL, PLOT, VALUE = 16, 260, 420, 110
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6979; --line: #d7dce3; --page: #ffffff;
  --before: #c3cbd6; --after: #2f6fb7; --loss: #c2622d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa6b5; --line: #333c48; --page: #14181e;
  --before: #46515f; --after: #6aa5e8; --loss: #e48a55; } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
p.legend { color: var(--soft); margin: .2rem 0 .6rem; }
div.scroll { overflow-x: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); } svg .value { fill: var(--soft); }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } td.text, th.text { text-align: left; white-space: normal; }
"""


def render(report: Report) -> str:
    """HTML text of a `Report`; every text in it is escaped."""
    from llmkern.report import human

    sums = report.totals
    facts = {
        "layers": f"{sums['layers']} ({sums['coverage']:.0%} of linear bytes)",
        "linear weights": f"{human(sums['linear_bytes_before'])} → {human(sums['linear_bytes_after'])}",
        "whole model": f"{human(report.model_bytes_before)} → {human(report.model_bytes_after)}",
        "mean relative loss": "none" if sums["mean_loss"] is None else f"{sums['mean_loss']:.3g}",
        "time": f"{report.seconds:.1f} s ({sums['solver_seconds']:.1f} s in solvers)",
        "problems": f"{sums['problems']} in {len(report.problems)} layers" if sums["problems"] else "none",
        "calibration": f"{report.tokens:,} tokens" if report.tokens else "none needed",
    }
    cells = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    about = " · ".join(
        [
            *(f"{key} {value}" for key, value in report.versions.items()),
            *(str(value) for value in report.machine.values()),
        ]
    )
    parts = [
        f"<h1>llmkern report: {escape(report.recipe)}</h1>",
        f'<p class="legend">{escape(about)}</p>',
        f"<dl>{cells}</dl>",
        *(f"<p>{escape(note)}</p>" for note in report.notes),
        *_problems(report),
        "<h2>Relative output error per layer</h2>",
        '<p class="legend">tr((W−Q) H (W−Q)ᵀ) / tr(W H Wᵀ); without calibration ‖W−Q‖² / ‖W‖². Longer is worse.</p>',
        f'<div class="scroll">{_losses(report.rows)}</div>',
        "<h2>Bytes per layer</h2>",
        '<p class="legend">Pale: before. Strong: after.</p>',
        f'<div class="scroll">{_sizes(report.rows)}</div>',
        "<h2>Layers</h2>",
        f'<div class="scroll">{_table(report.rows)}</div>',
    ]
    if report.skipped:
        rows = "".join(
            f'<tr><td class="text">{escape(skip.name)}</td><td class="text">{escape(skip.reason)}</td>'
            f"<td>{skip.bytes:,}</td></tr>"
            for skip in report.skipped
        )
        parts.append(
            '<h2>Left as it was</h2><div class="scroll"><table><tr><th class="text">layer</th>'
            f'<th class="text">why</th><th>bytes</th></tr>{rows}</table></div>'
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>llmkern: {escape(report.recipe)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _problems(report: Report) -> list[str]:
    """The layers with problems, above everything else; nothing if there are none."""
    if not report.problems:
        return []
    rows = "".join(
        f'<tr><td class="text">{escape(name)}</td><td class="text">{escape("; ".join(problems))}</td></tr>'
        for name, problems in report.problems.items()
    )
    head = '<tr><th class="text">layer</th><th class="text">what was not as it should be</th></tr>'
    return [f'<h2>Problems</h2><div class="scroll"><table>{head}{rows}</table></div>']


def _losses(rows: list[Row]) -> str:
    known = [row.loss for row in rows if row.loss is not None and math.isfinite(row.loss)]
    top = max(known, default=0.0) or 1.0
    bars = []
    for row in rows:
        finite = row.loss is not None and math.isfinite(row.loss)
        length = PLOT * row.loss / top if finite else 0.0  # type: ignore[operator]
        text = "exact" if row.loss is None else f"{row.loss:.3g}"
        bars.append((row.name, [(length, "--loss", 2, ROW_HEIGHT - 4)], text))
    return _chart(bars)


def _sizes(rows: list[Row]) -> str:
    top = max((row.bytes_before for row in rows), default=0) or 1
    return _chart(
        [
            (
                row.name,
                [
                    (PLOT * row.bytes_before / top, "--before", 2, ROW_HEIGHT - 4),
                    (PLOT * min(row.bytes_after / top, 1.0), "--after", 5, ROW_HEIGHT - 10),
                ],
                f"{row.bytes_after:,} B",
            )
            for row in rows
        ]
    )


def _chart(bars: list[tuple[str, list[tuple[float, str, int, int]], str]]) -> str:
    """Horizontal bars, one line per layer: (name, [(length, colour, inset, thickness)], text at the end)."""
    height = ROW_HEIGHT * len(bars) + 4
    lines = []
    for at, (name, layers, text) in enumerate(bars):
        y = ROW_HEIGHT * at
        shown = name if len(name) <= 40 else "…" + name[-39:]
        lines.append(f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end">{escape(shown)}</text>')
        lines += [
            f'<rect x="{LABEL}" y="{y + inset}" width="{length:.1f}" height="{thick}" style="fill:var({colour})"/>'
            for length, colour, inset, thick in layers
        ]
        end = LABEL + max((layer[0] for layer in layers), default=0.0) + 6
        lines.append(f'<text class="value" x="{end:.1f}" y="{y + 12}">{escape(text)}</text>')
    width = LABEL + PLOT + VALUE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img">{"".join(lines)}</svg>'
    )


def _table(rows: list[Row]) -> str:
    head = (
        '<tr><th class="text">layer</th><th>N × K</th><th class="text">method</th><th class="text">kernel</th>'
        "<th>loss</th><th>damp</th><th>tokens</th><th>seconds</th><th>bytes before</th><th>bytes after</th>"
        '<th class="text">notes</th></tr>'
    )
    lines = []
    for row in rows:
        numbers = (
            "" if row.loss is None else f"{row.loss:.3g}",
            "" if row.damp is None else f"{row.damp:g}",
            f"{row.tokens:,}" if row.tokens else "",
            f"{row.seconds:.2f}",
            f"{row.bytes_before:,}",
            f"{row.bytes_after:,}",
        )
        lines.append(
            f'<tr><td class="text">{escape(row.name)}</td><td>{row.shape[0]} × {row.shape[1]}</td>'
            f'<td class="text">{escape(row.method)}</td><td class="text">{escape(row.kernel)}</td>'
            f"{''.join(f'<td>{number}</td>' for number in numbers)}"
            f'<td class="text">{escape("; ".join((*row.problems, *row.notes)))}</td></tr>'
        )
    return f"<table>{head}{''.join(lines)}</table>"
